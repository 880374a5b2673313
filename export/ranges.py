"""Which range of an activation its 256 levels are best spent on.

Wider, and all values are rounded more; narrower, and the outermost are cut. Values are counted in bins, each weighed by
how much an error there costs; of all ranges in steps of an eighth of an octave the cheapest is taken.
"""

import torch

LEVELS = 255  # steps between 256 levels
BINS = 32  # per octave
LEAST, OCTAVES = 2.0**-20, 37  # up to beyond float16's largest
NARROWEST = 28  # eighths of an octave: ranges down to a tenth of what was seen
CUT = 4.0  # photographs to come have values further out than those seen; a cut value's error counts double

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
    lows = (seen.min().clamp_max(0) * narrowing).unique().tolist()
    highs = (seen.max().clamp_min(0) * narrowing).unique().tolist()
    return min(((low, high) for low in lows for high in highs), key=lambda ends: _cost(counts, *ends))


def _cost(counts: torch.Tensor, low: float, high: float) -> float:
    rounding = CENTERS.square().clamp_max(((high - low) / LEVELS) ** 2 / 12)  # mean square of a uniform error
    cut = (CENTERS - CENTERS.clamp(low, high)).square() * CUT
    return float(counts @ torch.where(cut > 0, cut, rounding))
