"""Image files as arrays (C, H, W), for models of other channels than RGB.

| file | channels |
| --- | --- |
| .npy | the axis, first or last, that is as long as the model has channels; none for a model of one |
| TIFF | the samples of the first page, or as many pages of one sample |
| PNG, WebP, … | gray levels for a model of one channel; gray and alpha for two; RGB and alpha for four, as stored |

Values are uint8, uint16 or float32.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from shvit.errors import InputError

from ..images import MAX_BYTES, check_range, check_size, named_errors, open_pillow, opened, to_rgb, turn_upright
from .npy import MAGIC, check_dtype, read_npy
from .tiff import HEADS, read_tiff

MODES = {2: "LA", 4: "RGBA"}
"""Pillow's modes of images that are given to a model as they are, by its channels."""


def read_array(file: Path | BinaryIO, in_chans: int, name: str) -> np.ndarray:
    """Read an image file as (C, H, W): uint8, uint16 or float32.

    Args:
        name: name in messages.

    Raises:
        InputError: the file is not an image of these channels, is damaged or too large, or a package is missing.
    """
    with named_errors(name), opened(file) as stream:
        head = stream.read(len(MAGIC))
        stream.seek(0)
        if head == MAGIC:
            return check_array(read_npy(stream, name), in_chans, name)
        if in_chans > 1 and head.startswith(HEADS):
            return _checked(read_tiff(stream, in_chans, name), name)
        with open_pillow(stream, name) as image:
            check_size(image.width, image.height, name)
            if image.format == "TIFF" and image.mode[0] in "IF":  # of one channel, of more than 8 bits
                stream.seek(0)
                return _checked(read_tiff(stream, in_chans, name), name)
            return from_pillow(image, in_chans, name)


def check_array(array: np.ndarray, in_chans: int, name: str) -> np.ndarray:
    """Return an array as (C, H, W), whose channels are its first or its last axis.

    Raises:
        InputError: it has other channels, values or sizes, or both axes may be the channels.
    """
    check_dtype(array.dtype, name)
    if array.ndim == 2 and in_chans == 1:
        return _checked(array[None], name)
    first, last = (array.ndim == 3 and array.shape[axis] == in_chans for axis in (0, -1))
    if first == last:
        both = "its first and its last axis may both be the channels; save it larger, or in another format"
        neither = f"give (H, W, {in_chans}) or ({in_chans}, H, W)" + (" or (H, W)" if in_chans == 1 else "")
        raise InputError(f"{name}: an array of shape {array.shape} for a model of {in_chans} channels: "
                         f"{both if first else neither}")  # fmt: skip
    return _checked(array if first else np.moveaxis(array, -1, 0), name)


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    """Return (C, H, W) in this machine's byte order; raise InputError for a wrong size, or NaN and infinities."""
    check_size(array.shape[2], array.shape[1], name)
    if array.nbytes > MAX_BYTES:
        raise InputError(f"{name}: {array.nbytes:,} bytes of pixels, and at most {MAX_BYTES:,} are read; crop it")
    if array.dtype.kind == "f" and (bad := array.size - int(np.isfinite(array).sum())):
        raise InputError(f"{name}: {bad:,} of its {array.size:,} values are NaN or infinite; fill them, such as with "
                         "the channel's mean")  # fmt: skip
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def from_pillow(image: Image.Image, in_chans: int, name: str) -> np.ndarray:
    """Return the channels of an image that Pillow has opened: gray levels for one, otherwise as they are stored."""
    if in_chans == 1:
        return _gray(image, name)
    if image.mode != MODES.get(in_chans):
        stored = f"{len(image.getbands())} channels ({image.mode})"
        raise InputError(f"{name}: has {stored}, and the model takes {in_chans}; give " + (
            f"{MODES[in_chans]} images, TIFF or .npy" if in_chans in MODES else "TIFF or .npy"))  # fmt: skip
    if any(str(part[3]).endswith("16B") for part in getattr(image, "tile", ()) if len(part) > 3):
        raise InputError(f"{name}: 16 bits for each channel, of which Pillow keeps 8; save it as TIFF or .npy")
    return np.ascontiguousarray(np.moveaxis(np.asarray(turn_upright(image)), -1, 0))


def _gray(image: Image.Image, name: str) -> np.ndarray:
    """Return gray levels (1, H, W): uint16 where the file has 16 bits."""
    if image.mode == "I;16" or (image.mode == "I" and image.format in ("PNG", "PPM")):
        levels = np.asarray(turn_upright(image))
        check_range(levels, 16, name)
        return levels.astype(np.uint16)[None]
    return np.asarray(to_rgb(image, name).convert("L"))[None]
