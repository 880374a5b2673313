"""Ranges of activations against NumPy."""

import numpy as np
import pytest
import torch

from shvit.export.quantization.ranges import LEVELS, best_range, histogram


def rounding_error(x: np.ndarray, low: float, high: float) -> float:
    """Mean square error of NumPy's rounding to 256 levels."""
    step = (high - low) / LEVELS
    zero = np.round(-low / step)
    rounded = (np.clip(np.round(x / step) + zero, 0, LEVELS) - zero) * step
    return float(np.square(rounded - x).mean())


@pytest.mark.parametrize("kind", ["even", "normal", "behind a ReLU", "one outlier"])
def test_range_is_about_the_best_that_numpy_finds(kind):
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    if kind == "even":
        x = np.random.default_rng(0).uniform(-1, 3, 100_000).astype(np.float32)
    elif kind == "behind a ReLU":
        x = np.maximum(x, 0)
    elif kind == "one outlier":
        x[7] = 40
    low, high = best_range(histogram(torch.from_numpy(x), torch.ones(len(x))))
    assert low <= 0 <= high
    assert low == 0 if kind == "behind a ReLU" else low < 0
    trials = [(x.min() * a, x.max() * b) for a in np.linspace(0.1, 1, 19) for b in np.linspace(0.1, 1, 19)]
    best = min(rounding_error(x, min(lo, 0), hi) for lo, hi in trials)
    assert rounding_error(x, low, high) < 1.5 * best  # cut values count double on purpose
    assert rounding_error(x, low, high) <= 1.05 * rounding_error(x, min(x.min(), 0), x.max())


def test_range_leaves_out_what_costs_nothing():
    x = torch.linspace(-1, 1, 1001)
    x[3] = -50.0
    weights = torch.ones(1001)
    weights[3] = 1e-9
    low, _ = best_range(histogram(x, weights))
    assert low > -10
    assert best_range(histogram(torch.zeros(9), torch.ones(9))) == (0.0, 0.0)
