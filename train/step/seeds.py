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
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


def derive_seed(*key: int) -> int:
    """Return a seed of 32 bits from several integers."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


AUGMENTATION, MIXING, STREAM, SAMPLING = 1, 2, 3, 4  # purposes of a seed, so that no two purposes share one
