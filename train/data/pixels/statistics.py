"""What a run learns of its training images' pixels before it starts: their type, mean and standard deviation."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from PIL import Image

from shvit.errors import InputError

from .arrays import from_pillow
from .fit import create_fit
from .formats import PixelFormat, PixelType, type_of

if TYPE_CHECKING:
    from ..datasets import Images

MAX_TYPES = 32  # images whose type is looked at
MAX_IMAGES = 300  # whose mean and standard deviation are taken
T = TypeVar("T")


def find_pixel_type(images: "Images", in_chans: int) -> PixelType:
    """Return the type of the values in images' files, of which some are looked at.

    Raises:
        InputError: files differ in their types, or none can be read.
    """
    found: dict[PixelType, str] = {}
    problem = ""
    for index in _spread(range(len(images)), MAX_TYPES):
        name = images.name(index)
        try:
            file, _ = images.fetch(index)
            is_open = isinstance(file, Image.Image)
            kind = from_pillow(file, in_chans, name).dtype.name if is_open else type_of(file, in_chans, name)
            found.setdefault(kind, name)
        except InputError as error:
            problem = problem or str(error)
    if len(found) > 1:
        listed = " and ".join(f"{kind} ({name})" for kind, name in found.items())
        raise InputError(f"the training images are of {listed}, each of which is scaled otherwise; convert them to one "
                         "range and type")  # fmt: skip
    if not found:
        raise InputError(f"none of {len(images)} training images can be read with --in-chans {in_chans}; one of them: "
                         f"{problem}")  # fmt: skip
    return next(iter(found))


@dataclass(frozen=True)
class Statistics:
    """Mean, standard deviation and range of each channel, in units of white."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    images: int
    """Number of images that they are of."""


def channel_statistics(images: "Images", pixels: PixelFormat, input_size: Sequence[int]) -> Statistics:
    """Return the statistics of at most `MAX_IMAGES` images, spread evenly, each whole and resized to (C, H, W).

    Raises:
        InputError: a channel has one value throughout, so that it cannot be normalized.
    """
    whole = create_fit(pixels, normalize=False, input_size=input_size, mean=(0.0,) * pixels.in_chans,
                       std=(1.0,) * pixels.in_chans, interpolation="bilinear", crop_pct=1.0,
                       crop_mode="squash")  # fmt: skip
    sums = torch.zeros(2, pixels.in_chans, dtype=torch.float64)
    ranges = torch.tensor([float("inf"), float("-inf")], dtype=torch.float64)[:, None].repeat(1, pixels.in_chans)
    count = 0
    for image in _readable(images):
        values = whole(image).double().flatten(1) / pixels.white
        sums += torch.stack([values.mean(1), values.square().mean(1)])
        ranges[0] = torch.minimum(ranges[0], values.amin(1))
        ranges[1] = torch.maximum(ranges[1], values.amax(1))
        count += 1
    mean, square = sums / max(count, 1)
    std = (square - mean.square()).clamp_min(0).sqrt()
    flat = [channel for channel in range(pixels.in_chans) if ranges[0, channel] >= ranges[1, channel]]
    if flat:
        raise InputError(f"channel {flat[0]}, counted from 0, has the same value in all of {count} training images; "
                         "leave it out, or give --data.mean and --data.std")  # fmt: skip
    means, stds, lowest, highest = (tuple(each.tolist()) for each in (mean, std, *ranges))
    return Statistics(means, stds, lowest, highest, count)


def _readable(images: "Images") -> Iterator[torch.Tensor]:
    for index in _spread(range(len(images)), MAX_IMAGES):
        with suppress(InputError):  # reported when training comes to it
            yield images[index][0]  # type: ignore[misc]


def _spread(items: Sequence[T], limit: int) -> list[T]:
    """Return up to `limit` of the items, at even distances from first to last."""
    count = min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]
