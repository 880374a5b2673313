"""Reader of WebDataset shards, tar files of images with their classes, which counts what is missing.

timm's reader passes names of shards to webdataset's opener, which also runs commands and other programs, and skips
what it cannot read with a warning. This one opens only files, and reports each sample that is lost. The order of
shards and samples is that of timm's reader.
"""

import math
import random
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from timm.data.readers.reader import Reader
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import get_worker_info

from shvit.documents import load_json, parse_json, parse_model
from shvit.errors import InputError, first_line
from shvit.files import is_file, is_folder, open_file

from .locations import expand_braces, shard_paths
from .tars import MAX_MEMBER, Member, check_member, check_name

INFO_NAMES = ("_info.json", "info.json")
IMAGE_KEYS = ("jpg", "png", "webp", "jpeg")
READ_KEYS = (*IMAGE_KEYS, "cls", "json")
"""Suffixes that are read; a sample may have others, of any number and size."""
MAX_SAMPLES = 10**12
SHARD_BUFFER, SHARD_INITIAL = 500, 100
SAMPLE_BUFFER, SAMPLE_INITIAL = 8192, 2048
KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Sample:
    """An encoded image and its class."""

    name: str
    """Name in messages."""
    image: bytes
    target: int
    """Class index; negative without a class, for an image that does not count."""


@dataclass(frozen=True)
class Lost:
    """A sample or a shard that could not be read."""

    message: str
    missing: int = 0
    """Number of announced images that are missing from a shard; 0 for a damaged sample."""


@dataclass(frozen=True)
class _Split:
    """A split in timm's _info.json."""

    num_samples: int
    filenames: list[str]
    shard_lengths: list[int] = field(default_factory=list)
    alt_label: str = ""


def has_info(folder: Path) -> bool:
    """Return whether a folder has a file that describes shards."""
    return any(is_file(folder / name) for name in INFO_NAMES)


class Shards(Reader):
    """The samples of a split's shards, read sequentially, as a timm reader.

    Iterating yields a `Sample` or a `Lost` for each. In training, a pass continues until each worker has read its share
    of the announced samples.

    Args:
        root: folder of the shards.
        split: a split of its _info.json; or a pattern with their count, such as 'train-{0000..0099}.tar|128000'.
        batch_size: batch size of one process, to a multiple of which a training pass is rounded up.
        seed: random seed of the order of shards and samples.

    Raises:
        InputError: the folder, the split or a shard's name cannot be used.
    """

    def __init__(self, root: Path, split: str, is_training: bool = False, batch_size: int = 1, seed: int = 42):
        super().__init__()
        if not is_folder(root):
            raise InputError(f"{root}: no such folder of shards")
        self.is_training, self.batch_size, self.seed = is_training, batch_size, seed
        info = _find_split(root, split)
        self.paths = shard_paths(root, info.filenames, f"{root}, {split}")
        self.lengths: list[int] | list[None] = info.shard_lengths or [None] * len(self.paths)
        self.num_samples, self.alt_label = info.num_samples, info.alt_label
        self.class_to_idx: dict[str, int] = {}
        self.rank, self.replicas, self.num_workers = 0, 1, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.replicas = dist.get_rank(), dist.get_world_size()
        self.epoch = SharedCount()

    def set_epoch(self, count: int) -> None:
        """Set the epoch, which the order of shards depends on."""
        self.epoch.value = count

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Set the number of a loader's workers, which the length of a training pass depends on."""
        self.num_workers = max(1, num_workers or 1)

    @property
    def is_single_pass(self) -> bool:
        """True if each sample is read once, over all processes and workers."""
        return not self.is_training and self.replicas == 1

    def __iter__(self) -> Iterator[Sample | Lost]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, self.num_workers)
        shard = (self.rank * workers + worker, self.replicas * workers)
        rng = random.Random(info.seed if info else self.seed)
        if self.is_single_pass:
            yield from self._one_pass(*shard, rng)
            return
        wanted = math.ceil(self.num_samples / shard[1])
        if self.is_training:
            wanted = math.ceil(wanted / self.batch_size) * self.batch_size
        found, before = 0, -1
        while before < found < wanted:  # ends after a pass without a sample
            before = found
            for each in self._one_pass(*shard, rng):
                yield each
                found += isinstance(each, Sample)
                if found == wanted:
                    return

    def _one_pass(self, start: int, step: int, rng: random.Random) -> Iterator[Sample | Lost]:
        order: Iterable[int] = range(len(self.paths))
        if self.is_training:
            order = _shuffled(iter(order), SHARD_BUFFER, SHARD_INITIAL, random.Random(self.seed + self.epoch.value))
        samples = chain.from_iterable(self._read(shard) for shard in islice(order, start, None, step))
        yield from _shuffled(samples, SAMPLE_BUFFER, SAMPLE_INITIAL, rng) if self.is_training else samples

    def _read(self, shard: int) -> Iterator[Sample | Lost]:
        path, length = self.paths[shard], self.lengths[shard]
        count, problem = 0, ""
        try:
            for name, parts in _grouped(path):
                if (sample := self._sample(f"{path.name}/{name}", parts)) is not None:
                    count += 1
                    yield sample
        except InputError as error:
            problem = str(error)
        except Exception as error:  # tarfile and each compression have their own types
            problem = f"{path}: a damaged shard ({first_line(error)})"
        lost = max(0, (length or 0) - count)
        if problem or lost:
            counted = "" if length is None else f"; {lost} of its {length} images are missing"
            yield Lost((problem or f"{path}: ends early") + counted, max(lost, 1))

    def _sample(self, name: str, parts: dict[str, bytes | None]) -> Sample | Lost | None:
        """Return the sample of the files of one name; None if they are not a sample."""
        image = next((parts[key] for key in IMAGE_KEYS if parts.get(key)), None)
        label = parts.get("json" if self.alt_label else "cls")
        if image is None and label is None:
            return None
        if image is None:
            return Lost(f"{name}: no image in it (.{', .'.join(IMAGE_KEYS)})")
        if label is None:
            return Lost(f"{name}: no class in it (.{'json' if self.alt_label else 'cls'})")
        try:
            target = class_index(_entry(parse_json(label, name), self.alt_label) if self.alt_label else label)
        except (InputError, ValueError, TypeError, KeyError, OverflowError) as error:
            return Lost(f"{name}: its class cannot be read ({first_line(error)})")
        return Sample(name, image, max(target, -1))

    def __len__(self) -> int:
        return self.num_samples

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        raise NotImplementedError("shards are read sequentially")


MAX_CLASS = 1_000_000


def class_index(value: Any) -> int:
    """Convert a dataset's class index, a number or its digits.

    Raises:
        ValueError, TypeError, OverflowError: the value is not a class index, such as 1.5, or too large.
    """
    index = int(value)
    if (isinstance(value, float) and value != index) or index > MAX_CLASS:
        raise ValueError(f"{str(value)[:40]} is not a class index")
    return index


def _entry(content: Any, key: str) -> Any:
    """Return a field, which may be nested: `a/b` is the field b of the field a, without a field a/b, as in timm."""
    if key not in content and "/" in key:
        first, _, rest = key.partition("/")
        return _entry(content[first], rest)
    return content[key]


def _grouped(path: Path) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Yield the samples of a shard: adjacent files that differ only in their suffix, by suffix.

    Files with other suffixes than `READ_KEYS`, links and special files are skipped; None stands for a file that occurs
    twice.
    """
    with open_file(path) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=Member) as archive:
        name, size = "", 0
        parts: dict[str, bytes | None] = {}
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it would grow to a million files
            check_name(member.name)
            match = KEY.fullmatch(member.name)
            if not member.isreg() or member.issparse() or match is None or META.match(member.name):
                continue
            key, suffix = match[1], match[2].lower()
            if key != name:
                if parts:
                    yield name, parts
                name, parts, size = key, {}, 0
            if suffix not in READ_KEYS:
                continue
            check_member(member)
            size += member.size
            if size > MAX_MEMBER:
                raise tarfile.ReadError(f"{name[:80]} has files of {size} bytes")
            content = archive.extractfile(member)
            assert content is not None  # for a regular file
            parts[suffix] = None if suffix in parts else content.read()
        if parts:
            yield name, parts


Item = TypeVar("Item")


def _shuffled(items: Iterator[Item], size: int, initial: int, rng: random.Random) -> Iterator[Item]:
    """Shuffle items through a buffer that grows by one for each item that leaves it, as webdataset does."""
    buffer: list[Item] = []

    def pick() -> Item:
        place = rng.randint(0, len(buffer) - 1)
        chosen, buffer[place] = buffer[place], buffer[-1]
        buffer.pop()
        return chosen

    for item in items:
        buffer.append(item)
        if len(buffer) < size and (following := next(items, None)) is not None:
            buffer.append(following)
        if len(buffer) >= initial:
            yield pick()
    while buffer:
        yield pick()


def _find_split(root: Path, split: str) -> _Split:
    info = next((root / name for name in INFO_NAMES if is_file(root / name)), None)
    content = load_json(info) if info else {}
    splits = content.get("splits") if isinstance(content, dict) else None
    splits = splits if isinstance(splits, dict) else {}
    if split in splits:
        description = parse_model(_Split, splits[split], f"{info}: {split}")
        lengths = description.shard_lengths
        if not 0 <= description.num_samples <= MAX_SAMPLES or any(not 0 <= each <= MAX_SAMPLES for each in lengths):
            raise InputError(f"{info}: {split} announces {description.num_samples} images; correct it")
        if lengths and len(lengths) != len(description.filenames):
            raise InputError(
                f"{info}: {split} has {len(description.filenames)} shards and {len(lengths)} lengths; correct it"
            )
        return description
    if "tar" not in split and ".." not in split:
        known = f"; choose from {', '.join(map(str, splits))}" if splits else ""
        raise InputError(f"wds/: cannot be opened: {root} has no split {split[:80]!r} in {INFO_NAMES[0]}{known}")
    pattern, bar, count = split.partition("|")
    if bar and not re.fullmatch(r"[0-9]{1,12}", count):
        raise InputError(f"{split[:80]!r}: the count after | is not a number of images")
    names = [name for part in pattern.split("::") for name in expand_braces(part)]
    return _Split(int(count or 0), names)
