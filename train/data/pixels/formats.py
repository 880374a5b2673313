"""The pixels that a model takes: how many channels, and of which type their values are in files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image

from shvit.errors import InputError

from ..images import open_image, to_rgb
from .arrays import check_array, from_pillow, read_array
from .npy import MAGIC

PixelType = Literal["uint8", "uint16", "float32"]
Decoded = Image.Image | torch.Tensor
"""An image in RGB, or (C, H, W) of `PixelFormat.dtype`."""
MAX_CHANS = 16


@dataclass(frozen=True)
class PixelFormat:
    """Number of channels, and type of the values in files: what a run's images, and later those for its model, share.

    Integers are divided by the largest value of their type, so that white is 1; floats are taken as they are. Images
    of 1 or 3 channels of 8 bits are decoded by Pillow, in RGB, and turned gray for 1; others are arrays.
    """

    in_chans: int = 3
    pixel_type: PixelType = "uint8"

    @property
    def uses_pillow(self) -> bool:
        """True if images are Pillow's, as viewers show them; False if they are tensors (C, H, W)."""
        return self.pixel_type == "uint8" and self.in_chans in (1, 3)

    @property
    def dtype(self) -> torch.dtype:
        """Type of decoded pixels: uint8 as in files, float32 for all others."""
        return torch.uint8 if self.pixel_type == "uint8" else torch.float32

    @property
    def white(self) -> int:
        """The decoded value that stands for 1: 255 of uint8."""
        return 255 if self.pixel_type == "uint8" else 1

    @property
    def blank(self) -> Decoded:
        """A black image, in place of one that cannot be read."""
        return Image.new("RGB", (8, 8)) if self.uses_pillow else torch.zeros(self.in_chans, 8, 8, dtype=self.dtype)

    def __str__(self) -> str:
        return f"{self.in_chans} channel{'s' * (self.in_chans > 1)} of {self.pixel_type}"

    def open(self, file: Path | BinaryIO, name: str | None = None) -> Decoded:
        """Decode an image file.

        Args:
            file: its path, or the file, open for reading.
            name: name in messages; the path if None.

        Raises:
            InputError: as `open_image` and `read_array`, or its values are of another type.
        """
        name = name or str(file)
        if self.uses_pillow and (self.in_chans == 3 or not _is_npy(file)):
            return open_image(file, name)
        return self._decoded(read_array(file, self.in_chans, name), name)

    def convert(self, image: Image.Image | np.ndarray, name: str) -> Decoded:
        """Convert an image that another library has opened, as `open` does with a file; arrays as in .npy files."""
        if isinstance(image, np.ndarray):
            return self._decoded(check_array(image, self.in_chans, name), name)
        if self.uses_pillow:
            return to_rgb(image, name)
        return self._decoded(from_pillow(image, self.in_chans, name), name)

    def _decoded(self, array: np.ndarray, name: str) -> Decoded:
        if array.dtype != self.pixel_type:
            raise InputError(f"{name}: holds {array.dtype}, and the model was trained on {self.pixel_type}, which is "
                             "scaled otherwise; convert it to the same range and type")  # fmt: skip
        if self.uses_pillow:
            return Image.fromarray(array.squeeze(0) if self.in_chans == 1 else array.transpose(1, 2, 0)).convert("RGB")
        if self.pixel_type == "uint16":
            return torch.from_numpy(array.astype(np.float32)).div_(np.iinfo(np.uint16).max)
        return torch.tensor(array)

    def normalize(self, pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
        """Return decoded pixels (B, C, H, W) as float32: (pixels / white - mean) / std."""
        means, stds = (torch.tensor(list(values))[:, None, None] for values in (mean, std))
        # in place: for a batch of images, the pages of each further tensor take longer than its numbers
        return pixels.to(torch.float32, copy=True).div_(self.white).sub_(means).div_(stds)


RGB = PixelFormat()


def _is_npy(file: Path | BinaryIO) -> bool:
    if isinstance(file, Path):
        return file.suffix.lower() == ".npy"
    head = file.read(len(MAGIC))
    file.seek(0)
    return head == MAGIC


def type_of(file: Path | BinaryIO, in_chans: int, name: str) -> PixelType:
    """Return the type of the values in an image file; raise InputError as `read_array`."""
    return read_array(file, in_chans, name).dtype.name
