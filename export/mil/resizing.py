"""MIL operations that change the height and width of images: borders, crops, interpolation, pixel shuffles."""

import torch
import torch.nn.functional as F

from shvit.errors import InputError

from .layers import padded, pairs
from .registry import Operations, ints

OPERATIONS = Operations()


@OPERATIONS.add
def pad(x, pad, mode, constant_val):
    pads = pairs(pad)
    if mode == "constant":
        return padded(x, pads, constant_val)
    for dim, amounts in enumerate(pads, start=x.dim() - len(pads)):
        size = x.shape[dim]
        places = torch.arange(-amounts[0], size + amounts[1])
        if mode == "reflect":
            places = (size - 1) - (places.abs() - (size - 1)).abs()
        x = x.index_select(dim, places.clamp(0, size - 1))
    return x


@OPERATIONS.add
def pixel_shuffle(x, upscale_factor):
    return F.pixel_shuffle(x, int(upscale_factor))


@OPERATIONS.add
def pixel_unshuffle(x, downscale_factor):
    return F.pixel_unshuffle(x, int(downscale_factor))


@OPERATIONS.add
def upsample_nearest_neighbor(x, scale_factor_height, scale_factor_width):
    return F.interpolate(x, scale_factor=(float(scale_factor_height), float(scale_factor_width)))


@OPERATIONS.add
def upsample_bilinear(x, scale_factor_height, scale_factor_width, align_corners, half_pixel_centers=None):
    if half_pixel_centers is not None and bool(half_pixel_centers) == bool(align_corners):
        raise InputError("upsample_bilinear with these corners")
    sizes = [int(s * f) for s, f in zip(x.shape[2:], (scale_factor_height, scale_factor_width), strict=True)]
    return F.interpolate(x, sizes, mode="bilinear", align_corners=align_corners)


@OPERATIONS.add
def resize_nearest_neighbor(x, target_size_height, target_size_width):
    return F.interpolate(x, (int(target_size_height), int(target_size_width)))


def _sample(size: int, wanted: int, mode: str) -> torch.Tensor:
    """Return where each of the wanted points lies among `size`, as MIL's `sampling_mode` says."""
    i = torch.arange(wanted, dtype=torch.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if wanted == 1:
            return torch.full((1,), (size - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0, dtype=torch.float64)
        points = i * (size - 1) / (wanted - 1)
    elif mode == "DEFAULT":
        points = i * ((size - size / wanted) / max(wanted - 1, 1))
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / wanted
        points = 0.5 * delta + i * delta
    elif mode == "UNALIGN_CORNERS":
        points = (i + 0.5) * size / wanted - 0.5
    else:
        raise InputError(f"sampling mode {mode!r}")
    return points.clamp(0, size - 1)


@OPERATIONS.add
def resize_bilinear(x, target_size_height, target_size_width, sampling_mode):
    for dim, wanted in ((-2, int(target_size_height)), (-1, int(target_size_width))):
        points = _sample(x.shape[dim], wanted, sampling_mode)
        low = points.floor().long()
        high = (low + 1).clamp_max(x.shape[dim] - 1)
        share = (points - low).float()
        share = share[:, None] if dim == -2 else share
        x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share
    return x


@OPERATIONS.add
def resize(x, shape, resized_dims, interpolation_mode, sampling_mode):
    height, width = ints(shape)[-2:]
    if int(resized_dims) != 2:
        raise InputError("resize of other than two dimensions")
    height, width = height or x.shape[-2], width or x.shape[-1]
    if interpolation_mode == "NEAREST_NEIGHBOR":
        return F.interpolate(x, (height, width))
    return resize_bilinear(x, height, width, sampling_mode)


@OPERATIONS.add
def crop(x, crop_height, crop_width):
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
