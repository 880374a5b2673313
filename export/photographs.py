"""Photographs to verify and to calibrate with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from shvit.train.data import open_image, photograph_files

from .labels import match_classes, refuse_unknown
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


def find_photographs(
    folder: Path | None, num_classes: int = 0, most: int = MAX_IMAGES, classes: Sequence[str] = ()
) -> list[Photograph]:
    """The photographs in `folder` and below, at most `most` spread evenly; scikit-image's where None.

    Args:
        num_classes: of the model; a folder with so many folders of photographs in it tells their classes.
        classes: the model's, where their names are known: folders are then matched by name, and where none of them is
            a class, they tell nothing.

    Raises:
        InputError: the folder is not there or holds none, or some of its folders are classes and others are not.
    """
    paths = photograph_files(folder)
    if folder is None:
        return [Photograph(path, -1) for path in spread(paths, most)]
    names = sorted({path.relative_to(folder).parts[0] for path in paths if path.parent != folder})
    known = {name: index for index, name in enumerate(names)} if len(names) == num_classes else {}
    if classes:
        match = match_classes(names, classes)
        if len(match.unknown) < len(names):
            refuse_unknown(match, classes, folder, "move the others away")
        known = dict(zip(names, match.index, strict=True))
    return [Photograph(path, known.get(path.relative_to(folder).parts[0], -1)) for path in spread(paths, most)]


def spread(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of the items, as many as there are up to it, at even distances from first to last."""
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def read_pixels(photographs: Sequence[Photograph], spec: Spec) -> torch.Tensor:
    """uint8 (n, C, H, W), cut as the model wants them."""
    transform = spec.transform(normalize=False)
    return torch.stack([transform(open_image(photograph.path)) for photograph in photographs])
