"""MIL operations that change the height and width of images: borders, crops, interpolation, pixel shuffles."""

import torch
import torch.nn.functional as F

from shvit.errors import InputError

from .layers import padded, pairs
from .registry import Operations, ints

OPERATIONS = Operations(
    pixel_shuffle=lambda x, upscale_factor: F.pixel_shuffle(x, int(upscale_factor)),
    upsample_nearest_neighbor=lambda x, scale_factor_height, scale_factor_width: F.interpolate(
        x, scale_factor=(float(scale_factor_height), float(scale_factor_width))
    ),
)


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
def upsample_bilinear(x, scale_factor_height, scale_factor_width, align_corners, half_pixel_centers=None):
    if half_pixel_centers is not None and bool(half_pixel_centers) == bool(align_corners):
        raise InputError("upsample_bilinear with these corners")
    sizes = [int(s * f) for s, f in zip(x.shape[2:], (scale_factor_height, scale_factor_width), strict=True)]
    return F.interpolate(x, sizes, mode="bilinear", align_corners=align_corners)


@OPERATIONS.add
def crop(x, crop_height, crop_width):
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
