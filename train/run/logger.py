"""Logging of a run: a progress bar or plain lines, and TensorBoard scalars."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..evaluate.tasks import TaskFigures
from ..recipe import Recipe
from ..step.state import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LINE_SECONDS = 60.0  # between two plain lines within an epoch


class TrainLogger:
    """Times steps and loader waits, and logs them. A context manager around the training loop."""

    def __init__(self, folder: Path, recipe: Recipe, run: Run, steps_per_epoch: int, console: Console):
        self.recipe = recipe
        self.run = run
        self.steps_per_epoch = steps_per_epoch
        self.console = console
        self.writer: SummaryWriter | None = None
        if run.world.primary:
            from torch.utils import tensorboard

            self.writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=run.step + 1)
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        epoch, total = f"{run.step // steps_per_epoch + 1}/{recipe.epochs}", recipe.epochs * steps_per_epoch
        self.bar = self.progress.add_task("", total=total, completed=run.step, epoch=epoch, status="")
        self.loss = torch.zeros((), device=run.world.device)
        self.norm_before, self.steps_before = 0.0, 0.0
        self._begin_window()
        self._begin_epoch()
        self.last_line = time.perf_counter()

    def __enter__(self) -> "TrainLogger":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def _begin_window(self) -> None:
        """Start to collect the steps between two flushes."""
        self.window = time.perf_counter()
        self.window_images = self.window_steps = 0
        self.window_wait = 0.0
        self.loss.zero_()

    def _begin_epoch(self) -> None:
        self.epoch_images, self.epoch_seconds, self.epoch_wait = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a block that waits for the data loader."""
        start = time.perf_counter()
        yield
        self.window_wait += time.perf_counter() - start

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Exclude a block that writes a state from the training time."""
        start = time.perf_counter()
        yield
        self.window += time.perf_counter() - start

    def log_step(self, loss: torch.Tensor, images: int) -> None:
        """Record a step, without waiting for the device."""
        self.loss += loss
        self.window_images += images
        self.window_steps += 1

    def flush(self) -> tuple[float, float]:
        """Write scalars to TensorBoard, and return mean loss and gradient norm since the last flush."""
        run = self.run
        sums = torch.stack([self.loss.double() / self.window_steps, run.sums[1], run.sums[2]])
        loss, norm_sum, steps = sums.tolist()  # waits for the device, once
        norm = (norm_sum - self.norm_before) / max(steps - self.steps_before, 1)
        self.norm_before, self.steps_before = norm_sum, steps
        seconds = time.perf_counter() - self.window
        speed, wait = self.window_images / seconds, self.window_wait / seconds
        self.epoch_images += self.window_images
        self.epoch_seconds += seconds
        self.epoch_wait += self.window_wait
        self._begin_window()
        scalars = {"loss": loss, "lr": run.lr, "grad_norm": norm, "images_per_s": speed, "loader_wait": wait}
        self._write({f"train/{name}": value for name, value in scalars.items()})
        epoch = (run.step - 1) // self.steps_per_epoch + 1
        status = f"loss {loss:.3f}, {speed:.0f} images/s, {wait:.0%} waiting"
        self.progress.update(self.bar, completed=run.step, epoch=f"{epoch}/{self.recipe.epochs}", status=status)
        self._line(epoch, loss, speed, wait)
        return loss, norm

    def _line(self, epoch: int, loss: float, speed: float, wait: float) -> None:
        """Print a line once a minute where there is no terminal."""
        now, run = time.perf_counter(), self.run
        if self.console.is_terminal or now - self.last_line < LINE_SECONDS or run.step % self.steps_per_epoch == 0:
            return
        self.last_line = now
        left = (self.recipe.epochs * self.steps_per_epoch - run.step) * self.recipe.batch_size / speed
        self.console.print(
            f"epoch {epoch}, step {run.step % self.steps_per_epoch}/{self.steps_per_epoch}: loss {loss:.3f}, "
            f"{speed:.0f} images/s, {wait:.0%} waiting for images, {left / 60:.0f} minutes left"
        )

    def throughput(self) -> dict[str, float]:
        """Return images per second, and the fraction of time spent on loader waits, since the last evaluation."""
        seconds = max(self.epoch_seconds, 1e-9)
        return {"images_per_s": self.epoch_images / seconds, "loader_wait": self.epoch_wait / seconds}

    def log_evaluation(self, entry: dict[str, Any], figures: TaskFigures) -> None:
        """Print a line and write scalars after an evaluation."""
        names = ("val_loss", *figures.logged, "ema_loss", *(f"ema_{name}" for name in figures.logged))
        self._write({f"val/{name.removeprefix('val_')}": entry[name] for name in names})
        best, ema_best = (figures.text(entry[name]) for name in (figures.best, f"ema_{figures.best}"))
        self.console.print(
            f"epoch {entry['epoch']}: loss {entry['train_loss']:.3f}, validation {best} "
            f"(EMA weights {ema_best}), lr {entry['lr']:.1e}, {entry['images_per_s']:.0f} images/s"
        )
        self.norm_before = self.steps_before = 0.0
        self._begin_epoch()
        self._begin_window()
        self.last_line = time.perf_counter()

    def _write(self, scalars: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, self.run.step)
