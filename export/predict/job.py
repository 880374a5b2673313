"""A job: its images go through the model, batch by batch, from where an earlier process ended."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .inputs import Inputs
from .journal import Journal, Record
from .loading import BEGINNING, Batch, Item, Place, load_batches
from .models import LoadedModel
from .outputs import Columns

LINE_SECONDS = 30.0  # between two plain lines


@dataclass(frozen=True)
class Predicted:
    """The predictions for images that follow each other."""

    items: list[Item]
    records: list[Record]
    """One for each image."""
    arrays: bytes
    """The features of all images; empty where something else is predicted."""


Source = Callable[[Place], Iterator[Predicted]]
"""Gives a job's predictions, in order, from a place on, which is the beginning of a batch."""


@dataclass(frozen=True)
class Job:
    """Images, what predicts, and how."""

    model: LoadedModel
    inputs: Inputs
    top: int
    """Number of classes of each image; 0 for what has not as many for each."""
    batch_size: int
    workers: int

    @property
    def columns(self) -> Columns:
        return Columns(self.model.kind(self.top), self.top, self.inputs.has_frames, self.model.shapes)

    def identity(self) -> dict[str, Any]:
        """Return what the predictions depend on, as plain values, by what messages call them."""
        return {"images": self.inputs.digest(), "top": self.top, **self.model.identity()}

    def batches(self, start: Place = BEGINNING) -> Iterator[Batch]:
        """Yield batches of the images from a place on."""
        return load_batches(self.inputs, start, self.model.spec, self.batch_size, self.workers)

    def predict(self, start: Place = BEGINNING) -> Iterator[Predicted]:
        """Yield the predictions for the images from a place on, batch by batch."""
        for batch in self.batches(start):
            yield Predicted(batch.items, *predict_batch(self.model, batch, self.top))

    def run(self, journal: Journal, source: Source, console: Console, report: Callable[[str], None]) -> float:
        """Predict what the journal does not have; return the images per second, 0 where there was nothing to do.

        Args:
            source: `predict`, or what has others predict.
            report: called with a line for each image that cannot be read.
        """
        if journal.count:
            console.print(f"resuming after {journal.count:,} images")
        with Meter(console, len(self.inputs), journal.count) as meter:
            for predicted in source(journal.place):
                report_problems(predicted.items, report)
                journal.append([item.place for item in predicted.items], predicted.records, predicted.arrays)
                meter.advance(len(predicted.items))
            journal.commit()
        return meter.speed


def report_problems(items: Sequence[Item], report: Callable[[str], None]) -> None:
    """Call a function with a line for each image that could not be read."""
    for item in items:
        if item.problem:
            report(item.problem)


# --- batches ----------------------------------------------------------------------------------------------------------


def predict_batch(model: LoadedModel, batch: Batch, top: int) -> tuple[list[Record], bytes]:
    """Return a record for each image of a batch, and the bytes of all their features, NaN for what was not read.

    Args:
        top: number of classes in a record; 0 for labels, a value, or features.
    """
    outputs, kind = model(batch.pixels), model.kind(top)
    if kind == "features":
        rows = torch.cat([output.flatten(1) for output in outputs], dim=1).float()
        rows[torch.tensor([bool(item.problem) for item in batch.items])] = float("nan")
        return [_record(item) for item in batch.items], rows.numpy().astype("<f4", copy=False).tobytes()
    if kind == "value":
        found = [{"value": value} for (value,) in _short(outputs[0])]
    elif kind == "labels":
        found = _labels(outputs[0], model)
    else:
        found = _most_probable(outputs[0], [top] * len(batch.items), model)
    return [_record(item, each) for item, each in zip(batch.items, found, strict=True)], b""


def _labels(probabilities: torch.Tensor, model: LoadedModel) -> list[Record]:
    """Return the labels of each image: those whose probability reaches its threshold."""
    has = probabilities.double() >= model.spec.label_thresholds
    return _most_probable(probabilities.where(has, torch.tensor(-1.0)), has.sum(1).tolist(), model)


def _most_probable(probabilities: torch.Tensor, counts: Sequence[int], model: LoadedModel) -> list[Record]:
    """Return the most probable classes of each image, as many as `counts` has for it."""
    values, indices = probabilities.topk(max(counts, default=0), dim=1)
    return [
        {"labels": [model.classes[index] for index in row[:count]], "probabilities": likely[:count]}
        for row, likely, count in zip(indices.tolist(), _short(values), counts, strict=True)
    ]


def _short(rows: torch.Tensor) -> list[list[float]]:
    """Return rows of float32 as the numbers of the shortest texts that stand for them."""
    return [[float(str(value)) for value in row] for row in rows.numpy().astype("f4")]


def _record(item: Item, predicted: Record | None = None) -> Record:
    """Return the record of an image; of one that could not be read, the problem takes the predictions' place."""
    frame = {} if item.frame is None else {"frame": item.frame, "seconds": item.seconds}
    problem = item.problem.removeprefix(f"{item.name}: ")
    rest = {"error": as_text(problem)} if problem else predicted or {}
    return {"path": as_text(item.name), **frame, **rest}


def as_text(name: str) -> str:
    r"""Return a file's name as text that every format can hold: bytes that are not UTF-8 become \xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# --- progress ---------------------------------------------------------------------------------------------------------


class Meter:
    """A progress bar on a terminal, a line now and then elsewhere. A context manager around the work."""

    def __init__(self, console: Console, total: int, done: int):
        self.console, self.total, self.done = console, total, done
        self.new = 0
        columns = (TextColumn("{task.fields[speed]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.bar = self.progress.add_task("", total=total or None, completed=done, speed="")
        self.started = self.last_line = time.perf_counter()
        self.ended: float | None = None

    def __enter__(self) -> "Meter":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended = time.perf_counter()
        self.progress.stop()

    @property
    def speed(self) -> float:
        """Images per second so far."""
        return self.new / max((self.ended or time.perf_counter()) - self.started, 1e-9)

    def advance(self, count: int) -> None:
        """Count images that are done."""
        self.new += count
        done = self.done + self.new
        self.progress.update(self.bar, completed=done, speed=f"{self.speed:.0f} images/s")
        now = time.perf_counter()
        if not self.console.is_terminal and now - self.last_line > LINE_SECONDS:
            self.last_line = now
            of_all = f" of {self.total:,}" if self.total else ""
            self.console.print(f"{done:,}{of_all} images, {self.speed:.0f} images/s")


def lack_of_images(images: int, damaged: int, records: Iterator[Record]) -> str | None:
    """Return what to tell a user where no image could be read, so that there is nothing to write; else None."""
    if images == 0:
        return "the inputs hold no images; give others"
    if damaged < images:
        return None
    first = next(records)
    rest = f"none of the {images:,} images can be read; the first: " if images > 1 else ""
    return f"{rest}{first['path']}: {first['error']}"
