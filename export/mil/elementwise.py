"""MIL operations that compute each element from its own: arithmetic, activations, rounding to 8 bits."""

import operator

import torch
import torch.nn.functional as F

from .registry import Operations

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
OPERATIONS = Operations(
    {name: lambda x, f=function: f(x) for name, function in UNARY.items()}
    | {name: lambda x, y, f=function: f(torch.as_tensor(x), torch.as_tensor(y)) for name, function in BINARY.items()}
)


@OPERATIONS.add
def rsqrt(x, epsilon):
    return torch.rsqrt(x + epsilon)


@OPERATIONS.add
def inverse(x, epsilon):
    return 1 / (x + epsilon)


@OPERATIONS.add
def log(x, epsilon):
    return torch.log(x + epsilon)


@OPERATIONS.add
def clip(x, alpha, beta):
    return x.clamp(alpha, beta)


@OPERATIONS.add
def threshold(x, alpha):
    return x.clamp_min(alpha)


@OPERATIONS.add
def elu(x, alpha):
    return F.elu(x, alpha)


@OPERATIONS.add
def leaky_relu(x, alpha):
    return F.leaky_relu(x, alpha)


@OPERATIONS.add
def prelu(x, alpha):
    return F.prelu(x, alpha)


@OPERATIONS.add
def clamped_relu(x, alpha, beta):
    return torch.where(x >= 0, x, alpha * x).clamp_max(beta)


@OPERATIONS.add
def thresholded_relu(x, alpha):
    return torch.where(x >= alpha, x, 0.0)


@OPERATIONS.add
def sigmoid_hard(x, alpha, beta):
    return (alpha * x + beta).clamp(0, 1)


@OPERATIONS.add
def gelu(x, mode):
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@OPERATIONS.add
def cast(x, dtype):
    types = {"bool": torch.bool, "fp16": torch.float32, "fp32": torch.float32}  # half is rounded to afterwards
    return torch.as_tensor(x).to(types.get(dtype) or getattr(torch, dtype))


@OPERATIONS.add
def select(cond, a, b):
    return torch.where(cond, a, b)


def _along(values: torch.Tensor | float, axis: int, rank: int) -> torch.Tensor | float:
    """Return a vector along `axis` of a tensor of that rank; a number as it is."""
    if not isinstance(values, torch.Tensor) or values.dim() == 0:
        return values
    return values.float().reshape([-1 if dim == int(axis) % rank else 1 for dim in range(rank)])


@OPERATIONS.add
def quantize(input, scale, zero_point, axis, output_dtype):  # noqa: A002  (MIL's name)
    dtype = getattr(torch, output_dtype)
    zero = 0 if zero_point is None else _along(zero_point, axis, input.dim())
    levels = torch.round(input / _along(scale, axis, input.dim())) + zero
    return levels.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)


@OPERATIONS.add
def dequantize(input, scale, zero_point, axis):  # noqa: A002
    zero = 0 if zero_point is None else _along(zero_point, axis, input.dim())
    return (input.float() - zero) * _along(scale, axis, input.dim())
