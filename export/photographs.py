"""Photographs to verify and to calibrate with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from shvit.train.data import photograph_files
from shvit.train.images import open_image

from .spec import Spec

MAX_IMAGES = 512  # enough to see drift; each is run twice
MAX_CALIBRATION = 256  # S1's ranges hardly differ from those of half as many
BUNDLED = "scikit-image"
T = TypeVar("T")


@dataclass(frozen=True)
class Photograph:
    """A file, and its class where the folder tells."""

    path: Path
    label: int
    """Class index; -1 where it is not known."""


def find_photographs(folder: Path | None, num_classes: int = 0, most: int = MAX_IMAGES) -> list[Photograph]:
    """The photographs in `folder` and below, at most `most` spread evenly; scikit-image's where None.

    Args:
        num_classes: of the model; a folder with so many folders of photographs in it tells their classes.

    Raises:
        InputError: the folder is not there or holds none.
    """
    paths = photograph_files(folder)
    if folder is None:
        return [Photograph(path, -1) for path in spread(paths, most)]
    classes = sorted({path.relative_to(folder).parts[0] for path in paths if path.parent != folder})
    known = {name: index for index, name in enumerate(classes)} if len(classes) == num_classes else {}
    return [Photograph(path, known.get(path.relative_to(folder).parts[0], -1)) for path in spread(paths, most)]


def spread(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of the items, as many as there are up to it, at even distances from first to last."""
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def read_pixels(photographs: Sequence[Photograph], spec: Spec) -> torch.Tensor:
    """uint8 (n, C, H, W), cut as the model wants them."""
    transform = spec.transform(normalize=False)
    return torch.stack([transform(open_image(photograph.path)) for photograph in photographs])
