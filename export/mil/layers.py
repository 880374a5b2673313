"""MIL operations that are layers: convolutions, products, attention, norms and pooling."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .registry import Numbers, Operations, ints

OPERATIONS = Operations(
    batch_norm=lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(
        x, mean, variance, gamma, beta, eps=epsilon
    ),
    instance_norm=lambda x, gamma, beta, epsilon: F.instance_norm(x, weight=gamma, bias=beta, eps=epsilon),
    linear=lambda x, weight, bias: F.linear(x, weight, bias),
    matmul=lambda x, y, transpose_x, transpose_y: torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y),
    softmax=lambda x, axis: x.softmax(int(axis)),
)
Pads = list[tuple[int, int]]  # (before, after) of each spatial dimension


def pairs(pad: Numbers) -> Pads:
    """Return the widths of borders that MIL lists as before, after, before, after, ..."""
    flat = ints(pad)
    return list(zip(flat[::2], flat[1::2], strict=True))


def padding(
    pad_type: str,
    pad: Numbers,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> Pads:
    """Return the widths of the border that a convolution or pooling adds."""
    if pad_type == "custom":
        return pairs(pad)
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    pads = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        pads.append((large, small) if pad_type == "same_lower" else (small, large))
    return pads


def padded(x: torch.Tensor, pads: Pads, value: float = 0.0) -> torch.Tensor:
    """Return the tensor with a border of a constant; F.pad counts from the last dimension."""
    return F.pad(x, [amount for pair in reversed(pads) for amount in pair], value=value)


@OPERATIONS.add
def conv(x, weight, bias, strides, pad_type, pad, dilations, groups):
    strides, dilations = ints(strides), ints(dilations)
    x = padded(x, padding(pad_type, pad, x.shape[2:], weight.shape[2:], strides, dilations))
    function = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return function(x, weight, bias, strides, 0, dilations, int(groups))


@OPERATIONS.add
def conv_transpose(x, weight, bias, pad, output_shape, pad_type, strides, dilations, groups):
    strides, dilations = ints(strides), ints(dilations)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
    whole = function(x, weight, bias, strides, 0, 0, int(groups), dilations)
    pads = [(0, 0)] * len(strides)
    if pad_type == "custom":
        pads = pairs(pad)
    elif pad_type != "valid":
        target = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        excess = [max(size - length, 0) for size, length in zip(whole.shape[2:], target, strict=True)]
        pads = [(amount // 2, amount - amount // 2) for amount in excess]
    sizes = ints(output_shape)[2:] if output_shape is not None else None
    for dim, (before, after) in enumerate(pads, start=2):
        size = sizes[dim - 2] if sizes else whole.shape[dim] - before - after
        whole = whole.narrow(dim, before, size)
    return whole


@OPERATIONS.add
def layer_norm(x, axes, gamma, beta, epsilon):
    dims = ints(axes)
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + epsilon)
    shape = [size if dim in [d % x.dim() for d in dims] else 1 for dim, size in enumerate(x.shape)]
    if gamma is not None:
        x = x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


def _pool_padded(
    x: torch.Tensor, kernel_sizes: Numbers, strides: Numbers, pad_type: str, pad: Numbers, ceil: bool, fill: float
) -> tuple[torch.Tensor, list[int], list[int]]:
    """Return the input with its border, kernel sizes and strides; with `ceil`, the last window's overhang is border."""
    kernel, strides = ints(kernel_sizes), ints(strides)
    pads = padding(pad_type, pad, x.shape[2:], kernel, strides, [1] * len(kernel))
    if ceil:
        for dim, (before, after) in enumerate(pads):
            size = x.shape[dim + 2] + before + after
            steps = -(-(size - kernel[dim]) // strides[dim])
            if steps * strides[dim] >= x.shape[dim + 2] + before:
                steps -= 1  # a window must begin inside
            pads[dim] = (before, after + max(steps * strides[dim] + kernel[dim] - size, 0))
    return padded(x, pads, fill), kernel, strides


@OPERATIONS.add
def max_pool(x, kernel_sizes, strides, pad_type, pad, ceil_mode):
    x, kernel, strides = _pool_padded(x, kernel_sizes, strides, pad_type, pad, ceil_mode, -torch.inf)
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3](x, kernel, strides)


@OPERATIONS.add
def avg_pool(x, kernel_sizes, strides, pad_type, pad, exclude_padding_from_average, ceil_mode):
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    inside = torch.ones_like(x[:1, :1])
    x, kernel, strides = _pool_padded(x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    mean = function(x, kernel, strides)
    if not exclude_padding_from_average:
        return mean
    inside, *_ = _pool_padded(inside, kernel, strides, pad_type, pad, ceil_mode, 0.0)
    return mean / function(inside, kernel, strides)
