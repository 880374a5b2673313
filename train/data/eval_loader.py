"""Batches for evaluation: each image once, in order, and the damaged ones reported."""

import os
import signal
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from shvit import terminal
from shvit.errors import InputError

from .datasets import Images
from .splits import check_outside as check_outside
from .streams import IGNORED, Stream

Prepare = Callable[[Image.Image], torch.Tensor]
PreparedItem = tuple[torch.Tensor, int, str, int]
"""(what `transform` makes of the image, class index, why it could not be read, images missing with it)."""
BLANK = Image.new("RGB", (8, 8))
MAX_CORRUPT = 10  # damaged images that an evaluation leaves out


class Prepared(Dataset):
    """Items, prepared for an evaluation; damaged ones too, which have the class `IGNORED`."""

    def __init__(self, dataset: Images, transform: Prepare):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> PreparedItem:
        try:
            image, target = self.dataset[index]
        except InputError as error:
            return self.transform(BLANK), IGNORED, str(error), 0
        return self.transform(image), target, "", 0


class PreparedStream(IterableDataset):
    """A stream's items, as `Prepared` gives them."""

    def __init__(self, stream: Stream, transform: Prepare):
        self.stream = stream
        self.transform = transform

    def __iter__(self) -> Iterator[PreparedItem]:
        for image, target, problem, missing in self.stream.reads():
            yield self.transform(image or BLANK), target, problem, missing


class EvalBatches:
    """Batches of (images, int64 class indices), each image once; one that cannot be read has the class `IGNORED`.

    Each problem is reported. After a pass, `damaged` and `missing` are how many images could not be read, and how many
    of those that were announced, by shards say, are not there.

    Args:
        loader: of `Prepared` or `PreparedStream`.
        announced: how many images there are said to be; 0 where that is not known.
        max_corrupt: how many may be damaged; any number where None.
        max_missing: how many may be missing.
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
        InputError: one is out of range, or there are more workers than this machine has use for.
    """
    for name, value, lowest, highest in (
        ("batch-size", batch_size, 1, 1_000_000), ("workers", workers, 0, max_workers()),
        ("max-corrupt", max_corrupt, 0, 10**9),
    ):  # fmt: skip
        if not lowest <= value <= highest:
            raise InputError(f"--{name} {value} is out of range; choose {lowest} to {highest}")


def max_workers() -> int:
    """The highest number of a loader's processes that is taken for meant."""
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
    """Every image once, in order: batches of (what `transform` makes, int64 (B,)); see `EvalBatches`."""
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
    """For a loader's workers: Ctrl-C is for the process that they serve, and that ends them by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
