"""Which range of an activation its 256 levels are best spent on.

Wider, and all values are rounded more; narrower, and the outermost are cut. Values are counted in bins, each weighed by
how much an error there costs; of all ranges in steps of an eighth of an octave the cheapest is taken.
"""

import torch

Range = tuple[float, float]
"""Lowest and highest value, 0 always within."""
LEVELS = 255  # steps between 256 levels
BINS = 32  # per octave
LEAST, OCTAVES = 2.0**-20, 37  # up to beyond float16's largest
NARROWEST = 28  # eighths of an octave: ranges down to a tenth of what was seen
CUT = 4.0  # images to come have values further out than those seen; a cut value's error counts double

_magnitudes = LEAST * 2.0 ** ((torch.arange(BINS * OCTAVES, dtype=torch.float64) + 0.5) / BINS)
CENTERS = torch.cat([-_magnitudes.flip(0), _magnitudes])
"""Each bin's value, ascending."""


def histogram(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of the weights per bin, float64; without zeros, which cost nothing: each range has a level for them."""
    values, weights = values.flatten(), weights.flatten()
    half = len(CENTERS) // 2
    bins = ((values.abs().clamp_min(LEAST) / LEAST).log2() * BINS).long().clamp_max(half - 1)
    bins = torch.where(values < 0, half - 1 - bins, half + bins)
    return torch.zeros(len(CENTERS), dtype=torch.float64).scatter_add_(0, bins, weights.double() * (values != 0))


def best_range(counts: torch.Tensor) -> tuple[float, float]:
    """(low ≤ 0, high ≥ 0) of least cost; (0, 0) where nothing but zeros was counted."""
    seen = CENTERS[counts > 0]
    if len(seen) == 0:
        return 0.0, 0.0
    narrowing = 2.0 ** (-torch.arange(NARROWEST) / 8 + 0.5 / BINS)  # from the outermost bin's outer edge
    lows = (seen.min().clamp_max(0) * narrowing).unique()
    highs = (seen.max().clamp_min(0) * narrowing).unique()
    pairs = torch.cartesian_prod(lows, highs)
    low, high = pairs[costs(counts, *pairs.T.contiguous()).argmin()].tolist()
    return low, high


def costs(counts: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
    """What ranges cost: values within are off by the mean square of a uniform error, or by their own size, if smaller.

    Values outside are off by their distance from the range, which counts `CUT` times. All are float64 (n,); sums over
    bins up to a value are differences of running sums.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    running = [torch.cat([zero, (counts * CENTERS**power).cumsum(0)]) for power in range(3)]

    def total(power: int, after: torch.Tensor, until: torch.Tensor) -> torch.Tensor:
        """Of counts times values to that power, for after ≤ value ≤ until."""
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
