"""Core ML's operations, each computed by PyTorch's.

Names, arguments and meanings are those of the Model Intermediate Language (MIL), iOS 15 to 18; source:
https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html. Arguments are tensors, or
Python's numbers, strings and lists where MIL asks for a constant; an operation with several results gives a tuple.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from shvit.errors import InputError

Operation = Callable[..., Any]
OPERATIONS: dict[str, Operation] = {}
"""By MIL's name."""


def operation(function: Operation) -> Operation:
    """Enters a function under its name."""
    OPERATIONS[function.__name__] = function
    return function


def ints(values: Any) -> list[int]:
    """A list of whole numbers, which MIL has as a tensor, a number or a list."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    return [int(value) for value in values] if isinstance(values, Sequence) else [int(values)]


# --- element by element -----------------------------------------------------------------------------------------------

UNARY = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "identity": lambda x: x,
    "logical_not": torch.logical_not,
    "relu": torch.relu,
    "relu6": F.relu6,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "softplus": lambda x: F.softplus(x, threshold=1e9),  # never the straight line
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
BINARY = {
    "add": operator.add,
    "equal": operator.eq,
    "floor_div": operator.floordiv,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "less": operator.lt,
    "less_equal": operator.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": operator.mod,
    "mul": operator.mul,
    "not_equal": operator.ne,
    "pow": operator.pow,
    "real_div": operator.truediv,
    "sub": operator.sub,
}
OPERATIONS |= {name: lambda x, f=function: f(x) for name, function in UNARY.items()}
OPERATIONS |= {
    name: lambda x, y, f=function: f(torch.as_tensor(x), torch.as_tensor(y)) for name, function in BINARY.items()
}


@operation
def rsqrt(x, epsilon):
    return torch.rsqrt(x + epsilon)


@operation
def inverse(x, epsilon):
    return 1 / (x + epsilon)


@operation
def log(x, epsilon):
    return torch.log(x + epsilon)


@operation
def clip(x, alpha, beta):
    return x.clamp(alpha, beta)


@operation
def threshold(x, alpha):
    return x.clamp_min(alpha)


@operation
def elu(x, alpha):
    return F.elu(x, alpha)


@operation
def leaky_relu(x, alpha):
    return F.leaky_relu(x, alpha)


@operation
def prelu(x, alpha):
    return F.prelu(x, alpha)


@operation
def clamped_relu(x, alpha, beta):
    return torch.where(x >= 0, x, alpha * x).clamp_max(beta)


@operation
def thresholded_relu(x, alpha):
    return torch.where(x >= alpha, x, 0.0)


@operation
def sigmoid_hard(x, alpha, beta):
    return (alpha * x + beta).clamp(0, 1)


@operation
def gelu(x, mode):
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@operation
def cast(x, dtype):
    types = {"bool": torch.bool, "fp16": torch.float32, "fp32": torch.float32}  # half is rounded to afterwards
    return torch.as_tensor(x).to(types.get(dtype) or getattr(torch, dtype))


@operation
def select(cond, a, b):
    return torch.where(cond, a, b)


# --- layers -----------------------------------------------------------------------------------------------------------


def padding(pad_type: str, pad: Any, sizes: Sequence[int], kernel: Sequence[int], strides: Any, dilations: Any) -> Any:
    """(before, after) of each spatial dimension."""
    if pad_type == "custom":
        flat = ints(pad)
        return list(zip(flat[::2], flat[1::2], strict=True))
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    found = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        found.append((large, small) if pad_type == "same_lower" else (small, large))
    return found


def padded(x: torch.Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> torch.Tensor:
    """F.pad counts from the last dimension."""
    return F.pad(x, [amount for pair in reversed(pads) for amount in pair], value=value)


@operation
def conv(x, weight, bias, strides, pad_type, pad, dilations, groups):
    strides, dilations = ints(strides), ints(dilations)
    x = padded(x, padding(pad_type, pad, x.shape[2:], weight.shape[2:], strides, dilations))
    function = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return function(x, weight, bias, strides, 0, dilations, int(groups))


@operation
def conv_transpose(x, weight, bias, pad, output_shape, pad_type, strides, dilations, groups):
    strides, dilations = ints(strides), ints(dilations)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
    whole = function(x, weight, bias, strides, 0, 0, int(groups), dilations)
    pads = [(0, 0)] * len(strides)
    if pad_type == "custom":
        pads = padding(pad_type, pad, (), (), (), ())
    elif pad_type != "valid":
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        spare = [max(size - want, 0) for size, want in zip(whole.shape[2:], wanted, strict=True)]
        pads = [(amount // 2, amount - amount // 2) for amount in spare]
    sizes = ints(output_shape)[2:] if output_shape is not None else None
    for dim, (before, after) in enumerate(pads, start=2):
        size = sizes[dim - 2] if sizes else whole.shape[dim] - before - after
        whole = whole.narrow(dim, before, size)
    return whole


@operation
def linear(x, weight, bias):
    return F.linear(x, weight, bias)


@operation
def matmul(x, y, transpose_x, transpose_y):
    return torch.matmul(x.mT if transpose_x else x, y.mT if transpose_y else y)


@operation
def einsum(values, equation):
    return torch.einsum(equation, *values)


@operation
def scaled_dot_product_attention(query, key, value, attn_mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


@operation
def batch_norm(x, mean, variance, gamma, beta, epsilon):
    return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=epsilon)


@operation
def instance_norm(x, gamma, beta, epsilon):
    return F.instance_norm(x, weight=gamma, bias=beta, eps=epsilon)


@operation
def layer_norm(x, axes, gamma, beta, epsilon):
    dims = ints(axes)
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + epsilon)
    shape = [size if dim in [d % x.dim() for d in dims] else 1 for dim, size in enumerate(x.shape)]
    if gamma is not None:
        x = x * gamma.reshape(shape)
    return x if beta is None else x + beta.reshape(shape)


@operation
def l2_norm(x, epsilon):
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


@operation
def softmax(x, axis):
    return x.softmax(int(axis))


def _pool_padded(x: torch.Tensor, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any, ceil: bool, fill: float):
    """The input with its border, and the border's widths; with `ceil`, the last window's overhang is part of it."""
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


@operation
def max_pool(x, kernel_sizes, strides, pad_type, pad, ceil_mode):
    x, kernel, strides = _pool_padded(x, kernel_sizes, strides, pad_type, pad, ceil_mode, -torch.inf)
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3](x, kernel, strides)


@operation
def avg_pool(x, kernel_sizes, strides, pad_type, pad, exclude_padding_from_average, ceil_mode):
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    inside = torch.ones_like(x[:1, :1])
    x, kernel, strides = _pool_padded(x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0.0)
    mean = function(x, kernel, strides)
    if not exclude_padding_from_average:
        return mean
    inside, *_ = _pool_padded(inside, kernel, strides, pad_type, pad, ceil_mode, 0.0)
    return mean / function(inside, kernel, strides)


# --- reductions -------------------------------------------------------------------------------------------------------

REDUCTIONS: dict[str, Operation] = {
    "reduce_l1_norm": lambda x, dims, keep: x.abs().sum(dims, keep),
    "reduce_l2_norm": lambda x, dims, keep: x.square().sum(dims, keep).sqrt(),
    "reduce_log_sum": lambda x, dims, keep: x.sum(dims, keep).log(),
    "reduce_log_sum_exp": lambda x, dims, keep: x.logsumexp(dims, keep),
    "reduce_max": lambda x, dims, keep: x.amax(dims, keep),
    "reduce_mean": lambda x, dims, keep: x.mean(dims, keep),
    "reduce_min": lambda x, dims, keep: x.amin(dims, keep),
    "reduce_sum": lambda x, dims, keep: x.sum(dims, keep),
    "reduce_sum_square": lambda x, dims, keep: x.square().sum(dims, keep),
}


def _reduction(function: Operation) -> Operation:
    def reduce(x, axes, keep_dims):
        return function(x, list(range(x.dim())) if axes is None else ints(axes), keep_dims)

    return reduce


OPERATIONS |= {name: _reduction(function) for name, function in REDUCTIONS.items()}


@operation
def reduce_argmax(x, axis, keep_dims, output_dtype=None):
    return x.argmax(int(axis), keep_dims).int()


@operation
def reduce_argmin(x, axis, keep_dims, output_dtype=None):
    return x.argmin(int(axis), keep_dims).int()


@operation
def reduce_prod(x, axes, keep_dims):
    for axis in sorted(ints(axes) if axes is not None else range(x.dim()), key=lambda dim: dim % x.dim()):
        x = x.prod(axis, keepdim=True)
    return x if keep_dims else x.squeeze(ints(axes) if axes is not None else list(range(x.dim())))


@operation
def cumsum(x, axis, exclusive, reverse):
    dim = int(axis)
    x = x.flip(dim) if reverse else x
    total = x.cumsum(dim) - (x if exclusive else 0)
    return total.flip(dim) if reverse else total


# --- shape ------------------------------------------------------------------------------------------------------------


@operation
def shape(x):
    return torch.tensor(x.shape, dtype=torch.int32)


@operation
def reshape(x, shape):
    sizes = [x.shape[dim] if size == 0 else size for dim, size in enumerate(ints(shape))]
    return x.reshape(sizes)


@operation
def flatten2d(x, axis):
    return x.reshape(x.shape[: int(axis)].numel(), -1)


@operation
def transpose(x, perm):
    return x.permute(ints(perm))


@operation
def expand_dims(x, axes):
    dims = ints(axes)
    for dim in sorted(dim % (x.dim() + len(dims)) for dim in dims):
        x = x.unsqueeze(dim)
    return x


@operation
def squeeze(x, axes):
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


@operation
def stack(values, axis):
    return torch.stack([torch.as_tensor(value) for value in values], int(axis))


@operation
def concat(values, axis, interleave):
    values = [torch.as_tensor(value) for value in values]
    if not interleave:
        return torch.cat(values, int(axis))
    dim = int(axis) % values[0].dim()
    return torch.stack(values, dim + 1).flatten(dim, dim + 1)


@operation
def split(x, num_splits, split_sizes, axis):
    if split_sizes is not None:
        return x.split(ints(split_sizes), int(axis))
    return x.chunk(int(num_splits), int(axis))


@operation
def slice_by_index(x, begin, end, stride, begin_mask, end_mask, squeeze_mask):
    rank = x.dim()

    def flags(mask: Any) -> list[int]:
        return [0] * rank if mask is None else ints(mask)

    steps = [1] * rank if stride is None else ints(stride)
    drop = flags(squeeze_mask)
    from_start, to_end = flags(begin_mask), flags(end_mask)
    for dim, (first, last, step) in enumerate(zip(ints(begin), ints(end), steps, strict=True)):
        size = x.shape[dim]
        if drop[dim]:
            indices = range(first % size, first % size + 1)
        else:
            indices = range(size)[slice(None if from_start[dim] else first, None if to_end[dim] else last, step)]
        x = x.index_select(dim, torch.tensor(indices, dtype=torch.int64))
    return x.squeeze([dim for dim in range(rank) if drop[dim]])


@operation
def slice_by_size(x, begin, size):
    for dim, (first, length) in enumerate(zip(ints(begin), ints(size), strict=True)):
        x = x.narrow(dim, first, x.shape[dim] - first if length == -1 else length)
    return x


@operation
def gather(x, indices, axis, batch_dims, validate_indices=None):
    dim, batch = int(axis) % x.dim(), int(batch_dims)
    indices = torch.as_tensor(indices).long()
    indices = torch.where(indices < 0, indices + x.shape[dim], indices)
    if batch:
        raise InputError("gather along batches")
    return x.index_select(dim, indices.flatten()).reshape(*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])


@operation
def gather_along_axis(x, indices, axis, validate_indices=None):
    dim = int(axis)
    return x.gather(dim, torch.where(indices < 0, indices + x.shape[dim], indices).long())


@operation
def tile(x, reps):
    return x.repeat(ints(reps))


@operation
def fill(shape, value):
    return torch.full(ints(shape), value)


@operation
def fill_like(ref_tensor, value):
    return torch.full(ref_tensor.shape, value)


@operation
def range_1d(start, end, step):
    return torch.arange(*(value.item() if isinstance(value, torch.Tensor) else value for value in (start, end, step)))


@operation
def reverse(x, axes):
    return x.flip(list(range(x.dim())) if axes is None else ints(axes))


@operation
def pad(x, pad, mode, constant_val):
    pads = padding("custom", pad, (), (), (), ())
    if mode == "constant":
        return padded(x, pads, constant_val)
    for dim, amounts in enumerate(pads, start=x.dim() - len(pads)):
        size = x.shape[dim]
        places = torch.arange(-amounts[0], size + amounts[1])
        if mode == "reflect":
            places = (size - 1) - (places.abs() - (size - 1)).abs()
        x = x.index_select(dim, places.clamp(0, size - 1))
    return x


@operation
def pixel_shuffle(x, upscale_factor):
    return F.pixel_shuffle(x, int(upscale_factor))


@operation
def pixel_unshuffle(x, downscale_factor):
    return F.pixel_unshuffle(x, int(downscale_factor))


# --- size of images ---------------------------------------------------------------------------------------------------


@operation
def upsample_nearest_neighbor(x, scale_factor_height, scale_factor_width):
    return F.interpolate(x, scale_factor=(float(scale_factor_height), float(scale_factor_width)))


@operation
def upsample_bilinear(x, scale_factor_height, scale_factor_width, align_corners, half_pixel_centers=None):
    if half_pixel_centers is not None and bool(half_pixel_centers) == bool(align_corners):
        raise InputError("upsample_bilinear with these corners")
    sizes = [int(s * f) for s, f in zip(x.shape[2:], (scale_factor_height, scale_factor_width), strict=True)]
    return F.interpolate(x, sizes, mode="bilinear", align_corners=align_corners)


@operation
def resize_nearest_neighbor(x, target_size_height, target_size_width):
    return F.interpolate(x, (int(target_size_height), int(target_size_width)))


def _sample(size: int, wanted: int, mode: str) -> torch.Tensor:
    """Where each of the wanted points lies among `size`, as MIL's `sampling_mode` says."""
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


@operation
def resize_bilinear(x, target_size_height, target_size_width, sampling_mode):
    for dim, wanted in ((-2, int(target_size_height)), (-1, int(target_size_width))):
        points = _sample(x.shape[dim], wanted, sampling_mode)
        low = points.floor().long()
        high = (low + 1).clamp_max(x.shape[dim] - 1)
        share = (points - low).float()
        share = share[:, None] if dim == -2 else share
        x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share
    return x


@operation
def resize(x, shape, resized_dims, interpolation_mode, sampling_mode):
    height, width = ints(shape)[-2:]
    if int(resized_dims) != 2:
        raise InputError("resize of other than two dimensions")
    height, width = height or x.shape[-2], width or x.shape[-1]
    if interpolation_mode == "NEAREST_NEIGHBOR":
        return F.interpolate(x, (height, width))
    return resize_bilinear(x, height, width, sampling_mode)


@operation
def crop(x, crop_height, crop_width):
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


# --- quantization and classes -----------------------------------------------------------------------------------------


def _along(values: Any, axis: Any, rank: int) -> Any:
    """A vector along `axis` of a tensor of that rank; a number as it is."""
    if not isinstance(values, torch.Tensor) or values.dim() == 0:
        return values
    return values.float().reshape([-1 if dim == int(axis) % rank else 1 for dim in range(rank)])


@operation
def quantize(input, scale, zero_point, axis, output_dtype):  # noqa: A002  (MIL's name)
    dtype = getattr(torch, output_dtype)
    zero = 0 if zero_point is None else _along(zero_point, axis, input.dim())
    levels = torch.round(input / _along(scale, axis, input.dim())) + zero
    return levels.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)


@operation
def dequantize(input, scale, zero_point, axis):  # noqa: A002
    zero = 0 if zero_point is None else _along(zero_point, axis, input.dim())
    return (input.float() - zero) * _along(scale, axis, input.dim())


@operation
def classify(probabilities, classes):
    """The most probable label, and all probabilities."""
    values = probabilities.flatten().tolist()
    named = dict(zip(classes, values, strict=True))
    return max(named, key=named.__getitem__), named
