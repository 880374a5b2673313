"""A job in parts: on a Ray cluster, whose tasks predict them, and a folder with a Parquet file for each of them."""

import logging
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from shvit.environment import keep_freed_memory
from shvit.errors import CheckFailed, InputError, first_line, some
from shvit.files import atomic_write, is_folder, is_there, open_file

from ..guards import one_line
from .inputs import Inputs, Joined
from .inputs import Part as InputPart
from .job import Job, Meter, Predicted, predict_batch, report_problems
from .journal import LOCK, Record, check_job, lock_folder, make_folder
from .loading import BEGINNING, Item, Place, load_batches
from .outputs import Columns, write_parquet
from .predictor import Predictor, opened_model

if TYPE_CHECKING:
    import ray

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


# --- Ray --------------------------------------------------------------------------------------------------------------

LOCAL, AUTO = "local", "auto"
CONNECT_S = 10.0
AHEAD = 4
"""Parts that are asked for at a time, for each core of the cluster."""
RETRIES = 3  # of a part, where the worker that predicts it ends


@contextmanager
def connect(address: str, workers: int | None) -> Iterator[None]:
    """Connect to a Ray cluster, in a block; one that the process is connected to already stays.

    Args:
        address: `local` to start one on this machine for the time of the block, `auto`, or its host and port.
        workers: number of cores of a local one; all if None.

    Raises:
        InputError: there is none.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # which Ray reads when it is imported, and reports at its end
    import ray

    if address not in (LOCAL, AUTO):
        _check_reachable(address)
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray's, gRPC's and the system's
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise InputError where nothing answers at a host and port, for which Ray waits two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> InputError:
    return InputError(f"--ray {address}: no Ray cluster there ({first_line(error)}); give local, auto, or the "
                      "HOST:PORT of one")  # fmt: skip


def predict_on_ray(predictor: Predictor, top: int, batch_size: int, parts: Iterable[JobPart]) -> Iterator[Predicted]:
    """Yield the predictions for each part, in their order, of the cluster that the process is connected to.

    Args:
        top: number of classes of each image; 0 for labels, a value, and features.

    Raises:
        InputError: a task raised it, or the workers that ran one ended each time.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=RETRIES)(predict_part)
    rest, pending = iter(parts), deque[tuple[JobPart, Any]]()
    while True:
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))  # a cluster may grow meanwhile
        for part in islice(rest, max(0, AHEAD * cores - len(pending))):
            pending.append((part, task.remote(predictor, part, top, batch_size, str(Path.cwd()))))
        if not pending:
            return
        part, reference = pending.popleft()
        yield _result(reference, part)


def _result(reference: "ray.ObjectRef", part: JobPart) -> Predicted:
    import ray
    from ray.exceptions import NodeDiedError, RayTaskError, WorkerCrashedError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, InputError | CheckFailed):
            raise error.cause from error
        raise
    except (WorkerCrashedError, NodeDiedError) as error:
        name = part.images.filename(0) if hasattr(part.images, "filename") else part.images.path
        raise InputError(f"{name}: the worker that read it, or one of the images after it, ended {RETRIES + 1} times, "
                         "as one without memory does; find it with a smaller --part-size") from error  # fmt: skip


def predict_part(predictor: Predictor, part: JobPart, top: int, batch_size: int, folder: str) -> Predicted:
    """Return the predictions for a part of a job; what a worker runs.

    Args:
        folder: the working directory that relative paths are meant in.
    """
    with suppress(OSError):  # absolute paths do without
        os.chdir(folder)
    keep_freed_memory()
    model = opened_model(predictor)
    items: list[Item] = []
    records, arrays = [], []
    for batch in load_batches(Inputs((part.images,)), Place(0, part.skipped), model.spec, batch_size):
        found, features = predict_batch(model, batch, top)
        places = (Place(part.start.part, part.start.offset + len(items) + index) for index in range(len(batch.items)))
        items += [replace(item, place=place) for item, place in zip(batch.items, places, strict=True)]
        records += found
        arrays.append(features)
    return Predicted(items, records, b"".join(arrays))
