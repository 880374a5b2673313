"""Seeding of random generators by a purpose and a position in the run."""

import random

import numpy as np
import torch


def seed_generators(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (CUDA's too) from several integers."""
    torch.manual_seed(seed_cpu_generators(*key))


def seed_cpu_generators(*key: int) -> int:
    """Seed the generators on the CPU alone, which augmentation draws from, and return the seed.

    `torch.manual_seed` takes a millisecond where a device is not in use: it notes each call's stack for later.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


AUGMENTATION, MIXING, STREAM = 1, 2, 3  # purposes of a seed, so that no two purposes share one
