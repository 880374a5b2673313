"""Images to verify and to calibrate with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from shvit import terminal
from shvit.errors import InputError
from shvit.files import is_folder
from shvit.train.data.image_folders import RARE_SUFFIXES, Listing, image_files, list_images, suffixes_of
from shvit.train.data.pixels.formats import RGB, PixelFormat
from shvit.train.data.splits import find_parts

from .labels import match_classes, refuse_unknown
from .spec import Spec

MAX_IMAGES = 512  # enough to see drift; each is run twice
MAX_CALIBRATION = 256  # S1's ranges hardly differ from those of half as many
BUNDLED = "scikit-image"
T = TypeVar("T")


@dataclass(frozen=True)
class ImageFile:
    """An image file, and its class where the folder names it."""

    path: Path
    label: int  # class index; -1 where it is not known


def sample_images(
    folder: Path | None,
    num_classes: int = 0,
    limit: int = MAX_IMAGES,
    classes: Sequence[str] = (),
    part: Literal["train", "val"] = "val",
    pixels: PixelFormat = RGB,
) -> list[ImageFile]:
    """Return the images in `folder` and below, at most `limit` spread evenly; scikit-image's where None.

    Args:
        num_classes: the model's number of classes; a folder with as many folders of images tells their classes.
        classes: the model's, by index, where they are known: folders are then matched by name, and where none of them
            is a class, they tell nothing.
        part: the split to take of a folder with train/ and val/, which is reported.
        pixels: what a model's images are, by which files are chosen.

    Raises:
        InputError: the folder is not there or holds none, or some of its folders are classes and others are not; or
            there is none, and the model takes other images than scikit-image's.
    """
    if folder is None:
        if not pixels.uses_pillow:
            raise InputError(f"the model takes {pixels}, and the bundled images are in RGB; give --images a folder")
        return [ImageFile(path, -1) for path in spread(image_files(None), limit)]
    listing = _list_part(folder, part, pixels.in_chans)
    folders = sorted({_folder(name) for name in listing.names} - {""})
    indices = {name: index for index, name in enumerate(folders)} if len(folders) == num_classes else {}
    if classes:
        match = match_classes(folders, classes)
        if len(match.unknown) < len(folders):
            refuse_unknown(match, classes, folder, "move the others away")
        indices = dict(zip(folders, match.index, strict=True))
    names = spread(listing.names, limit)
    return [ImageFile(listing.root / name, indices.get(_folder(name), -1)) for name in names]


def _list_part(folder: Path, part: str, in_chans: int) -> Listing:
    if not is_folder(folder):
        raise InputError(f"{folder}: no such folder of images")
    parts = find_parts(folder)
    chosen = (parts.val or parts.train) if part == "val" else (parts.train or parts.val)
    if isinstance(chosen, Path) and chosen.is_dir():
        terminal.console().print(f"{folder}: of its splits, {chosen.name}/ is taken")
        folder = chosen
    listing = list_images(folder, in_chans)
    if not listing.names:
        rare = RARE_SUFFIXES if in_chans in (1, 3) else set()
        raise InputError(f"{folder}: no images in it ({', '.join(sorted(suffixes_of(in_chans) | rare))})")
    return listing


def _folder(name: str) -> str:
    """Return the class folder of an image; empty for one that is in none."""
    return name.partition("/")[0] if "/" in name else ""


def spread(items: Sequence[T], limit: int) -> list[T]:
    """Return up to `limit` of the items, at even distances from first to last."""
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def read_pixels(images: Sequence[ImageFile], spec: Spec) -> torch.Tensor:
    """Return the images' pixels (n, C, H, W), uint8 or float32, resized and cropped as the spec says."""
    transform = spec.transform(normalize=False)
    return torch.stack([transform(spec.pixels.open(image.path)) for image in images])


def gray_level_difference(other: Spec, spec: Spec, images: Sequence[ImageFile]) -> float:
    """Return the largest difference, in gray levels, between two specs' preprocessing of images of one format."""
    to_model, to_pixels = spec.transform(), other.transform(normalize=False)
    levels = torch.tensor(spec.levels)[:, None, None]
    largest = 0.0
    for file in images:
        image = spec.pixels.open(file.path)
        difference = other.normalize(to_pixels(image)[None]) - to_model(image)
        largest = max(largest, (difference.abs() * levels).max().nan_to_num(255.0).item())
    return largest
