"""The weights in a file, compared with its model's: one wrong weight hardly shows in any output.

They are read as each format stores them, 8-bit ones multiplied out, together with the largest error that rounding to
the format can have made of each. For 8 bits the scales that belong together are compared too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from shvit.shvit import SHViT

from ..quantization.ranges import LEVELS, Range
from ..wrappers import layers

ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}
"""Largest relative error of a value rounded to each format."""
SMALLEST = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
"""Largest absolute error near zero, half of the smallest number."""
FOLDING = 1e-5
"""Most that folding norms in float32 may differ between processors, as a share of a tensor's largest value."""
GAIN_SIGMAS = 6.0


class Stored(NamedTuple):
    """A tensor of a file."""

    value: torch.Tensor  # float32
    rounding: torch.Tensor  # the largest error that rounding made; its shape broadcasts to the value's


@dataclass(frozen=True)
class LayerParameters:
    """A convolution or linear layer of a file."""

    weight: Stored  # (out, in / groups, …)
    bias: Stored | None


def stored(value: Any, dtype: torch.dtype | None = None) -> Stored:
    """Return a tensor of floats; `dtype` is the type that it was rounded to where that is not its own."""
    value = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
    dtype, value = dtype or value.dtype, value.float()
    return Stored(value, (value.abs() * ROUNDING[dtype]).clamp_min(SMALLEST.get(dtype, 0.0)))


def quantized(levels: Any, scale: Any, zero_point: Any = 0, axis: int = 0) -> Stored:
    """Return a tensor of integers with a scale for each index of `axis`, or one for all; scales may be float16."""
    step = stored(np.array(scale))
    levels = torch.from_numpy(np.array(levels, dtype=np.float32))
    zero_point = torch.from_numpy(np.array(zero_point, dtype=np.float32))
    shape = [1] * levels.dim()
    if step.value.dim() == 1 and len(step.value) > 1:
        shape[axis] = len(step.value)
    size, error = step.value.reshape(shape), step.rounding.reshape(shape)
    counts = levels - (zero_point.reshape(shape) if zero_point.numel() == size.numel() else zero_point)
    error = error + size * FOLDING
    # A scale in float16 is rounded, and so were the weights before; what a scale rounded down cannot reach is cut.
    return Stored(counts * size, size / 2 + (3 * counts.abs() + 1) * error)


# --- compared ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faults:
    """The result of a comparison of weights."""

    compared: int  # layers of the file that are layers of the model
    worst: float
    """The largest error over the largest that rounding explains, of weights, biases and scales; above 1 is a fault."""
    faults: tuple[str, ...]  # what is wrong, the worst first; empty for a sound file


def compare_parameters(file_parameters: Mapping[str, LayerParameters], model: nn.Module) -> Faults:
    """Compare a file's weights with those of its deployed model.

    Every weight and bias may be off by what rounding to its format makes of it. Rounding errors have no direction: the
    whole of a layer's weights, and of all layers', may not be larger or smaller by more than chance lets them be. Of
    other models than SHViT a converter may have multiplied a channel's weights by a scale that followed.
    """
    exact = holds_shvit(model)
    worst: list[tuple[float, str]] = []
    gains, compared = [], 0
    for name, layer in layers(model):
        parameters = file_parameters.get(name)
        if parameters is None or parameters.weight.value.shape != layer.weight.shape:
            continue
        compared += 1
        weight = torch.as_tensor(layer.weight).detach().float()
        if not exact:
            weight = weight * _channel_gains(weight, parameters.weight.value)
        worst.append((_excess(weight, parameters.weight), f"a weight of {name}"))
        gain, sigma = _gain(weight, parameters.weight)
        gains.append((gain, sigma))
        worst.append((abs(gain) / (GAIN_SIGMAS * sigma), f"the scale of {name}'s weights"))
        bias = layer.bias
        if exact and isinstance(bias, torch.Tensor):
            if parameters.bias is not None:
                worst.append((_excess(bias.detach().float(), parameters.bias), f"a bias of {name}"))
            elif bias.detach().abs().max() > 0:
                worst.append((math.inf, f"the bias of {name}, which is missing,"))
    worst.append((_joint_gain(gains), "the scale of all weights"))
    wrong = sorted((each for each in worst if each[0] > 1), key=lambda each: -each[0])
    faults = tuple(f"{what} is {_times(excess)} what rounding explains" for excess, what in wrong)
    return Faults(compared, max(excess for excess, _ in worst), faults)


def holds_shvit(model: nn.Module) -> bool:
    """Return whether a file's weights are those of the deployed model one by one."""
    return any(isinstance(module, SHViT) for module in model.modules())


def _times(excess: float) -> str:
    return "off by more than" if math.isinf(excess) else f"off by {excess:.1f} times"


def _excess(expected: torch.Tensor, actual: Stored) -> float:
    """Return the largest error over the largest that rounding explains."""
    if expected.shape != actual.value.shape:
        return math.inf
    allowed = 1.02 * actual.rounding + FOLDING * (expected.abs() + 0.1 * expected.abs().max())
    error = (expected - actual.value).abs()
    return (error / allowed.clamp_min(1e-30)).max().item() if error.numel() else 0.0


def _gain(expected: torch.Tensor, actual: Stored) -> tuple[float, float]:
    """Return by how much the file's weights are larger as a whole than the model's, and its standard deviation."""
    power = expected.double().square().sum().clamp_min(1e-300)
    gain = ((actual.value.double() - expected.double()) * expected.double()).sum() / power
    rounding = actual.rounding.double().expand(expected.shape)
    sigma = (rounding.square() * expected.double().square()).sum().div(3).sqrt() / power
    return gain.item(), max(sigma.item(), 0.0) + FOLDING / GAIN_SIGMAS


def _joint_gain(gains: list[tuple[float, float]]) -> float:
    """Return all layers' gains together, over what chance explains."""
    if not gains:
        return 0.0
    precision = sum(1 / sigma**2 for _, sigma in gains)
    mean = sum(gain / sigma**2 for gain, sigma in gains) / precision
    return abs(mean) / (GAIN_SIGMAS / math.sqrt(precision) + FOLDING)


def _channel_gains(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """Return the factor between each output channel's weights, (out, 1, …)."""
    flat, other = expected.flatten(1).double(), actual.flatten(1).double()
    gains = (flat * other).sum(1) / flat.square().sum(1).clamp_min(1e-300)
    return gains.float().reshape(-1, *[1] * (expected.dim() - 1))


def rounding_output(layer: nn.Conv2d, parameters: LayerParameters, x: torch.Tensor) -> torch.Tensor:
    """Return what a convolution adds to its output because a file holds rounded weights and a rounded bias."""
    more = convolve(layer, x, parameters.weight.value.double() - layer.weight.detach().double())
    if parameters.bias is None or layer.bias is None:
        return more
    return more + (parameters.bias.value.double() - layer.bias.detach().double())[:, None, None]


def convolve(layer: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return a convolution's float64 output without its bias, with its own weight or another."""
    weight = layer.weight.detach().double() if weight is None else weight
    return nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


MIN_STEP = 2.0**-14  # Core ML's least scale: finer ones say nothing of a range


def range_faults(learned: Mapping[str, Range], steps: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the 8-bit tensors whose `steps`, scale and zero point, contradict their learned ranges, as sentences."""
    faults = []
    for name in learned.keys() & steps.keys():
        (low, high), (scale, zero_point) = learned[name], steps[name]
        step = (high - low) / LEVELS
        if step < MIN_STEP:
            continue
        if abs(scale / step - 1) > 2 * ROUNDING[torch.float16] or abs(zero_point + low / scale) > 0.51:
            ends = f"{-zero_point * scale:.4g} to {(LEVELS - zero_point) * scale:.4g}"
            faults.append(f"{name} is rounded between {ends} in place of {low:.4g} to {high:.4g}")
    return sorted(faults)
