"""The loop: from a recipe to a run folder, whatever happens on the way."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.utils import distribute_bn

from shvit import terminal
from shvit.checkpoint import write_checkpoint
from shvit.errors import CheckFailed, InputError
from shvit.weights.run_info import RunInfo, read_recipe_file

from .data import Splits, check_class_of, is_stream, open_splits
from .distributed import World, join
from .evaluate import Evaluation, count
from .feed import Batch, Feed, Problem
from .folder import RunFolder
from .interrupt import Interrupt, Stopped
from .journal import Journal
from .plots import plot_curves
from .recipe import Recipe
from .setup import check_recipe, open_held_out, open_training, set_up
from .splits import check_outside
from .summary import print_splits


def train(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Trains by `recipe` into the run folder `output`; goes on where it stopped if that holds this run.

    The folder then has recipe.yaml, metrics.jsonl (a line for each evaluation), tensorboard/, curves.png, last.pt (to
    go on from), best.safetensors and best_ema.safetensors (weights of the epoch with the highest accuracy).
    With torchrun or SLURM every process calls this, and the first one writes.

    Returns:
        Accuracies, the better one's checkpoint, and what it was trained on.

    Raises:
        InputError: unusable images or fields, or `output` holds a run of another recipe.
        CheckFailed: the loss is not finite any more.
        SystemExit: a signal asked to stop; the state is saved (status 143 for SIGTERM, 130 for SIGINT).
    """
    if recipe.data.name in ("", "torch/image_folder", "torch/folder"):
        check_outside(output, recipe.data.root)
    interrupt = Interrupt()
    try:
        with join(recipe.compute.device) as world, interrupt.handled():
            turns = check_recipe(recipe, world)
            splits = None if is_stream(recipe.data) else open_splits(recipe.data)
            classes, feed = open_training(recipe, world, turns, splits)
            return Training(recipe, output, world, classes, feed, turns, interrupt, splits).run_all()
    except Stopped as stop:
        raise SystemExit(128 + stop.number) from stop


class Training:
    """A run under way in one process."""

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        world: World,
        classes: list[str],
        feed: Feed,
        turns: int,
        interrupt: Interrupt,
        splits: Splits | None,
    ):
        self.recipe = recipe
        self.world = world
        self.classes = classes
        self.feed = feed
        self.splits = splits
        self.interrupt = interrupt
        self.folder = RunFolder(output, recipe.save.keep)
        self.console = terminal.console(quiet=not world.primary)
        self.total_steps = recipe.epochs * feed.steps_per_epoch
        self.run = set_up(recipe, world, classes, feed.steps_per_epoch, turns)
        config = resolve_data_config({"input_size": (3, recipe.img_size, recipe.img_size)}, model=self.run.model)
        self.info = RunInfo(
            model=recipe.model,
            classes=tuple(classes),
            img_size=recipe.img_size,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )
        self.held_out, self.held_out_count = open_held_out(recipe, world, config, splits)
        self.corrupt: dict[str, int] = {}

    def run_all(self) -> dict[str, Any]:
        with self.folder.locked() if self.world.primary else nullcontext():
            return self._run_all()

    def _run_all(self) -> dict[str, Any]:
        start = time.perf_counter()
        if self.world.primary:
            images = self.splits.identity() if self.splits else {"train": {"count": self.feed.length}}
            self.folder.claim(self.recipe, self.classes, images)
            claimed = read_recipe_file(self.folder.path / "recipe.yaml")
            self.info = replace(self.info, data=claimed.data if claimed else None)
        self._resume()
        self.begin = start - self.run.seconds
        self.journal = Journal(self.folder.path, self.recipe, self.run, self.feed.steps_per_epoch, self.console)
        self.last_save = time.perf_counter()
        self.interrupt.when_late = self._write_state
        try:
            with self.journal:
                self._all_steps()
        except (Stopped, RuntimeError):
            if not self.interrupt.expected():
                raise
            with self.interrupt.shielded():  # at its end Stopped goes on
                self._save_stopped()
        if self.world.primary and self.run.log:
            plot_curves(self.run.log, self.folder.path / "curves.png")
        return self._result()

    def _resume(self) -> None:
        state = self.folder.load_state(self.warn) if self.world.primary else None
        state = self.world.share(state)
        recipe, run = self.recipe, self.run
        if state is not None:
            run.load_state_dict(state)
            self.console.print(f"{self.folder.path}: {run.step} of {self.total_steps} steps are done, going on")
            return
        if self.splits is not None and self.world.primary:
            print_splits(self.splits, self.console)
        held_out = f", {self.held_out_count} held out" if self.held_out_count is not None else ""
        self.console.print(
            f"{recipe.model} at {recipe.img_size} px, {self.feed.length} images of {len(self.classes)} classes"
            f"{held_out}, lr {recipe.optim.lr}·{recipe.batch_size}/512 = {recipe.peak_lr:.2e}"
        )
        if self.world.size > 1 or run.turns > 1:
            most, least = self.feed.sizes[0], self.feed.sizes[-1]
            each = f"{most}" if most == least else f"{least} or {most}"
            self.console.print(f"batch {recipe.batch_size} = {self.world.size} processes × {run.turns} turns × {each}")

    # --- steps --------------------------------------------------------------------------------------------------------

    def _all_steps(self) -> None:
        """Every step that is left, an evaluation behind each epoch that is due one, and states in between."""
        run, per_epoch = self.run, self.feed.steps_per_epoch
        batches: Iterator[Batch] | None = None
        while True:
            self._evaluate_if_due()
            if run.step >= self.total_steps:
                return
            if batches is None:
                batches = self.feed.batches(run.step, self.total_steps)
            run.train_mode()
            boundary = (run.step // per_epoch + 1) * per_epoch
            while run.step < boundary:
                self._step(batches)
                if run.step % self.recipe.save.log_steps == 0 or run.step == boundary:
                    self._look()
                if time.perf_counter() - self.last_save > 60 * self.recipe.save.every_minutes:
                    self._save()

    def _step(self, batches: Iterator[Batch]) -> None:
        run = self.run
        with self.journal.waiting():
            mine = list(islice(batches, run.turns))
        self._report_corrupt(problem for batch in mine for problem in batch.problems)
        loss = run.forward_backward(mine)
        with self.interrupt.shielded():
            run.update(loss)
        self.journal.stepped(loss, self.recipe.batch_size)

    def warn(self, message: str) -> None:
        """To stderr, from whichever process."""
        terminal.report(message)

    def _report_corrupt(self, problems: Iterable[Problem]) -> None:
        problem = ""
        for problem, index, images in problems:
            if problem not in self.corrupt:
                self.corrupt[problem] = images
                self.warn(f"passed over: {problem}")
                check_class_of(self.feed.dataset, index)
        limit = min(self.recipe.data.max_corrupt, self.feed.length - 1)
        if (count := sum(self.corrupt.values())) > limit:
            raise InputError(f"{count} damaged images, and {limit} are allowed; mend or remove them, "
                             f"or give --data.max-corrupt; one of them: {problem}")  # fmt: skip

    def _look(self) -> None:
        """Writes scalars, and stops a run whose loss is not finite."""
        loss, norm = self.journal.look()
        if not math.isfinite(loss):
            raise self._diverged(loss, norm)

    def _diverged(self, loss: float, norm: float) -> CheckFailed:
        run, steps = self.run, self.recipe.save.log_steps
        epoch = (run.step - 1) // self.feed.steps_per_epoch + 1
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
        run, per_epoch = self.run, self.feed.steps_per_epoch
        epoch, within = divmod(run.step, per_epoch)
        done = run.log[-1]["epoch"] if run.log else 0
        due = epoch % self.recipe.save.eval_epochs == 0 or epoch == self.recipe.epochs
        if within or epoch <= done or not due:
            return
        plain, averaged = self._accuracy(run.model), self._accuracy(run.ema)
        sums = run.sums.tolist()
        entry = {
            "epoch": epoch,
            "step": run.step,
            "lr": run.lr,
            "train_loss": sums[0] / sums[2],
            "grad_norm": sums[1] / sums[2],
            **self.journal.speed(),
            "val_loss": plain.loss,
            "top1": plain.top1,
            "top5": plain.top5,
            "ema_loss": averaged.loss,
            "ema_top1": averaged.top1,
            "ema_top5": averaged.top5,
            "n_val": plain.n,
        }
        self.journal.evaluated(entry)
        with self.interrupt.shielded():
            if self.world.primary:
                self._keep_best(entry)
            run.log.append(entry)
            run.sums.zero_()
            self._save()
            if self.world.primary:
                self.folder.write_log(run.log)

    def _accuracy(self, model: torch.nn.Module) -> Evaluation:
        """On all held-out images, each in one process, in float32; BatchNorm's statistics are the primary's."""
        model.eval()
        if self.world.size > 1:
            distribute_bn(model, self.world.size)
        memory_format = torch.channels_last if self.recipe.compute.channels_last else torch.contiguous_format

        def predict(images: torch.Tensor) -> torch.Tensor:
            return model(images.to(memory_format=memory_format))

        with torch.inference_mode():
            counts = count(predict, self.held_out, len(self.classes), self.world.device)
        try:
            return counts.summed(self.world.sum).evaluation()
        except InputError as error:
            state = next(iter(self.folder.states), None)
            kept = f"{state} holds the last state before it" if state else "no state was saved yet"
            raise CheckFailed(f"step {self.run.step}: {error}; {kept}; lower --optim.lr and choose another --output",
                              {"step": self.run.step, "state": str(state) if state else None}) from error  # fmt: skip

    def _keep_best(self, entry: dict[str, Any]) -> None:
        for figure, name, model in (("top1", "best", self.run.model), ("ema_top1", "best_ema", self.run.ema)):
            if entry[figure] > self.run.best(figure):
                write_checkpoint(model.state_dict(), self.folder.path / f"{name}.safetensors", self.info.metadata)

    # --- states -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        with self.interrupt.shielded():
            self._write_state()

    def _write_state(self) -> None:
        """The primary's, unless its loss is not finite."""
        if not (self.world.primary and self.run.finite):
            return
        self.run.seconds = time.perf_counter() - self.begin
        with self.journal.saving():
            self.folder.save_state({**self.run.state_dict(), **self.info.metadata})
        self.last_save = time.perf_counter()

    def _save_stopped(self) -> None:
        """What the last finished step left, when a signal asked to stop."""
        self._save()
        self.console.print(f"stopped at step {self.run.step}; the same command goes on from there")

    def _result(self) -> dict[str, Any]:
        run, path = self.run, self.folder.path
        top1, ema_top1 = run.best("top1"), run.best("ema_top1")
        checkpoint = path / ("best_ema.safetensors" if ema_top1 >= top1 else "best.safetensors")
        self.console.print(
            f"best held-out accuracy {top1:.2f} %, of the averaged weights {ema_top1:.2f} %; see {checkpoint}"
        )
        return {
            "output": str(path),
            "checkpoint": str(checkpoint),
            "model": self.recipe.model,
            "img_size": self.recipe.img_size,
            "epochs": run.log[-1]["epoch"],
            "steps": run.step,
            "top1": top1,
            "ema_top1": ema_top1,
            "last_top1": run.log[-1]["top1"],
            "last_ema_top1": run.log[-1]["ema_top1"],
            "n_val": run.log[-1].get("n_val", 0),
            "classes": self.classes,
            "seconds": round(run.seconds, 1),
        }
