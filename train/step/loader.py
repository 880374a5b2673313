"""Training batches: the order of images, their augmentation, and what happens on the device.

All of it is a function of the recipe and the step, so that a run goes on exactly where it stopped, in the middle of an
epoch too: which images stand in a step's batch follows from seed and epoch, how each is augmented from seed and
place in the run, and how the batch is mixed from seed, step and process. Nothing depends on the number of workers.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from shvit.errors import InputError, first_line

from ..data.datasets import Images, ignore_interrupt
from ..data.streams import Stream, open_stream
from ..distributed import World
from ..recipe import Augment, Recipe

Key = tuple[int, int]
"""(place in the run, index of the image)."""


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


# --- order ------------------------------------------------------------------------------------------------------------


class Order:
    """Which images stand in each step's batch, over all processes.

    Args:
        length: number of images.
        batch_size: of an optimizer step, over all processes and turns.
        repeats: of repeated augmentation (timm's sampler; copies of an image are neighbors, so they go to
            different processes).
    """

    def __init__(self, length: int, batch_size: int, repeats: int, seed: int):
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
        self._epoch = -1
        self._indices: list[int] = []

    def batch(self, step: int) -> list[Key]:
        """The images of a step, counted from the beginning of the run."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self.sampler.set_epoch(1_000_003 * self.seed + epoch)
            self._epoch, self._indices = epoch, list(self.sampler)
        indices = self._indices[within * self.batch_size : (within + 1) * self.batch_size]
        return [(step * self.batch_size + place, index) for place, index in enumerate(indices)]


def micro_batch_sizes(share: int, turns: int, multiple: int = 1) -> list[int]:
    """A process's share of a batch in `turns` parts, each a multiple of `multiple`, as equal as they can be."""
    least, larger = divmod(share // multiple, turns)
    return [multiple * (least + (turn < larger)) for turn in range(turns)]


@dataclass(frozen=True)
class Share:
    """One process's images of the steps from `start` to `end`, in turns; a batch sampler for a DataLoader."""

    order: Order
    start: int
    end: int
    rank: int
    world_size: int
    turns: int
    multiple: int = 1
    """As in `micro_batch_sizes`."""

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.end):
            mine = iter(self.order.batch(step)[self.rank :: self.world_size])
            for size in micro_batch_sizes(self.order.batch_size // self.world_size, self.turns, self.multiple):
                yield list(islice(mine, size))

    def __len__(self) -> int:
        return (self.end - self.start) * self.turns


# --- images ------------------------------------------------------------------------------------------------------


Problem = tuple[str, int, int]
"""(what is said of a damaged image, its index, how many images it stands for)."""


@dataclass(frozen=True)
class Batch:
    """What a loader gives: augmented images as bytes, and what went wrong with others."""

    images: torch.Tensor
    """(B, 3, H, W), uint8."""
    targets: torch.Tensor
    """(B,), int64."""
    problems: tuple[Problem, ...] = ()
    """Damaged images, whose places others have taken."""

    def pin_memory(self) -> "Batch":
        """Called by DataLoader."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.problems)


Item = tuple[np.ndarray, int, tuple[Problem, ...]]
Transform = Callable[[Image.Image], np.ndarray]
MAX_OPERATIONS = 16  # of a policy, on one image
TRIALS = 5  # of an augmentation, before it is used
BLACK = Image.new("RGB", (8, 8))


def collate(items: Sequence[Item]) -> Batch:
    images, targets = fast_collate([(image, target) for image, target, _ in items])
    return Batch(images, targets, tuple(problem for _, _, problems in items for problem in problems))


class Augmented(Dataset):
    """Images by `Key`, each augmented by generators that are seeded for its place in the run.

    A damaged one's place is taken by the next in order, for at most `tries` of them; then the place stays black.
    """

    def __init__(self, dataset: Images, transform_at: Callable[[int], Transform], seed: int, tries: int):
        self.dataset = dataset
        self.transform_at = transform_at
        self.seed = seed
        self.tries = tries

    def __getitem__(self, key: Key) -> Item:
        place, index = key
        problems: list[Problem] = []
        image, target = BLACK, 0
        while len(problems) <= self.tries:
            try:
                image, target = self.dataset[index]
                if not 0 <= target < (len(self.dataset.classes) or target + 1):
                    raise InputError(f"{self.dataset.name(index)}: of class {target}, and there are "
                                     f"{len(self.dataset.classes)}, counted from 0")  # fmt: skip
                break
            except InputError as error:
                problems.append((str(error), index, 1))
                index = (index + 1) % len(self.dataset)
        transform = self.transform_at(place)
        seed_cpu_generators(self.seed, AUGMENTATION, place)
        return transform(image), target, tuple(problems)


class Streamed(IterableDataset):
    """A stream's images of one epoch, each augmented by generators that are seeded for its place."""

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


def create_train_transform(augment: Augment, img_size: int) -> Transform:
    """timm's training transform: PIL RGB image → (3, H, W) uint8; the rest is `DeviceAugment`'s.

    Raises:
        InputError: a name is not known, or the policy cannot be carried out.
    """
    counts = re.findall(r"(?:^|-)([nwd])(\d+)", augment.auto_augment or "")
    if any(len(count) > 2 or int(count) > MAX_OPERATIONS for _, count in counts):
        raise InputError(f"--augment.auto-augment {str(augment.auto_augment)[:80]}: more than {MAX_OPERATIONS} "
                         "operations on an image; see recipe s1")  # fmt: skip
    try:
        transform = create_transform(
            (3, img_size, img_size),
            is_training=True,
            use_prefetcher=True,  # bytes, not yet normalized
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            interpolation=augment.interpolation,
        )
    except Exception as error:  # each policy of timm has its own
        raise InputError(f"--augment.auto-augment {augment.auto_augment} and --augment.interpolation "
                         f"{augment.interpolation} are not what timm knows; see recipe s1") from error  # fmt: skip
    for part in transform.transforms:
        for operation in getattr(part, "ops", None) or chain(*getattr(part, "policy", ())):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
    try:
        for _ in range(TRIALS):
            transform(BLACK.resize((img_size, img_size)))
    except Exception as error:  # each operation has its own
        raise InputError(f"--augment.auto-augment {augment.auto_augment} cannot be carried out "
                         f"({first_line(error)}); see recipe s1") from error  # fmt: skip
    return transform


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, where 0 bits, which timm's policies ask for and Pillow 13 refuses, make a black image as before."""
    return auto_augment.posterize(image, bits) if bits > 0 else image.point(lambda value: 0)


class Feed:
    """Batches of one process, from any step of the run on.

    Args:
        dataset: the training images; None for a stream, which is opened anew for each epoch.
        turns: batches of this process in one optimizer step.
    """

    def __init__(self, recipe: Recipe, dataset: Images | None, world: World, turns: int):
        self.recipe = recipe
        self.dataset = dataset
        self.world = world
        self.turns = turns
        sizes = {recipe.img_size_at(epoch) for epoch in range(recipe.epochs)}
        self.transforms = {size: create_train_transform(recipe.augment, size) for size in sizes}
        if dataset is not None:
            self.length = len(dataset)
            self.order = Order(self.length, recipe.batch_size, recipe.augment.repeats, recipe.seed)
            self.steps_per_epoch = self.order.steps_per_epoch
        else:
            if recipe.augment.repeats > 1:
                raise InputError("repeated augmentation needs images in any order, and a stream has its own; "
                                 "give --augment.repeats 1")  # fmt: skip
            self.length = len(self._open_stream(0))
            self.steps_per_epoch = self.length // recipe.batch_size
            if self.steps_per_epoch < 1:
                raise InputError(f"the stream has {self.length} images, fewer than the batch of "
                                 f"{recipe.batch_size}; give a smaller --batch-size")  # fmt: skip

    @property
    def sizes(self) -> list[int]:
        """Images in each of this process's batches of a step."""
        return micro_batch_sizes(self.recipe.batch_size // self.world.size, self.turns, self.recipe.pairs)

    def batches(self, start: int, end: int) -> Iterator[Batch]:
        """The batches of the steps from `start` to `end`, `turns` for each."""
        if self.dataset is None:
            return self._streamed(start, end)
        tries = self.recipe.data.max_corrupt
        augmented = Augmented(self.dataset, self._transform_at, self.recipe.seed, tries)
        share = Share(self.order, start, end, self.world.rank, self.world.size, self.turns, self.recipe.pairs)
        return iter(DataLoader(augmented, batch_sampler=share, **self._options()))

    def _transform_at(self, place: int) -> Transform:
        """The transform of the epoch that a place in the run belongs to."""
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
        seed = int(np.random.SeedSequence((self.recipe.seed, STREAM, epoch)).generate_state(1)[0]) // 2
        stream = open_stream(self.recipe.data, "train", is_training=True, batch_size=self.sizes[0], seed=seed)
        stream.reader.set_loader_cfg(num_workers=self.recipe.data.workers)
        stream.reader.set_epoch(epoch)
        return stream

    def _streamed(self, start: int, end: int) -> Iterator[Batch]:
        """A stream is read from the beginning of its epoch; what came before `start` is passed over."""
        step = start
        while step < end:
            epoch, done = divmod(step, self.steps_per_epoch)
            key = (self.recipe.seed, STREAM, epoch, self.world.rank)
            seed_generators(*key)  # from which DataLoader draws its workers' seeds
            transform = self.transforms[self.recipe.img_size_at(epoch)]
            streamed = Streamed(self._open_stream(epoch), transform, key)
            loader = DataLoader(streamed, self.sizes[0], drop_last=True, **self._options())
            count = min(end - step, self.steps_per_epoch - done) * self.turns
            found = 0
            for batch in islice(loader, done * self.turns, done * self.turns + count):
                found += 1
                yield batch
            if found < count:
                raise InputError(f"{self.recipe.data.name}: the stream ended after {done * self.turns + found} batches "
                                 f"of epoch {epoch + 1}, and {done * self.turns + count} were announced; correct its "
                                 "count of images")  # fmt: skip
            step += count // self.turns


# --- on the device ----------------------------------------------------------------------------------------------------


class DeviceAugment:
    """Bytes to what the model is fed: normalized, erased and mixed by timm's pieces, on the device.

    Returns (images float32 (B, 3, H, W), targets: int64 (B,), or (B, classes) where batches are mixed).
    """

    def __init__(self, recipe: Recipe, num_classes: int, mean: Sequence[float], std: Sequence[float], world: World):
        augment = recipe.augment
        self.device = world.device
        self.memory_format = torch.channels_last if recipe.compute.channels_last else torch.contiguous_format
        self.key = (recipe.seed, MIXING, world.rank)
        self.mean, self.std = (
            255 * torch.tensor(value, device=self.device)[:, None, None] for value in (list(mean), list(std))
        )
        self.erase = None
        if augment.random_erasing > 0:
            self.erase = RandomErasing(augment.random_erasing, mode="pixel", device=str(self.device))
        self.mix = None
        if recipe.mixes:
            self.mix = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                label_smoothing=augment.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, batch: Batch, step: int, turn: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Seeds this process's generators for the step, which dropout draws from as well."""
        seed_generators(*self.key, step, turn)
        images = batch.images.to(self.device, non_blocking=True).to(torch.float32, memory_format=self.memory_format)
        images = images.sub_(self.mean).div_(self.std)
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.erase is not None:
            images = self.erase(images)
        return self.mix(images, targets) if self.mix is not None else (images, targets)
