"""Random generators, seeded from a purpose and a place in the run."""

import random

import numpy as np
import torch


def seed_generators(*key: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators (CUDA's too) from a few whole numbers."""
    torch.manual_seed(seed_cpu_generators(*key))


def seed_cpu_generators(*key: int) -> int:
    """The same without those of devices, which an image's augmentation does not draw from; returns the seed.

    `torch.manual_seed` takes a millisecond where a device is not in use: it notes each call's stack for later.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


AUGMENTATION, MIXING, STREAM = 1, 2, 3  # what a seed is for, so that no two purposes share one
