"""The range of an activation that its 256 levels are best spent on.

In a wider range all values are rounded more; a narrower one cuts the outermost. Values are counted in bins, each
weighed by how much an error there costs; of all ranges in steps of an eighth of an octave the cheapest is taken.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

K = TypeVar("K", bound=Hashable)
Range = tuple[float, float]  # lowest and highest value; 0 is always within
LEVELS = 255  # steps between 256 levels
BINS = 32  # bins per octave
MIN_MAGNITUDE, OCTAVES = 2.0**-20, 37
"""The histogram's smallest magnitude, and how far it reaches: beyond float16's largest number."""
NARROWEST = 28  # eighths of an octave by which a range may be narrower than the values seen: to a tenth of them
CUT = 4.0  # cost of a cut value's squared error: its error counts double, as images to come have values further out

_magnitudes = MIN_MAGNITUDE * 2.0 ** ((torch.arange(BINS * OCTAVES, dtype=torch.float64) + 0.5) / BINS)
CENTERS = torch.cat([-_magnitudes.flip(0), _magnitudes])  # each bin's value, ascending


def histogram(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of weights per bin, float64. Zeros are left out: each range has a level for them."""
    values, weights = values.flatten(), weights.flatten()
    half = len(CENTERS) // 2
    bins = ((values.abs().clamp_min(MIN_MAGNITUDE) / MIN_MAGNITUDE).log2() * BINS).long().clamp_max(half - 1)
    bins = torch.where(values < 0, half - 1 - bins, half + bins)
    return torch.zeros(len(CENTERS), dtype=torch.float64).scatter_add_(0, bins, weights.double() * (values != 0))


def best_range(counts: torch.Tensor, symmetric: bool = False) -> Range:
    """Return (low ≤ 0, high ≥ 0) of least cost; (0, 0) where nothing but zeros was counted.

    Args:
        symmetric: low is -high, whatever the values' signs.
    """
    seen = CENTERS[counts > 0]
    if len(seen) == 0:
        return 0.0, 0.0
    narrowing = 2.0 ** (-torch.arange(NARROWEST) / 8 + 0.5 / BINS)  # from the outermost bin's outer edge
    lows = (seen.min().clamp_max(0) * narrowing).unique()
    highs = (seen.max().clamp_min(0) * narrowing).unique()
    magnitudes = seen.abs().max() * narrowing
    pairs = torch.stack([-magnitudes, magnitudes], 1) if symmetric else torch.cartesian_prod(lows, highs)
    low, high = pairs[costs(counts, *pairs.T.contiguous()).argmin()].tolist()
    return low, high


def costs(counts: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
    """Return what ranges cost, float64 (n,).

    Values within a range are off by the mean square of a uniform error, or by their own size, if that is smaller.
    Values outside are off by their distance from the range, whose square counts `CUT` times. Sums over bins up to a
    value are differences of running sums.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    running = [torch.cat([zero, (counts * CENTERS**power).cumsum(0)]) for power in range(3)]

    def total(power: int, after: torch.Tensor, until: torch.Tensor) -> torch.Tensor:
        """Return the sum of counts times values to that power, for after ≤ value ≤ until."""
        first, last = torch.searchsorted(CENTERS, after), torch.searchsorted(CENTERS, until, right=True)
        return running[power][last] - running[power][first]

    def outside(edge: torch.Tensor, after: torch.Tensor, until: torch.Tensor) -> torch.Tensor:
        squares = total(2, after, until) - 2 * edge * total(1, after, until) + edge**2 * total(0, after, until)
        return CUT * squares.clamp_min(0)

    error = ((highs - lows) / LEVELS) ** 2 / 12
    small_low, small_high = torch.maximum(-error.sqrt(), lows), torch.minimum(error.sqrt(), highs)
    small = total(2, small_low, small_high)
    large = error * (total(0, lows, highs) - total(0, small_low, small_high))
    below, above = lows.nextafter(lows - 1), highs.nextafter(highs + 1)
    end = torch.full_like(lows, torch.inf)
    return small + large + outside(lows, -end, below) + outside(highs, above, end)


def learn_ranges(
    evaluate: Callable[[torch.Tensor], tuple[Sequence[torch.Tensor], Mapping[K, torch.Tensor]]],
    batches: Iterable[torch.Tensor],
    symmetric: bool = False,
) -> dict[K, Range]:
    """Return the range that each tensor of a network is best cut to.

    Errors are weighed by the squared gradient of the outputs, with random signs: its mean is the squared error that
    they cause there, to first order.

    Args:
        evaluate: function from a batch to the outputs and to the tensors by any key; all with gradients.
        batches: inputs of the network.
        symmetric: as in `best_range`.
    """
    generator = torch.Generator().manual_seed(0)
    counts: dict[K, torch.Tensor] = {}
    for batch in batches:
        outputs, values = evaluate(batch.clone().requires_grad_())
        signs = [torch.randint(0, 2, out.shape, generator=generator) * 2.0 - 1 for out in outputs]
        total = torch.stack([(out * sign).sum() for out, sign in zip(outputs, signs, strict=True)]).sum()
        gradients = torch.autograd.grad(total, list(values.values()))
        for (key, value), gradient in zip(values.items(), gradients, strict=True):
            counts[key] = counts.get(key, 0) + histogram(value.detach(), gradient.double().square())
    return {key: best_range(count, symmetric) for key, count in counts.items()}


def flat_outputs(outputs: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Return all outputs as one vector, each scaled to unit power."""
    maps = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return torch.cat([each.flatten() / each.square().mean().sqrt().clamp_min(1e-12) for each in maps])
