"""Batches of a job's images as a model wants them, from any place on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset

from shvit.errors import InputError
from shvit.train.data.datasets import Images
from shvit.train.data.eval_loader import Prepare, Prepared, ignore_interrupt
from shvit.train.data.pixels.formats import RGB

from ..spec import Spec
from .inputs import Inputs, Joined, Part
from .videos import Video

FrameItem = tuple[torch.Tensor, int, str, float]
"""(transformed frame, its number, why it could not be read, its time in seconds)."""


class Place(NamedTuple):
    """A place in a job's images."""

    part: int
    offset: int
    """Number of images of this part before it."""


BEGINNING = Place(0, 0)


@dataclass(frozen=True)
class Item:
    """What is known of an image besides its pixels."""

    place: Place
    name: str
    problem: str
    """Why it could not be read; empty for one that was."""
    frame: int | None = None
    """Number of a video's frame, counted from 0."""
    seconds: float | None = None


@dataclass(frozen=True)
class Batch:
    """Images of one part, in order."""

    items: list[Item]
    pixels: torch.Tensor
    """(B, C, H, W), as `Spec.transform(normalize=False)` gives them; black for an image that could not be read."""


class Frames(IterableDataset):
    """Transformed frames of a video, from the `start`-th on."""

    def __init__(self, video: Video, start: int, transform: Prepare):
        self.video, self.start, self.transform = video, start, transform

    def __iter__(self) -> Iterator[FrameItem]:
        for frame in self.video.frames(self.start):
            yield self.transform(frame.image or RGB.blank), frame.number, frame.problem, frame.seconds


def load_batches(inputs: Inputs, start: Place, spec: Spec, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """Yield batches of a job's images from a place on; one that cannot be read is named with its problem.

    A batch ends with its part, so that the batches from the beginning of a batch on are always the same.

    Args:
        spec: the model's, which says how images are decoded, resized and cropped.
        workers: number of processes that read images; a video is read by one of them.
    """
    for number in range(start.part, len(inputs.parts)):
        offset = start.offset if number == start.part else 0
        yield from _load_part(inputs.parts[number], Place(number, offset), spec, batch_size, workers)


def _load_part(part: Part, start: Place, spec: Spec, batch_size: int, workers: int) -> Iterator[Batch]:
    transform = spec.transform(normalize=False)
    options: dict[str, Any] = {"batch_size": batch_size, "worker_init_fn": ignore_interrupt}
    if isinstance(part, Joined):
        images = Images(part, (), range(start.offset, len(part))).read_as(spec.pixels)
        if not len(images):
            return
        for pixels, _, problems, _ in DataLoader(Prepared(images, transform), num_workers=workers, **options):
            items = [
                Item(place, part.filename(place.offset), problem)
                for place, problem in zip(_places(start, len(problems)), problems, strict=True)
            ]
            start = _after(start, len(items))
            yield Batch(items, pixels)
        return
    if not spec.pixels.uses_pillow:
        raise InputError(f"{part.path}: is a video, whose frames are in RGB, and the model takes {spec.pixels}; give "
                         "image files")  # fmt: skip
    frames = Frames(part, start.offset, transform)
    for pixels, numbers, problems, seconds in DataLoader(frames, num_workers=min(workers, 1), **options):
        known = zip(_places(start, len(problems)), problems, numbers.tolist(), seconds.tolist(), strict=True)
        items = [Item(place, str(part.path), problem, number, time) for place, problem, number, time in known]
        start = _after(start, len(items))
        yield Batch(items, pixels)


def _places(start: Place, count: int) -> list[Place]:
    return [_after(start, index) for index in range(count)]


def _after(start: Place, count: int) -> Place:
    return Place(start.part, start.offset + count)
