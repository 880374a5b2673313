"""The command `shvit predict`; see shvit/cli.py for how it is called."""

import os
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import tyro

from shvit import terminal
from shvit.environment import keep_freed_memory
from shvit.errors import InputError, refuse
from shvit.files import check_output_folder, check_replaceable, remove
from shvit.img_size import ImgSize

from ..guards import check_apart, rows_that_fit
from .cluster import LOCAL, check_parts_folder, connect, divide, part_images, predict_on_ray, run_in_parts
from .inputs import STDIN, find_inputs
from .job import Job, Source, lack_of_images
from .journal import Journal, open_journal, remove_journal
from .models import Features
from .outputs import check_labels, check_output, write_output
from .predictor import Predictor
from .show import MAX_DRAWN, MAX_SHOWN, draw_sheet, prediction_table

console = terminal.console()
FEW = 64
"""Images that are read without further processes, which take longer to start."""
MAX_DEFAULT_WORKERS = 8
PART_IMAGES = 512


@dataclass(frozen=True)
class Predict:
    """Predict the classes, labels or value of images, or compute features, with a checkpoint or an exported file.

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
    img_size: ImgSize | None = None
    """Input size in pixels, as 224 or HEIGHTxWIDTH.
    By default the size that the checkpoint was trained for, or the model's own."""
    output: Path | None = None
    """The file to write, .jsonl, .csv or .parquet, and for features .parquet or .npy; a table by default."""
    top: int | None = None
    """Number of classes for each image, the most probable first; 5 by default.
    Of a multi-label model, those by default whose probability reaches their threshold."""
    features: Features | None = None
    """Write embeddings in place of classes: pooled, what the classifier is given, or maps, one for each stage."""
    draw: Path | None = None
    """A PNG to draw the first 100 images to, as the model sees them, with their classes.
    Of other channels than 1 or 3 it shows the first three, or the first of two."""
    every: int = 1
    """Take every n-th frame of a video."""
    batch_size: int = 32
    """Batch size."""
    workers: int | None = None
    """Number of processes that read images; by default one for each core, at most 8, and none for a few images. With
    --ray local, number of cores to predict on; all by default."""
    ray: str | None = None
    """Predict on a Ray cluster: local for this machine's cores, auto, or the cluster's HOST:PORT. An --output without a
    suffix is a folder then, with a Parquet file for each part of the images."""
    part_size: int | None = None
    """Number of images that a Ray task predicts; 512 by default."""

    def run(self) -> dict[str, Any]:
        self._check_options()
        predictor = self._predictor()
        keep_freed_memory()
        model = predictor.open(console.print)
        inputs = find_inputs(self.inputs, self.every, console.print, in_chans=model.spec.in_chans)
        if not inputs.has_frames:
            refuse("no input is a video", every=self.every if self.every != 1 else None)
        if self.output is None and (len(inputs) > MAX_SHOWN or inputs.has_frames):
            what = "frames of a video" if inputs.has_frames else f"{len(inputs):,} images"
            raise InputError(f"{what} are too many for a table; give --output F.jsonl, F.csv or F.parquet")
        workers = _default_workers(len(inputs), inputs.has_frames) if self.workers is None else self.workers
        batch_size = rows_that_fit(self.batch_size, model.spec)
        job = Job(model, inputs, predictor.count_classes(model), batch_size, 0 if self.ray else workers)
        check_labels(self.output, job.columns, model.classes)
        if self.ray is not None:
            return self._run_on_ray(job, predictor, self.ray)
        if self.output is not None:
            return self._run(job, job.predict, self.output)
        with tempfile.TemporaryDirectory(prefix="shvit-predict-") as folder:
            return self._run(job, job.predict, None, Path(folder, "table"))

    def _check_options(self) -> None:
        from shvit.train.data.eval_loader import check_loader

        if not self.inputs:
            raise InputError("which images? give files, folders, tars or videos, or - for a list of them on stdin")
        check_loader(self.batch_size, self.workers or 0, 0)
        if self.every < 1:
            raise InputError(f"--every {self.every} is out of range; choose 1 or more")
        if self.features is not None:
            refuse("features have no classes", draw=self.draw)
        self._check_ray()
        if not self._in_parts:
            check_output(self.output, self.features is not None)
        check_apart(self.output, checkpoint=self.checkpoint, artifact=self.artifact)
        if self.draw is not None:
            self._check_draw(self.draw)

    @property
    def _in_parts(self) -> bool:
        return self.ray is not None and self.output is not None and not self.output.suffix

    def _check_ray(self) -> None:
        if self.ray is None:
            refuse("without --ray there are no parts", part_size=self.part_size)
            return
        if self.output is None:
            raise InputError("--ray: give --output, a folder for Parquet files, or a file as without --ray")
        if self.workers == 0:
            raise InputError("--workers 0: Ray needs at least one core to predict on; choose 1 or more")
        if self.part_size is not None and self.part_size < 1:
            raise InputError(f"--part-size {self.part_size} is out of range; choose 1 or more")
        if self.ray != LOCAL:
            refuse("the cluster's own cores predict", workers=self.workers)
        if self._in_parts:
            refuse("the output is a folder of parts", draw=self.draw)
            check_parts_folder(self.output)
            check_output_folder(self.output.parent)

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

    def _run_on_ray(self, job: Job, predictor: Predictor, address: str) -> dict[str, Any]:
        assert self.output is not None
        size = part_images(self.part_size or PART_IMAGES, job.batch_size, job.columns)
        with connect(address, self.workers):
            predict = partial(predict_on_ray, predictor, job.top, job.batch_size)
            if not self._in_parts:
                return self._run(job, lambda start: predict(divide(job.inputs, start, size)), self.output)
            totals = run_in_parts(job, self.output, size, predict, console, terminal.report)
        if problem := lack_of_images(totals.images, totals.damaged, iter(totals.problems)):
            remove(self.output)
            raise InputError(problem)
        return self._result(totals.images, totals.damaged, {}, totals.images_per_second)

    def _run(self, job: Job, source: Source, output: Path | None, place: Path | None = None) -> dict[str, Any]:
        """Run a job, write its output, and return the command's result.

        Args:
            source: gives the job's predictions.
            place: what the journal stands beside where there is no output.
        """
        where = output or place
        assert where is not None
        with open_journal(where, job.identity(), job.columns.row_bytes, job.batch_size) as journal:
            speed = job.run(journal, source, console, terminal.report)
            problem = lack_of_images(journal.count, journal.damaged, journal.records())
            if problem is None and output is not None:
                write_output(journal, output, job.columns)
            shown = {} if problem else self._show(job, journal, output)
        remove_journal(where)
        if problem is not None:
            raise InputError(problem)
        return self._result(journal.count, journal.damaged, shown, speed)

    def _result(self, images: int, damaged: int, shown: dict[str, Any], speed: float) -> dict[str, Any]:
        """Print where the predictions are, and return the command's result."""
        if self.output is not None:
            rest = f", {damaged:,} of them damaged" if damaged else ""
            console.print(f"{self.output}: {images:,} images{rest}")
        result = {"images": images, "damaged": damaged, "output": self.output and str(self.output)}
        return {**result, **shown, "images_per_second": round(speed, 1)}

    def _show(self, job: Job, journal: Journal, output: Path | None) -> dict[str, Any]:
        """Print the table, draw the sheet, and return what the result has of them."""
        shown: dict[str, Any] = {}
        if self.draw is not None:
            draw_sheet(job, list(islice(journal.records(), MAX_DRAWN)), self.draw)
            shown["draw"] = str(self.draw)
        if output is None:
            records = list(journal.records())
            console.print(prediction_table(records, job.columns.kind, job.model.classes))
            shown["predictions"] = records
        return shown


def _default_workers(images: int, has_frames: bool) -> int:
    """Return the number of reading processes: none for a few images, else one for each core."""
    return min(os.cpu_count() or 1, MAX_DEFAULT_WORKERS) if has_frames or images > FEW else 0
