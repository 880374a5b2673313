"""A job in parts, which processes elsewhere predict, and a folder with a Parquet file for each of them."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from shvit.errors import InputError, some
from shvit.files import atomic_write, is_folder, is_there, open_file

from ..guards import one_line
from .inputs import Inputs, Joined
from .inputs import Part as InputPart
from .job import Job, Meter, Predicted, report_problems
from .journal import LOCK, Record, check_job, lock_folder, make_folder
from .loading import BEGINNING, Place
from .outputs import Columns, write_parquet

FORMAT = 1
JOB = "_job.json"  # readers of a folder of Parquet files leave out what begins so
NAME = re.compile(r"part-\d{5,}-of-\d{5,}\.parquet")
MAX_PART_BYTES = 64 << 20  # of features, which travel between processes
PredictParts = Callable[[Iterable["JobPart"]], Iterator[Predicted]]
"""Gives the predictions for each of some parts, in their order."""


@dataclass(frozen=True)
class JobPart:
    """Images that follow each other, which one process predicts."""

    start: Place
    """The place of the first one in the job."""
    images: InputPart
    skipped: int
    """Number of images at the beginning of a video that are done."""

    def __len__(self) -> int:
        return len(self.images)


def part_images(part_size: int, batch_size: int, columns: Columns) -> int:
    """Return the number of images in a part: `part_size` in whole batches, fewer where their features are large."""
    fitting = min(part_size, MAX_PART_BYTES // max(columns.row_bytes, 1))
    return max(1, fitting // batch_size) * batch_size


def divide(inputs: Inputs, start: Place, size: int) -> Iterator[JobPart]:
    """Yield the parts of a job from a place on; a video is one part.

    Args:
        size: number of images in a part, a multiple of the batch size, so that batches are those of the whole job.
    """
    for number in range(start.part, len(inputs.parts)):
        images, offset = inputs.parts[number], start.offset if number == start.part else 0
        if not isinstance(images, Joined):
            yield JobPart(Place(number, offset), images, offset)
            continue
        for first in range(offset, len(images), size):
            yield JobPart(Place(number, first), images.take(first, first + size), 0)


# --- a folder ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part's predictions, as they are written."""

    predicted: Predicted
    row_bytes: int

    def records(self) -> Iterator[Record]:
        yield from self.predicted.records

    def arrays(self, rows: int) -> Iterator[bytes]:
        """Yield the arrays of `rows` images at a time."""
        size = rows * self.row_bytes
        for first in range(0, len(self.predicted.arrays), size):
            yield self.predicted.arrays[first : first + size]


@dataclass(frozen=True)
class Totals:
    """What a job has predicted in all."""

    images: int
    damaged: int
    images_per_second: float
    """Of the images of this run; 0 where there was nothing to do."""
    problems: list[Record]
    """The record of the first image that could not be read, if any."""


def check_parts_folder(folder: Path) -> None:
    """Raise InputError where a folder cannot hold the parts of a job."""
    if folder.is_symlink() or (is_there(folder) and not is_folder(folder)):
        raise InputError(f"{folder}: is there already, and is not a folder; choose another --output")
    if is_folder(folder):
        others = [each.name for each in folder.iterdir() if not (each.name in (JOB, LOCK) or NAME.fullmatch(each.name)
                                                                 or ".partial." in each.name)]  # fmt: skip
        if others:
            raise InputError(f"{folder}: holds {some(sorted(others))}, which no job wrote; choose another --output")


def run_in_parts(
    job: Job, folder: Path, size: int, predict: PredictParts, console: Console, report: Callable[[str], None]
) -> Totals:
    """Write the parts of a job to a folder, each atomically, except those that are there; return what it holds then.

    Raises:
        InputError: the folder is another job's or being written, or a part does not have its images at the end.
    """
    with _open_folder(folder, {**job.identity(), "part size": size}):
        parts = list(divide(job.inputs, BEGINNING, size))
        paths = {part: folder / f"part-{index:05}-of-{len(parts):05}.parquet" for index, part in enumerate(parts)}
        missing = [part for part in parts if not is_there(paths[part])]
        done = sum(len(part) for part in parts) - sum(map(len, missing))
        if len(missing) < len(parts):
            console.print(f"resuming: {len(parts) - len(missing):,} of {len(parts):,} parts are there")
        with Meter(console, len(job.inputs), done) as meter:
            for part, predicted in zip(missing, predict(missing), strict=True):
                report_problems(predicted.items, report)
                with atomic_write(paths[part]) as partial:
                    write_parquet(Part(predicted, job.columns.row_bytes), partial, job.columns)
                meter.advance(len(predicted.items))
        return _totals(paths, meter.speed)


@contextmanager
def _open_folder(folder: Path, job: dict[str, Any]) -> Iterator[None]:
    check_parts_folder(folder)
    make_folder(folder)
    with lock_folder(folder):
        check_job(folder / JOB, {"format": FORMAT, **job})
        yield


def _totals(paths: Mapping[JobPart, Path], speed: float) -> Totals:
    """Count the rows of all parts, and those with an error; raise InputError where a part has others than its own."""
    from pyarrow import parquet

    images = damaged = 0
    problems: list[Record] = []
    for part, path in paths.items():
        with one_line(path, "not a part that a job wrote; remove it"), open_file(path) as file:
            table = parquet.read_table(file, columns=["path", "error"])
        if isinstance(part.images, Joined) and len(table) != len(part):
            raise InputError(f"{path}: has {len(table)} rows for {len(part)} images; something else has changed it, "
                             "remove it and run the same command")  # fmt: skip
        images += len(table)
        damaged += len(table) - table["error"].null_count
        if damaged and not problems:
            problems = [row for row in table.to_pylist() if row["error"] is not None][:1]
    return Totals(images, damaged, speed, problems)
