"""Predictions for people: a table on the terminal, and a contact sheet."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from rich.table import Table

from shvit import terminal
from shvit.errors import printable
from shvit.files import atomic_write

from .job import Job
from .journal import Record
from .loading import Batch

MAX_SHOWN = 50
"""Images in a table; more are for a file."""
MAX_DRAWN = 100
"""Images on a contact sheet."""
COLUMNS = 5
SIDE = 1.9  # inches of an image
MAX_NAME = 28  # characters below an image


def prediction_table(records: Sequence[Record]) -> Table:
    """Return a table of the predictions for images, with a line for each class."""
    table = Table("image", "class", *terminal.right_aligned("%"))
    for record in records:
        name = image_name(record)
        if "error" in record:
            table.add_row(name, "cannot be read", "")
        for label, probability in zip(record.get("labels", ()), record.get("probabilities", ()), strict=True):
            table.add_row(name, label, f"{100 * probability:.1f}")
            name = ""
        table.add_section()
    return table


def image_name(record: Record) -> str:
    """Return what an image is called: its path, and of a video the frame."""
    return record["path"] if "frame" not in record else f"{record['path']}, frame {record['frame']}"


def draw_sheet(job: Job, records: Sequence[Record], path: Path) -> None:
    """Draw images as the model sees them, each with its most probable class, as a PNG.

    Args:
        records: those of the job's first images.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(COLUMNS, len(records))
    rows = -(-len(records) // columns)
    size = (columns * SIDE + 0.2, rows * (SIDE + 0.55))
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, record, pixels in zip(axes.flat, records, _images(job.batches()), strict=False):
        axis.imshow(pixels.permute(1, 2, 0).expand(-1, -1, 3).numpy())
        axis.set_title(_caption(record), fontsize=7)
    with terminal.quiet(), atomic_write(path) as partial:  # the font lacks letters of many names
        figure.savefig(partial, dpi=100, format="png")
    plt.close(figure)


def _images(batches: Iterator[Batch]) -> Iterator[torch.Tensor]:
    return (pixels for batch in batches for pixels in batch.pixels)


def _caption(record: Record) -> str:
    name = Path(record["path"]).name
    lines = [name if "frame" not in record else f"{name}, frame {record['frame']}"]
    if "error" in record:
        lines.append("cannot be read")
    lines += [f"{label[:MAX_NAME]} {100 * p:.0f} %" for label, p in islice(
        zip(record.get("labels", ()), record.get("probabilities", ()), strict=True), 1)]  # fmt: skip
    lines[0] = lines[0] if len(lines[0]) <= MAX_NAME else f"…{lines[0][-MAX_NAME:]}"
    return "\n".join(printable(line).replace("$", r"\$") for line in lines)  # between two $ stands a formula
