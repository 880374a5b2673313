"""From a decoded image to a model's size, by timm's evaluation transform: Pillow's images, and tensors of any channels.

torchvision resizes tensors with Pillow's filters. Of uint8 it rounds once, and Pillow once for each side: bicubic
results differ by at most three levels, others by one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import create_transform
from timm.data.transforms import CenterCropOrPad
from torchvision.transforms import Compose, Grayscale
from torchvision.transforms.v2 import functional as F

from shvit.errors import InputError

from .formats import Decoded, PixelFormat

Fit = Callable[[Decoded], torch.Tensor]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
"""timm's names of those that tensors can be resized with; Pillow has further ones."""


def check_interpolation(pixels: PixelFormat, interpolation: str) -> None:
    """Raise InputError where images of this format cannot be resized like this."""
    if not pixels.uses_pillow and interpolation not in INTERPOLATIONS:
        raise InputError(f"images of {pixels} cannot be resized with {interpolation}; choose from "
                         f"{', '.join(INTERPOLATIONS)}")  # fmt: skip


def create_fit(pixels: PixelFormat, normalize: bool = True, **config: Any) -> Fit:
    """Create timm's evaluation transform: a decoded image → float32 (C, H, W), normalized; or its pixels.

    Args:
        config: input_size, mean, std, interpolation, crop_pct and crop_mode, as `timm.data.create_transform` takes
            them.

    Raises:
        InputError: see `check_interpolation`.
    """
    if pixels.uses_pillow:
        transform = create_transform(normalize=normalize, **config)
        return Compose([Grayscale(), transform]) if pixels.in_chans == 1 else transform
    check_interpolation(pixels, config["interpolation"])
    steps = resizing(pixels, **config)
    return Compose([*steps, partial(_normalize, pixels, config["mean"], config["std"])] if normalize else steps)


def resizing(pixels: PixelFormat, **config: Any) -> list[Callable[[Any], Any]]:
    """Return the steps of the evaluation transform that bring a decoded image to the model's size."""
    *steps, _ = create_transform(normalize=False, **config).transforms  # the last one makes a tensor of Pillow's image
    if pixels.uses_pillow:
        return steps
    fill = [round(255 * value) if pixels.white == 255 else value for value in config["mean"]]
    pad = partial(_pad_or_crop, size=config["input_size"][1:], fill=fill)
    return [pad if isinstance(step, CenterCropOrPad) else step for step in steps]


def _pad_or_crop(image: torch.Tensor, size: Sequence[int], fill: Sequence[float]) -> torch.Tensor:
    """Do as timm's CenterCropOrPad, which cannot fill the border of a tensor with a value for each channel."""
    rows, columns = (max(target - length, 0) for target, length in zip(size, image.shape[-2:], strict=True))
    padded = F.pad(image, [columns // 2, rows // 2, (columns + 1) // 2, (rows + 1) // 2], list(fill))
    return F.center_crop(padded, list(size))


def _normalize(pixels: PixelFormat, mean: Sequence[float], std: Sequence[float], image: torch.Tensor) -> torch.Tensor:
    return pixels.normalize(image[None], mean, std)[0]
