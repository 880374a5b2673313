"""Layers to exclude from quantization: those whose rounding adds the most noise, and as few as are needed."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import nn

from ..wrappers import layers
from .ranges import LEVELS, best_range, flat_outputs, histogram


@torch.inference_mode()
def layer_noise(model: nn.Module, batch: torch.Tensor) -> dict[str, float]:
    """Return the noise that each layer alone adds to the outputs when it is in int8, the noisiest first.

    Args:
        model: deployed, in eval mode.
        batch: normalized images (B, C, H, W).

    Returns:
        The power of the outputs' change divided by that of the outputs, by the layer's dotted name.
    """
    reference = flat_outputs(model(batch))
    signal = reference.square().sum()
    noise = {}
    for name, layer in list(layers(model)):
        weight = layer.weight.data
        hook = layer.register_forward_pre_hook(lambda _, inputs: (_rounded(inputs[0]),))
        layer.weight.data = _rounded_weight(weight)  # type: ignore[arg-type]
        try:
            noise[name] = ((flat_outputs(model(batch)) - reference).square().sum() / signal).item()
        finally:
            hook.remove()
            layer.weight.data = weight
    return dict(sorted(noise.items(), key=lambda item: -item[1]))


def _rounded(x: torch.Tensor) -> torch.Tensor:
    low, high = best_range(histogram(x, torch.ones_like(x)))
    if high <= low:
        return x
    step = (high - low) / LEVELS
    return torch.fake_quantize_per_tensor_affine(x, step, round(-low / step), 0, LEVELS)


def _rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    step = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / 127
    return torch.fake_quantize_per_channel_affine(weight, step, torch.zeros_like(step, dtype=torch.int32), 0, -127, 127)


def expected_count(noise: Sequence[float], allowed: float) -> int:
    """Return how many of the noisiest layers, first in `noise`, to exclude so that the rest is `allowed` of the sum."""
    sums = list(accumulate(reversed(noise)))[::-1]  # of the layers from each one on
    return next((count for count, rest in enumerate(sums) if rest <= sum(noise) * min(allowed, 1.0)), len(noise))


def smallest_passing(holds: Callable[[int], bool], limit: int, guess: int = 1) -> int:
    """Return the smallest number from 1 to `limit` for which `holds`; `limit`, which is tried too, where none does.

    The search assumes that whatever holds for a number holds for every larger one: it begins at `guess`, goes on in
    steps that double until the border lies between two numbers, then halves the interval. `holds` was true of the
    number returned when it was last asked.
    """
    passing, failing, step = limit + 1, 0, 1
    number = guess
    while passing - failing > 1:
        if holds(number):
            passing, number = number, max(number - step, failing + 1)
        else:
            failing, number = number, min(number + step, limit, passing - 1)
        step *= 2
        if passing <= limit and failing:
            number = (passing + failing) // 2
    return min(passing, limit)
