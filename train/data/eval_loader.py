"""The data loader for evaluation: each image once, in order; damaged ones are reported."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from shvit import terminal
from shvit.errors import InputError

from .datasets import Images
from .pixels.formats import RGB, Decoded
from .splits import check_outside as check_outside
from .streams import Stream

Prepare = Callable[[Decoded], torch.Tensor]
PreparedItem = tuple[torch.Tensor, Any, str, int]
"""(transformed image, class index or vector of targets, why it could not be read, number of images missing with it)."""
MAX_CORRUPT = 10  # damaged images that an evaluation skips


class Prepared(Dataset):
    """Transformed images for an evaluation; damaged ones are black and have the dataset's `ignored_target`."""

    def __init__(self, dataset: Images, transform: Prepare):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> PreparedItem:
        try:
            image, target = self.dataset[index]
        except InputError as error:
            return self.transform(self.dataset.pixels.blank), self.dataset.ignored_target, str(error), 0
        return self.transform(image), target, "", 0


class PreparedStream(IterableDataset):
    """Transformed images of a stream; see `Prepared`."""

    def __init__(self, stream: Stream, transform: Prepare):
        self.stream = stream
        self.transform = transform

    def __iter__(self) -> Iterator[PreparedItem]:
        for image, target, problem, missing in self.stream.reads():
            yield self.transform(image or RGB.blank), target, problem, missing


class EvalBatches:
    """Batches of (images, targets), each image once: int64 class indices, `IGNORED` for one that cannot be read; or
    float32 vectors, NaN for such.

    Each problem is reported. After a pass, `damaged` counts images that could not be read, and `missing` those that
    were announced, by shards for example, and are not there.

    Args:
        loader: data loader of `Prepared` or `PreparedStream`.
        announced: expected number of images; 0 if unknown.
        max_corrupt: limit of damaged images; None for no limit.
        max_missing: limit of missing images.
        report: called with each problem.
    """

    def __init__(
        self,
        loader: DataLoader,
        announced: int,
        max_corrupt: int | None,
        max_missing: int,
        report: Callable[[str], None],
    ):
        self.loader = loader
        self.announced = announced
        self.max_corrupt, self.max_missing = max_corrupt, max_missing
        self.report = report
        self.damaged = self.missing = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.damaged = self.missing = good = 0
        for images, targets, problems, missing in self.loader:
            for problem, count in zip(problems, missing.tolist(), strict=True):
                good += not problem
                if problem:
                    self.report(f"{problem}: not counted")
                    self.missing += count
                    self.damaged += not count
                    self._check(problem)
            yield images, targets
        if (rest := self.announced - good - self.damaged - self.missing) > 0:
            self.missing += rest
            self._check("the data end before")

    def _check(self, problem: str) -> None:
        if self.missing > self.max_missing:
            raise InputError(f"{self.missing} of {self.announced or 'all'} announced images are missing "
                             f"({problem}); complete the data, or correct what announces them")  # fmt: skip
        if self.max_corrupt is not None and self.damaged > self.max_corrupt:
            raise InputError(f"{self.damaged} damaged images, and {self.max_corrupt} are allowed; replace or remove "
                             f"them, or allow more with --max-corrupt; one of them: {problem}")  # fmt: skip


def check_loader(batch_size: int, workers: int, max_corrupt: int) -> None:
    """Check the options of an evaluation's loader.

    Raises:
        InputError: an option is out of range, or there are more workers than this machine can use.
    """
    for name, value, lowest, highest in (
        ("batch-size", batch_size, 1, 1_000_000), ("workers", workers, 0, max_workers()),
        ("max-corrupt", max_corrupt, 0, 10**9),
    ):  # fmt: skip
        if not lowest <= value <= highest:
            raise InputError(f"--{name} {value} is out of range; choose {lowest} to {highest}")


def max_workers() -> int:
    """Return the largest accepted number of a loader's workers."""
    return max(64, 4 * (os.cpu_count() or 1))


def eval_loader(
    dataset: Images | Stream,
    transform: Prepare,
    batch_size: int,
    workers: int = 0,
    max_corrupt: int | None = MAX_CORRUPT,
    max_missing: int = 0,
    report: Callable[[str], None] = terminal.report,
) -> EvalBatches:
    """Create a loader of every image once, in order: batches of (transformed images, targets); see `EvalBatches`."""
    if isinstance(dataset, Stream):
        dataset.reader.set_loader_cfg(num_workers=workers)
        streamed = PreparedStream(dataset, transform)
        loader = DataLoader(streamed, batch_size, num_workers=workers, worker_init_fn=ignore_interrupt)
        return EvalBatches(loader, dataset.announced, max_corrupt, max_missing, report)
    loader = DataLoader(
        Prepared(dataset, transform), batch_size, num_workers=workers, worker_init_fn=ignore_interrupt,
        persistent_workers=workers > 0,
    )  # fmt: skip
    return EvalBatches(loader, len(dataset), max_corrupt, max_missing, report)


def ignore_interrupt(worker: int) -> None:
    """Ignore Ctrl-C in a loader's worker: it is for the main process, which ends its workers by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
