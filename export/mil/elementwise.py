"""MIL operations that compute each element from its own: arithmetic, activations, rounding to 8 bits."""

import operator

import torch
import torch.nn.functional as F

from .registry import Operation, Operations

UNARY = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "exp": torch.exp,
    "floor": torch.floor,
    "relu": torch.relu,
    "relu6": F.relu6,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "softplus": lambda x: F.softplus(x, threshold=1e9),  # never the straight line
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
}
BINARY = {
    "add": operator.add,
    "greater": operator.gt,
    "maximum": torch.maximum,
    "mul": operator.mul,
    "pow": operator.pow,
    "real_div": operator.truediv,
    "sub": operator.sub,
}
OTHERS: dict[str, Operation] = {
    "clip": lambda x, alpha, beta: x.clamp(alpha, beta),
    "elu": lambda x, alpha: F.elu(x, alpha),
    "inverse": lambda x, epsilon: 1 / (x + epsilon),
    "leaky_relu": lambda x, alpha: F.leaky_relu(x, alpha),
    "log": lambda x, epsilon: torch.log(x + epsilon),
    "prelu": lambda x, alpha: F.prelu(x, alpha),
    "rsqrt": lambda x, epsilon: torch.rsqrt(x + epsilon),
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "thresholded_relu": lambda x, alpha: torch.where(x >= alpha, x, 0.0),
}
OPERATIONS = Operations(
    {name: lambda x, f=function: f(x) for name, function in UNARY.items()}
    | {name: lambda x, y, f=function: f(torch.as_tensor(x), torch.as_tensor(y)) for name, function in BINARY.items()}
    | OTHERS
)


@OPERATIONS.add
def gelu(x, mode):
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


@OPERATIONS.add
def cast(x, dtype):
    types = {"bool": torch.bool, "fp16": torch.float32, "fp32": torch.float32}  # half is rounded to afterwards
    return torch.as_tensor(x).to(types.get(dtype) or getattr(torch, dtype))


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
