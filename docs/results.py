"""Draws assets/results.svg, the picture in the README, from the table of explanation/measurements.md."""

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
PICTURE = DOCS / "assets" / "results.svg"
OURS, OTHERS = "#c2410c", "#6b7785"
COLUMNS = {4: "float32", 6: "fastest of bfloat16 and int8"}
"""Columns of the table with the milliseconds for one image."""


def rows(page: str) -> list[list[str]]:
    """Return the cells of the table's rows, one for each model."""
    lines = re.findall(r"^\| (?:\*\*)?`(\w+)`(?:\*\*)? \| (\d+ \| .*) \|$", page, re.MULTILINE)
    return [[name, *cells.split(" | ")] for name, cells in lines if len(cells.split(" | ")) == 7]


def draw(table: list[list[str]]) -> None:
    """Write the picture: accuracy against latency, a panel for each of COLUMNS."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "shvit", "font.size": 9})
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.9), sharey=True, layout="constrained")
    for axis, (column, title) in zip(axes, COLUMNS.items(), strict=True):
        points = [(float(row[column].split()[0]), float(row[2]), row[0]) for row in table]
        ours = [(x, y) for x, y, name in points if name.startswith("shvit")]
        axis.plot(*zip(*ours, strict=True), color=OURS, alpha=0.5)
        for x, y, name in points:
            color = OURS if name.startswith("shvit") else OTHERS
            axis.plot(x, y, "o", color=color)
            axis.annotate(name, (x, y), (6, -3), textcoords="offset points", color=color, fontsize=8)
        axis.set(title=title, xscale="log", xlabel="ms per image, one thread of a Xeon with AMX")
        ticks = [1, 2, 5, 10, 20, 50]
        axis.set_xticks(ticks, map(str, ticks), minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlim(right=max(point[0] for point in points) * 2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ImageNet top-1, % (published)")
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    draw(rows((DOCS / "explanation" / "measurements.md").read_text()))
