"""The command `shvit predict`; see shvit/cli.py for how it is called."""

import os
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import tyro

from shvit import terminal
from shvit.environment import keep_freed_memory
from shvit.errors import InputError, refuse
from shvit.files import check_output_folder, check_replaceable

from ..guards import check_apart, rows_that_fit
from .inputs import STDIN, find_inputs
from .job import Job, lack_of_images
from .journal import Journal, open_journal, remove_journal
from .models import Features
from .outputs import check_output, write_output
from .predictor import Predictor
from .show import MAX_DRAWN, MAX_SHOWN, draw_sheet, prediction_table

console = terminal.console()
FEW = 64
"""Images that are read without further processes, which take longer to start."""
MAX_DEFAULT_WORKERS = 8


@dataclass(frozen=True)
class Predict:
    """Predict the classes of images, or compute their features, with a checkpoint or an exported file.

    Without --checkpoint, --artifact or --model the published weights shvit_s4.in1k are taken.
    With --output, the same command resumes an interrupted job: each image has one line, in the order of the inputs.
    """

    inputs: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="INPUT [INPUT ...]")]] = ()
    """Image files, folders, uncompressed tars, folders of WebDataset shards, videos, or quoted patterns of such paths.
    With - a list of them is read from stdin, one on each line, or separated by NULs."""
    checkpoint: Path | None = None
    """Weights in any layout, the folder of a run, or a name of `shvit weights list`."""
    model: str | None = None
    """A name that timm knows; by default the checkpoint's own model."""
    pretrained: bool = False
    """Take the model's published weights in place of a checkpoint."""
    ema: bool = False
    """Take the checkpoint's EMA weights."""
    artifact: Path | None = None
    """An .onnx, .tflite or .pte file, .xml, .mlpackage or .param of `shvit export`, in place of a checkpoint."""
    img_size: int | None = None
    """Input height and width in pixels; those that the checkpoint was trained for by default, or the model's own."""
    output: Path | None = None
    """The file to write, .jsonl, .csv or .parquet, and for features .parquet or .npy; a table by default."""
    top: int | None = None
    """Number of classes for each image, the most probable first; 5 by default."""
    features: Features | None = None
    """Write embeddings in place of classes: pooled, what the classifier is given, or maps, one for each stage."""
    draw: Path | None = None
    """A PNG to draw the first 100 images to, as the model sees them, with their classes."""
    every: int = 1
    """Take every n-th frame of a video."""
    batch_size: int = 32
    """Batch size."""
    workers: int | None = None
    """Number of processes that read images; by default one for each core, at most 8, and none for a few images."""

    def run(self) -> dict[str, Any]:
        self._check_options()
        predictor = self._predictor()
        keep_freed_memory()
        inputs = find_inputs(self.inputs, self.every, console.print)
        if not inputs.has_frames:
            refuse("no input is a video", every=self.every if self.every != 1 else None)
        if self.output is None and (len(inputs) > MAX_SHOWN or inputs.has_frames):
            what = "frames of a video" if inputs.has_frames else f"{len(inputs):,} images"
            raise InputError(f"{what} are too many for a table; give --output F.jsonl, F.csv or F.parquet")
        model = predictor.open(console.print)
        workers = _default_workers(len(inputs), inputs.has_frames) if self.workers is None else self.workers
        batch_size = rows_that_fit(self.batch_size, model.spec)
        job = Job(model, inputs, predictor.count_classes(model), batch_size, workers)
        if self.output is not None:
            return self._run(job, self.output)
        with tempfile.TemporaryDirectory(prefix="shvit-predict-") as folder:
            return self._run(job, None, Path(folder, "table"))

    def _check_options(self) -> None:
        from shvit.train.data.eval_loader import check_loader

        if not self.inputs:
            raise InputError("which images? give files, folders, tars or videos, or - for a list of them on stdin")
        check_loader(self.batch_size, self.workers or 0, 0)
        if self.every < 1:
            raise InputError(f"--every {self.every} is out of range; choose 1 or more")
        if self.features is not None:
            refuse("features have no classes", draw=self.draw)
        check_output(self.output, self.features is not None)
        check_apart(self.output, checkpoint=self.checkpoint, artifact=self.artifact)
        if self.draw is not None:
            self._check_draw(self.draw)

    def _check_draw(self, path: Path) -> None:
        if path.suffix != ".png":
            raise InputError(f"--draw {path}: the sheet is a PNG; give a name that ends with .png")
        check_output_folder(path.parent)
        check_replaceable(path)
        for given in self.inputs:
            check_apart(path, "--draw", input=None if given == STDIN else given, checkpoint=self.checkpoint)

    def _predictor(self) -> Predictor:
        return Predictor(
            checkpoint=self.checkpoint, artifact=self.artifact, model=self.model, pretrained=self.pretrained,
            ema=self.ema, top=self.top, features=self.features, img_size=self.img_size,
        )  # fmt: skip

    def _run(self, job: Job, output: Path | None, place: Path | None = None) -> dict[str, Any]:
        """Run a job, write its output, and return the command's result.

        Args:
            place: what the journal stands beside where there is no output.
        """
        where = output or place
        assert where is not None
        with open_journal(where, job.identity(), job.columns.row_bytes, job.batch_size) as journal:
            speed = job.run(journal, console, terminal.report)
            problem = lack_of_images(journal)
            if problem is None and output is not None:
                write_output(journal, output, job.columns)
            shown = {} if problem else self._show(job, journal, output)
        remove_journal(where)
        if problem is not None:
            raise InputError(problem)
        result = {"images": journal.count, "damaged": journal.damaged, "output": output and str(output)}
        return {**result, **shown, "images_per_second": round(speed, 1)}

    def _show(self, job: Job, journal: Journal, output: Path | None) -> dict[str, Any]:
        """Print the table, draw the sheet, and return what the result has of them."""
        shown: dict[str, Any] = {}
        if self.draw is not None:
            draw_sheet(job, list(islice(journal.records(), MAX_DRAWN)), self.draw)
            shown["draw"] = str(self.draw)
        if output is None:
            records = list(journal.records())
            console.print(prediction_table(records))
            return {**shown, "predictions": records}
        damaged = f", {journal.damaged:,} of them damaged" if journal.damaged else ""
        console.print(f"{output}: {journal.count:,} images{damaged}")
        return shown


def _default_workers(images: int, has_frames: bool) -> int:
    """Return the number of reading processes: none for a few images, else one for each core."""
    return min(os.cpu_count() or 1, MAX_DEFAULT_WORKERS) if has_frames or images > FEW else 0
