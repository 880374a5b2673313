"""Draws docs/explanation/verdicts.png: how far sound files and files with one deliberate defect are from their models.

$ python -m tests.export.judge_picture docs/explanation/verdicts.png onnx openvino coreml
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from shvit.errors import CheckFailed
from shvit.export.backends.registry import load_artifact
from shvit.export.formats.parameters import compare_parameters
from shvit.export.verdict import TOLERANCES
from shvit.export.verify import _quantizable, certify
from tests.export.judged import Workshop
from tests.export.test_judge import FORMATS, defects_of

SEEDS = range(3)
PLOTTED = {"snr": (0, 140), "weights": (1e-2, 1e6)}
Points = dict[tuple[str, bool], list[tuple[float, float]]]
"""(precision, sound) → signal to noise in dB, and the largest error of a weight over what rounding explains."""


def measure(kinds: list[str]) -> tuple[Points, int, int]:
    """The points, and how many defective files were tried and refused."""
    points: Points = defaultdict(list)
    tried = refused = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            workshop = Workshop(Path(folder) / str(seed), seed=seed)
            for kind in kinds:
                for precision in FORMATS[kind]:
                    points[precision, True].append(_point(workshop.sound(kind, precision), workshop.reference)[0])
                    for defect in defects_of(kind, precision) if seed == 0 else ():
                        if defect == "a softmax twice" or defect.startswith("said: "):
                            continue  # on another scale, or without a wrong output
                        point, verdict = _point(*workshop.defective(kind, precision, defect))
                        points[precision, False].append(point)
                        tried, refused = tried + 1, refused + (verdict == "refused")
                        print(kind, precision, defect, verdict, *(f"{each:.3g}" for each in point), flush=True)
    return points, tried, refused


def _point(artifact, reference) -> tuple[tuple[float, float], str]:
    opened = load_artifact(artifact, 1, rounded=True) if isinstance(artifact, Path) else artifact
    weights = compare_parameters(opened.parameters(), _quantizable(opened, reference)).worst
    try:
        certificate = certify(opened, reference)
    except CheckFailed:
        return (0.0, weights), "refused"
    return (certificate.snr_db, weights), certificate.verdict


def draw(points: Points, path: Path) -> None:
    """Two panels, one row for each precision: sound files blue, defective ones red, bounds as lines."""
    rows = [precision for precision in TOLERANCES if (precision, True) in points]
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.7 * len(rows) + 1.2), sharey=True, layout="constrained")
    for row, precision in enumerate(rows):
        for sound, color, shift in ((True, "tab:blue", -0.15), (False, "tab:red", 0.15)):
            for panel, index, (low, high) in zip(panels, (0, 1), PLOTTED.values(), strict=True):
                values = [min(max(point[index], low), high) for point in points[precision, sound]]
                panel.scatter(values, [row + shift] * len(values), s=14, color=color, alpha=0.6, linewidths=0)
        panels[0].plot([TOLERANCES[precision].snr_db] * 2, [row - 0.4, row + 0.4], color="black")
    panels[1].axvline(1, color="black")
    panels[0].set(xlabel="signal to noise, dB (outputs)", xlim=(-3, 143))
    panels[1].set(xlabel="largest error of a weight / what rounding explains", xscale="log")
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    figure.suptitle("Sound files (blue), files with one defect (red), bounds (black)", fontsize=10)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    found, tried, refused = measure(sys.argv[2:] or list(FORMATS))
    draw(found, Path(sys.argv[1]))
    print(f"{refused} of {tried} defective files refused; {sum(len(each) for each in found.values())} points")
