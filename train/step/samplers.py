"""Samplers: the images of each batch, as a function of seed and step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from shvit.errors import InputError

from .seeds import SAMPLING, derive_seed

Key = tuple[int, int]
"""(position in the run, index of the image)."""


class StepSampler:
    """Samples the images of each step's batch, over all processes.

    Args:
        length: number of images.
        batch_size: images in an optimizer step, over all processes and accumulation steps.
        repeats: copies of each image for repeated augmentation (timm's sampler; copies are neighbors, so that they go
            to different processes).
        weights: relative probability of each image, by which PyTorch's sampler draws an epoch's images with
            replacement; None to take each image once.
    """

    def __init__(self, length: int, batch_size: int, repeats: int, seed: int, weights: Sequence[float] | None = None):
        self.batch_size = batch_size
        self.seed = seed
        self.sampler: DistributedSampler | RepeatAugSampler
        if repeats > 1:
            self.sampler = RepeatAugSampler(range(length), num_replicas=1, rank=0, num_repeats=repeats)
        else:
            self.sampler = DistributedSampler(range(length), num_replicas=1, rank=0)  # type: ignore[arg-type]
        self.steps_per_epoch = len(self.sampler) // batch_size
        if self.steps_per_epoch < 1:
            raise InputError(f"{len(self.sampler)} training images in an epoch are fewer than the batch of "
                             f"{batch_size}; give a smaller --batch-size")  # fmt: skip
        self.weights = weights
        self._epoch = -1
        self._indices: list[int] = []

    def batch(self, step: int) -> list[Key]:
        """Return the images of a step, counted from the beginning of the run."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self.sampler.set_epoch(1_000_003 * self.seed + epoch)
            self._epoch, self._indices = epoch, self._of_weight(epoch, list(self.sampler))
        indices = self._indices[within * self.batch_size : (within + 1) * self.batch_size]
        return [(step * self.batch_size + position, index) for position, index in enumerate(indices)]

    def _of_weight(self, epoch: int, places: list[int]) -> list[int]:
        """Return an epoch's images: those at `places` of a list drawn by weight, which is as long as the dataset."""
        if self.weights is None:
            return places
        generator = torch.Generator().manual_seed(derive_seed(self.seed, SAMPLING, epoch))
        drawn = list(WeightedRandomSampler(self.weights, len(self.weights), generator=generator))
        return [drawn[place] for place in places]


def micro_batch_sizes(batch_size: int, accum_steps: int, multiple: int = 1) -> list[int]:
    """Split a process's batch into `accum_steps` sizes, each a multiple of `multiple`, as equal as possible."""
    smallest, larger = divmod(batch_size // multiple, accum_steps)
    return [multiple * (smallest + (micro_step < larger)) for micro_step in range(accum_steps)]


@dataclass(frozen=True)
class MicroBatchSampler:
    """One process's micro-batches of the steps from `start` to `end`; a batch sampler for a DataLoader."""

    sampler: StepSampler
    start: int
    end: int
    rank: int
    world_size: int
    accum_steps: int
    multiple: int = 1
    """As in `micro_batch_sizes`."""

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.end):
            keys = iter(self.sampler.batch(step)[self.rank :: self.world_size])
            for size in micro_batch_sizes(self.sampler.batch_size // self.world_size, self.accum_steps, self.multiple):
                yield list(islice(keys, size))

    def __len__(self) -> int:
        return (self.end - self.start) * self.accum_steps
