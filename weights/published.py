"""Published ImageNet accuracies: ours from the manifest of weights, others' from published.toml."""

import sys
from functools import cache
from pathlib import Path

from shvit.weights.manifest import read_manifest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BASELINES = Path(__file__).with_name("published.toml")


def published_top1(name: str, img_size: int) -> float | None:
    """Return ImageNet-1k top-1 in percent at exactly `img_size` pixels; None where it is not known.

    Args:
        name: timm's, such as repvit_m1_1, which means the weights that timm loads by default, or with a tag:
            repvit_m1_1.dist_300e_in1k.
    """
    for entry in read_manifest():
        named = entry.task == "classification" and name in (entry.model, entry.name)
        if named and entry.img_size == (img_size, img_size):
            return entry.accuracy["top1"]
    return _baselines().get(name, {}).get(img_size)


@cache
def _baselines() -> dict[str, dict[int, float]]:
    """Return accuracy by size for each name, with its tag and without."""
    listed = tomllib.loads(BASELINES.read_text(encoding="utf-8"))["top1"]
    sizes = {name: {int(size): float(top1) for size, top1 in row.items()} for name, row in listed.items()}
    return sizes | {name.partition(".")[0]: row for name, row in sizes.items()}
