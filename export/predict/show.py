"""Predictions for people: a table on the terminal, and a contact sheet."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from shvit import terminal
from shvit.errors import printable
from shvit.files import atomic_write

from .job import Job
from .journal import Record
from .loading import Batch
from .models import Kind

MAX_SHOWN = 50
"""Images in a table; more are for a file."""
MAX_DRAWN = 100
"""Images on a contact sheet."""
COLUMNS = 5
SIDE = 1.9  # inches of an image
MAX_NAME = 28  # characters above an image
MAX_LABELS = 3  # lines above an image
NO_LABEL = "no label"


def prediction_table(records: Sequence[Record], kind: Kind, classes: Sequence[str]) -> Table:
    """Return a table of the predictions for images, with a line for each class, or for the value."""
    columns = terminal.right_aligned(*classes) if kind == "value" else ("class", *terminal.right_aligned("%"))
    table = Table("image", *columns)
    for record in records:
        rows = _rows(record, kind)
        for row, name in zip(rows, (image_name(record), *[""] * len(rows)), strict=False):
            table.add_row(name, *row)
        table.add_section()
    return table


def _rows(record: Record, kind: Kind) -> list[tuple[str, ...]]:
    """Return the cells of an image's predictions, behind its name."""
    rest = () if kind == "value" else ("",)
    if "error" in record:
        return [("cannot be read", *rest)]
    if kind == "value":
        return [(format_value(record["value"]),)]
    pairs = zip(record["labels"], record["probabilities"], strict=True)
    return [(label, f"{100 * probability:.1f}") for label, probability in pairs] or [(NO_LABEL, *rest)]


def format_value(value: float) -> str:
    """Return a value with five digits, and all of those before its point."""
    return f"{value:.5g}" if abs(value) < 1e5 else f"{value:.0f}"


def image_name(record: Record) -> str:
    """Return what an image is called: its path, and of a video the frame."""
    return record["path"] if "frame" not in record else f"{record['path']}, frame {record['frame']}"


def draw_sheet(job: Job, records: Sequence[Record], path: Path) -> None:
    """Draw images as the model sees them, each with its most probable class, its labels or its value, as a PNG.

    Args:
        records: those of the job's first images.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(COLUMNS, len(records))
    rows = -(-len(records) // columns)
    lines = MAX_LABELS if job.columns.kind == "labels" else 1
    size = (columns * SIDE + 0.2, rows * (SIDE + 0.4 + 0.15 * lines))
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, record, pixels in zip(axes.flat, records, _images(job.batches()), strict=False):
        axis.imshow(_shown_bands(pixels))
        axis.set_title(_caption(record, job.columns.kind, job.model.classes), fontsize=7)
    with terminal.quiet(), atomic_write(path) as partial:  # the font lacks letters of many names
        figure.savefig(partial, dpi=100, format="png")
    plt.close(figure)


def _shown_bands(pixels: torch.Tensor) -> np.ndarray:
    """Return an image's first three channels, or its first, as (H, W, 3); stretched, if they are not of 8 bits."""
    shown = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    if shown.dtype != torch.uint8:
        low, high = shown.amin((1, 2), keepdim=True), shown.amax((1, 2), keepdim=True)
        shown = (shown - low) / (high - low).clamp_min(1e-12)
    return shown.permute(1, 2, 0).expand(-1, -1, 3).numpy()


def _images(batches: Iterator[Batch]) -> Iterator[torch.Tensor]:
    return (pixels for batch in batches for pixels in batch.pixels)


def _caption(record: Record, kind: Kind, classes: Sequence[str]) -> str:
    name = Path(record["path"]).name
    name = name if "frame" not in record else f"{name}, frame {record['frame']}"
    name = name if len(name) <= MAX_NAME else f"…{name[-MAX_NAME:]}"
    lines = [name, *_predictions(record, kind, classes)]
    return "\n".join(printable(line).replace("$", r"\$") for line in lines)  # between two $ stands a formula


def _predictions(record: Record, kind: Kind, classes: Sequence[str]) -> list[str]:
    """Return the lines of what is predicted of an image: one class, its first labels, or its value."""
    if "error" in record:
        return ["cannot be read"]
    if kind == "value":
        return [f"{classes[0][:MAX_NAME]} {format_value(record['value'])}"]
    pairs = zip(record["labels"], record["probabilities"], strict=True)
    lines = [f"{label[:MAX_NAME]} {100 * probability:.0f} %" for label, probability in pairs] or [NO_LABEL]
    if kind == "classes":
        return lines[:1]
    return lines if len(lines) <= MAX_LABELS else [*lines[: MAX_LABELS - 1], f"and {len(lines) + 1 - MAX_LABELS} more"]
