"""The training loop: from a recipe to a run folder, through signals, damaged images and crashes."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn

from shvit import terminal
from shvit.checkpoint import write_checkpoint
from shvit.errors import CheckFailed, InputError
from shvit.weights.run_info import RunInfo, read_recipe_file

from .data.datasets import Splits, check_class_of
from .data.pixels.preprocessing import Preprocessing
from .data.splits import check_outside
from .distributed import World, join
from .evaluate.tasks import FIGURES, Evaluation
from .recipe import Recipe
from .run.logger import TrainLogger
from .run.plots import plot_curves
from .run.run_folder import RunFolder
from .run.summary import describe_balance, describe_channels, describe_targets, print_splits
from .signals import SignalHandler, Stopped
from .step.batch import Batch, Problem
from .step.loader import TrainLoader
from .step.setup import check_recipe, open_images, open_training, open_validation, set_up


def train(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Train by `recipe` into the run folder `output`; resume if that holds this run.

    The folder then has recipe.yaml, metrics.jsonl (a line for each evaluation), tensorboard/, curves.png, last.pt (to
    resume from), best.safetensors and best_ema.safetensors (weights of the epoch with the highest accuracy).
    With torchrun or SLURM every process calls this, and the first one writes.

    Returns:
        Accuracies, the checkpoint of the better one, and the classes.

    Raises:
        InputError: unusable images or fields, or a run of another recipe in `output`.
        CheckFailed: the loss is no longer finite.
        SystemExit: a signal asked to stop; the state is saved (status 143 for SIGTERM, 130 for SIGINT).
    """
    if recipe.data.name in ("", "torch/image_folder", "torch/folder"):
        check_outside(output, recipe.data.root)
    signals = SignalHandler()
    try:
        with join(recipe.compute.device) as world, signals.installed():
            accum_steps = check_recipe(recipe, world)
            stored = RunFolder(output).preprocessing()
            console = terminal.console(quiet=not world.primary)
            splits, preprocessing = open_images(recipe, world, stored, console.print)
            classes, loader = open_training(recipe, world, accum_steps, splits, preprocessing)
            training = Training(recipe, output, world, classes, loader, accum_steps, signals, splits, preprocessing)
            with training.folder.locked() if world.primary else nullcontext():
                return training.run_all()
    except Stopped as stop:
        raise SystemExit(128 + stop.number) from stop


class Training:
    """A training run in one process."""

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        world: World,
        classes: list[str],
        loader: TrainLoader,
        accum_steps: int,
        signals: SignalHandler,
        splits: Splits | None,
        preprocessing: Preprocessing,
    ):
        self.recipe = recipe
        self.world = world
        self.classes = classes
        self.loader = loader
        self.splits = splits
        self.signals = signals
        self.folder = RunFolder(output, recipe.save.keep)
        self.console = terminal.console(quiet=not world.primary)
        self.total_steps = recipe.epochs * loader.steps_per_epoch
        self.figures = FIGURES[recipe.task]
        steps = loader.steps_per_epoch
        self.run = set_up(recipe, world, classes, steps, accum_steps, loader.statistics, preprocessing)
        self.preprocessing = preprocessing
        self.info = RunInfo(
            model=recipe.model,
            classes=tuple(classes),
            img_size=recipe.img_size,
            task=recipe.task,
            **preprocessing.stored,
        )
        self.validation, self.validation_count = open_validation(recipe, world, preprocessing, splits)
        self.corrupt: dict[str, int] = {}

    def run_all(self) -> dict[str, Any]:
        """Train all steps that are left, and return the run's result."""
        start = time.perf_counter()
        if self.world.primary:
            images = self.splits.identity() if self.splits else {"train": {"count": self.loader.length}}
            self.folder.claim(self.recipe, self.classes, images, self.preprocessing.stored)
            claimed = read_recipe_file(self.folder.path / "recipe.yaml")
            self.info = replace(self.info, data=claimed.data if claimed else None)
        self._resume()
        self.begin = start - self.run.seconds
        self.logger = TrainLogger(self.folder.path, self.recipe, self.run, self.loader.steps_per_epoch, self.console)
        self.last_save = time.perf_counter()
        self.signals.when_late = self._write_state
        try:
            with self.logger:
                self._all_steps()
        except Stopped:
            with self.signals.defer_signals():  # Stopped is raised again at its end
                self._save_stopped()
        if self.world.primary and self.run.log:
            plot_curves(self.run.log, self.folder.path / "curves.png")
        return self._result()

    def _resume(self) -> None:
        state = self.folder.load_state(self.warn) if self.world.primary else None
        state = self.world.broadcast(state)
        recipe, run = self.recipe, self.run
        if state is not None:
            run.load_state_dict(state)
            self.console.print(f"{self.folder.path}: {run.step} of {self.total_steps} steps are done, resuming")
            return
        if self.splits is not None and self.world.primary:
            print_splits(self.splits, self.console)
        validation = f", {self.validation_count} for validation" if self.validation_count is not None else ""
        targets = describe_targets(recipe, self.classes)
        self.console.print(
            f"{recipe.model} at {recipe.img_size} px, {self.loader.length} images {targets}"
            f"{validation}, lr {recipe.optim.lr}·{recipe.batch_size}/512 = {recipe.peak_lr:.2e}"
        )
        for line in describe_channels(recipe, self.preprocessing):
            self.console.print(line)
        if self.loader.statistics.class_counts is not None:
            self.console.print(describe_balance(recipe, self.classes, self.loader.statistics))
        if self.world.size > 1 or run.accum_steps > 1:
            largest, smallest = self.loader.sizes[0], self.loader.sizes[-1]
            each = f"{largest}" if largest == smallest else f"{smallest} or {largest}"
            self.console.print(
                f"batch {recipe.batch_size} = {self.world.size} processes × {run.accum_steps} "
                f"gradient accumulation steps × {each}"
            )

    # --- steps --------------------------------------------------------------------------------------------------------

    def _all_steps(self) -> None:
        """Train every step that is left, with evaluations at the ends of epochs and saves in between."""
        run, per_epoch = self.run, self.loader.steps_per_epoch
        batches: Iterator[Batch] | None = None
        while True:
            self._evaluate_if_due()
            if run.step >= self.total_steps:
                return
            if batches is None:
                with self.signals.defer_signals():
                    batches = self.loader.batches(run.step, self.total_steps)
            run.train_mode()
            boundary = (run.step // per_epoch + 1) * per_epoch
            while run.step < boundary:
                self._step(batches)
                if run.step % self.recipe.save.log_steps == 0 or run.step == boundary:
                    self._flush_log()
                if time.perf_counter() - self.last_save > 60 * self.recipe.save.every_minutes:
                    self._save()

    def _step(self, batches: Iterator[Batch]) -> None:
        run = self.run
        with self.logger.waiting():
            micro_batches = list(islice(batches, run.accum_steps))
        self._report_corrupt(problem for batch in micro_batches for problem in batch.problems)
        loss = run.forward_backward(micro_batches)
        with self.signals.defer_signals():
            run.update(loss)
        self.logger.log_step(loss, self.recipe.batch_size)

    def warn(self, message: str) -> None:
        """Print a warning on stderr, in any process."""
        terminal.report(message)

    def _report_corrupt(self, problems: Iterable[Problem]) -> None:
        problem = ""
        for problem, index, images in problems:
            if problem not in self.corrupt:
                self.corrupt[problem] = images
                self.warn(f"skipped: {problem}")
                check_class_of(self.loader.dataset, index)
        limit = min(self.recipe.data.max_corrupt, self.loader.length - 1)
        if (count := sum(self.corrupt.values())) > limit:
            raise InputError(f"{count} damaged images, and {limit} are allowed; fix or remove them, "
                             f"or give --data.max-corrupt; one of them: {problem}")  # fmt: skip

    def _flush_log(self) -> None:
        """Write scalars, and stop a run whose loss is not finite."""
        loss, norm = self.logger.flush()
        if not math.isfinite(loss):
            raise self._diverged(loss, norm)

    def _diverged(self, loss: float, norm: float) -> CheckFailed:
        run, steps = self.run, self.recipe.save.log_steps
        epoch = (run.step - 1) // self.loader.steps_per_epoch + 1
        state = next(iter(self.folder.states), None)
        kept = f"{state} holds the last good state" if state else "no state was saved yet"
        return CheckFailed(
            f"the loss is {loss} with gradient norm {norm} at learning rate {run.lr:.2e}, epoch {epoch}, within the "
            f"{steps} steps up to {run.step}; {kept}; lower --optim.lr and choose another --output",
            {"epoch": epoch, "step": run.step, "loss": str(loss), "grad_norm": str(norm), "lr": run.lr,
             "state": str(state) if state else None},
        )  # fmt: skip

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        run, per_epoch = self.run, self.loader.steps_per_epoch
        epoch, within = divmod(run.step, per_epoch)
        done = run.log[-1]["epoch"] if run.log else 0
        due = epoch % self.recipe.save.eval_epochs == 0 or epoch == self.recipe.epochs
        if within or epoch <= done or not due:
            return
        plain, ema = self._evaluate(run.model), self._evaluate(run.ema)
        sums = run.sums.tolist()
        entry = {
            "epoch": epoch,
            "step": run.step,
            "lr": run.lr,
            "train_loss": sums[0] / sums[2],
            "grad_norm": sums[1] / sums[2],
            **self.logger.throughput(),
            "val_loss": plain.loss,
            **{name: getattr(plain, name) for name in self.figures.logged},
            "ema_loss": ema.loss,
            **{f"ema_{name}": getattr(ema, name) for name in self.figures.logged},
            "n_val": plain.n,
        }
        self.logger.log_evaluation(entry, self.figures)
        with self.signals.defer_signals():
            if self.world.primary:
                self._keep_best("best", run.model, plain, self.figures.best)
                self._keep_best("best_ema", run.ema, ema, f"ema_{self.figures.best}")
            run.log.append(entry)
            run.sums.zero_()
            self._save()
            if self.world.primary:
                self.folder.write_log(run.log)

    def _evaluate(self, model: torch.nn.Module) -> Evaluation:
        """Evaluate on all validation images, each in one process, in float32, with the primary's BatchNorm."""
        model.eval()
        if self.world.size > 1:
            distribute_bn(model, self.world.size)
        memory_format = torch.channels_last if self.recipe.compute.channels_last else torch.contiguous_format

        scale = self.run.scale

        def predict(images: torch.Tensor) -> torch.Tensor:
            outputs = model(images.to(memory_format=memory_format))
            return outputs if scale is None else scale.values(outputs.float())

        with torch.inference_mode():
            totals = self.figures.totals(predict, self.validation, len(self.classes), self.world.device)
        try:
            return totals.across(self.world).evaluation()
        except InputError as error:
            state = next(iter(self.folder.states), None)
            kept = f"{state} holds the last state before it" if state else "no state was saved yet"
            raise CheckFailed(f"step {self.run.step}: {error}; {kept}; lower --optim.lr and choose another --output",
                              {"step": self.run.step, "state": str(state) if state else None}) from error  # fmt: skip

    def _keep_best(self, name: str, model: torch.nn.Module, evaluation: Evaluation, figure: str) -> None:
        """Write the weights if their figure is the highest so far, with the thresholds that these images choose."""
        if getattr(evaluation, self.figures.best) <= self.run.best(figure):
            return
        info = replace(self.info, thresholds=getattr(evaluation, "best_thresholds", ()))
        write_checkpoint(self.run.weights(model), self.folder.path / f"{name}.safetensors", info.metadata)

    # --- states -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        with self.signals.defer_signals():
            self._write_state()

    def _write_state(self) -> None:
        """Write the state, in the primary process and if its loss is finite."""
        if not (self.world.primary and self.run.finite):
            return
        self.run.seconds = time.perf_counter() - self.begin
        with self.logger.saving():
            self.folder.save_state({**self.run.state_dict(), **self.info.metadata})
        self.last_save = time.perf_counter()

    def _save_stopped(self) -> None:
        """Save the state of the last finished step, after a signal asked to stop."""
        self._save()
        self.console.print(f"stopped at step {self.run.step}; the same command resumes from there")

    def _result(self) -> dict[str, Any]:
        run, path = self.run, self.folder.path
        figure, ema_figure = self.figures.best, f"ema_{self.figures.best}"
        best, ema_best = run.best(figure), run.best(ema_figure)
        checkpoint = path / ("best_ema.safetensors" if ema_best >= best else "best.safetensors")
        self.console.print(f"best on validation images: {self.figures.text(best)}, EMA weights "
                           f"{self.figures.text(ema_best)}; see {checkpoint}")  # fmt: skip
        return {
            "output": str(path),
            "checkpoint": str(checkpoint),
            "model": self.recipe.model,
            "img_size": self.recipe.img_size,
            "epochs": run.log[-1]["epoch"],
            "steps": run.step,
            figure: best,
            ema_figure: ema_best,
            f"last_{figure}": run.log[-1][figure],
            f"last_{ema_figure}": run.log[-1][ema_figure],
            "n_val": run.log[-1].get("n_val", 0),
            "classes": self.classes,
            "seconds": round(run.seconds, 1),
        }
