"""The training data loader.

Batches are a function of the recipe and the step, so that a run resumes exactly where it stopped, also in the middle
of an epoch: the images of a step's batch follow from seed and epoch, the augmentation of each from seed and its
position in the run, and mixing from seed, step and process. Nothing depends on the number of workers.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from shvit.errors import InputError

from ..data.datasets import Images
from ..data.eval_loader import ignore_interrupt
from ..data.pixels.formats import Decoded
from ..data.pixels.preprocessing import Preprocessing, resolve_preprocessing
from ..data.streams import Stream, open_stream
from ..distributed import World
from ..labels.balance import image_weights
from ..labels.statistics import LabelStatistics, count_classes, label_statistics
from ..recipe import Recipe
from .augment import Transform, create_train_transform
from .batch import Batch, Item, Problem, collate
from .samplers import Key, MicroBatchSampler, StepSampler, micro_batch_sizes
from .seeds import AUGMENTATION, STREAM, derive_seed, seed_cpu_generators, seed_generators


class Augmented(Dataset):
    """Images by `Key`, each augmented by generators that are seeded for its position in the run.

    A damaged image is replaced by the next one, at most `tries` times; then by a black image.
    """

    def __init__(self, dataset: Images, transform_at: Callable[[int], Transform], seed: int, tries: int):
        self.dataset = dataset
        self.transform_at = transform_at
        self.seed = seed
        self.tries = tries

    def __getitem__(self, key: Key) -> Item:
        place, index = key
        image, target, problems = self._read(index)
        transform = self.transform_at(place)
        seed_cpu_generators(self.seed, AUGMENTATION, place)
        return transform(image), target, problems

    def _read(self, index: int) -> tuple[Decoded, int | np.ndarray, tuple[Problem, ...]]:
        """Return the first image from `index` on that can be read, its target, and the problems with those before."""
        problems: list[Problem] = []
        while len(problems) <= self.tries:
            try:
                image, target = self.dataset[index]
                self.dataset.check_target(index, target)
                return image, target, tuple(problems)
            except InputError as error:
                problems.append((str(error), index, 1))
            index = (index + 1) % len(self.dataset)
        return self.dataset.pixels.blank, self.dataset.blank_target, tuple(problems)


class Streamed(IterableDataset):
    """A stream's images of one epoch, each augmented by generators that are seeded for its position."""

    def __init__(self, stream: Stream, transform: Transform, key: tuple[int, ...]):
        self.stream = stream
        self.transform = transform
        self.key = key

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker = info.id if info else 0
        place, problems = 0, list[Problem]()
        for image, target, problem, missing in self.stream.reads():
            if problem:
                problems.append((problem, -1, max(missing, 1)))
            if image is None or target < 0:
                continue
            seed_cpu_generators(*self.key, AUGMENTATION, worker, place)
            yield self.transform(image), target, tuple(problems)
            place += 1
            problems.clear()


class TrainLoader:
    """Training batches of one process, from any step of the run.

    Its `statistics` are of the labels of all training images.

    Args:
        dataset: the training images; None for a stream, which is opened again for each epoch.
        accum_steps: batches of this process in an optimizer step.
        preprocessing: by default that of images in RGB.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Images | None,
        world: World,
        accum_steps: int,
        preprocessing: Preprocessing | None = None,
    ):
        self.recipe = recipe
        self.dataset = dataset
        self.world = world
        self.accum_steps = accum_steps
        preprocessing = preprocessing or resolve_preprocessing(recipe)
        sizes = {recipe.img_size_at(epoch) for epoch in range(recipe.epochs)}
        self.transforms = {
            size: create_train_transform(recipe.augment, preprocessing.at(size), recipe.data.crop_mode)
            for size in sizes
        }
        if dataset is not None:
            self.length = len(dataset)
            self.statistics = label_statistics(dataset, recipe)
            weights = None
            if recipe.balanced_sampling > 0:
                weights = image_weights(*count_classes(dataset), recipe.balanced_sampling)
            self.sampler = StepSampler(self.length, recipe.batch_size, recipe.augment.repeats, recipe.seed, weights)
            self.steps_per_epoch = self.sampler.steps_per_epoch
        else:
            if recipe.augment.repeats > 1:
                raise InputError("repeated augmentation needs random access to images, and a stream has a fixed order; "
                                 "give --augment.repeats 1")  # fmt: skip
            self.length = len(self._open_stream(0))
            self.statistics = LabelStatistics(self.length)
            self.steps_per_epoch = self.length // recipe.batch_size
            if self.steps_per_epoch < 1:
                raise InputError(f"the stream has {self.length} images, fewer than the batch of "
                                 f"{recipe.batch_size}; give a smaller --batch-size")  # fmt: skip

    @property
    def sizes(self) -> list[int]:
        """Sizes of this process's batches of a step."""
        return micro_batch_sizes(self.recipe.batch_size // self.world.size, self.accum_steps, self.recipe.pairs)

    def batches(self, start: int, end: int) -> Iterator[Batch]:
        """Yield the batches of the steps from `start` to `end`, `accum_steps` for each."""
        if self.dataset is None:
            return self._streamed(start, end)
        tries = self.recipe.data.max_corrupt
        augmented = Augmented(self.dataset, self._transform_at, self.recipe.seed, tries)
        rank, size = self.world.rank, self.world.size
        sampler = MicroBatchSampler(self.sampler, start, end, rank, size, self.accum_steps, self.recipe.pairs)
        return iter(DataLoader(augmented, batch_sampler=sampler, **self._options()))

    def _transform_at(self, place: int) -> Transform:
        """Return the transform of the epoch that a position in the run belongs to."""
        epoch = place // (self.recipe.batch_size * self.steps_per_epoch)
        return self.transforms[self.recipe.img_size_at(epoch)]

    def _options(self) -> dict[str, Any]:
        workers = self.recipe.data.workers
        return {
            "num_workers": workers,
            "collate_fn": collate,
            "pin_memory": self.world.device.type == "cuda",
            "worker_init_fn": ignore_interrupt,
            "prefetch_factor": 4 if workers else None,
        }

    def _open_stream(self, epoch: int) -> Stream:
        seed = derive_seed(self.recipe.seed, STREAM, epoch) // 2
        stream = open_stream(self.recipe.data, "train", is_training=True, batch_size=self.sizes[0], seed=seed)
        stream.reader.set_loader_cfg(num_workers=self.recipe.data.workers)
        stream.reader.set_epoch(epoch)
        return stream

    def _streamed(self, start: int, end: int) -> Iterator[Batch]:
        """Yield batches of a stream, read from the beginning of its epoch; those before `start` are skipped."""
        step = start
        while step < end:
            epoch, done = divmod(step, self.steps_per_epoch)
            key = (self.recipe.seed, STREAM, epoch, self.world.rank)
            seed_generators(*key)  # from which DataLoader draws its workers' seeds
            transform = self.transforms[self.recipe.img_size_at(epoch)]
            streamed = Streamed(self._open_stream(epoch), transform, key)
            loader = DataLoader(streamed, self.sizes[0], drop_last=True, **self._options())
            before = done * self.accum_steps
            count = min(end - step, self.steps_per_epoch - done) * self.accum_steps
            found = 0
            for batch in islice(loader, before, before + count):
                found += 1
                yield batch
            if found < count:
                raise InputError(f"{self.recipe.data.name}: the stream ended after {before + found} batches of epoch "
                                 f"{epoch + 1}, and {before + count} were announced; correct that count")  # fmt: skip
            step += count // self.accum_steps
