"""The loop, its state and its log: from a recipe to a run folder."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad, random_seed
from torch import nn
from torch.utils.data import DataLoader

import shvit.shvit
from shvit import terminal
from shvit.checkpoint import write_checkpoint
from shvit.errors import CheckFailed, InputError
from shvit.files import write_whole

from .data import eval_loader, open_dataset, train_loader
from .evaluate import evaluate
from .recipe import Recipe, differences

console = terminal.console()


@dataclass
class Run:
    """Everything that changes while training."""

    model: nn.Module
    ema: ModelEmaV3
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    log: list[dict[str, Any]]
    """One entry for each finished epoch."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.module.load_state_dict(state["model_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log = state["log"]

    def best(self, figure: str) -> float:
        return max((entry[figure] for entry in self.log), default=-math.inf)


def train(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Trains by `recipe` into the run folder `output`; goes on at the last finished epoch if that holds this run.

    The folder then has recipe.yaml, metrics.jsonl (a line for each epoch), curves.png, last.pt (to go on from),
    best.safetensors and best_ema.safetensors (weights of the epoch with the highest accuracy).

    Returns:
        Accuracies, the better one's checkpoint, and what it was trained on.

    Raises:
        InputError: unusable photographs or fields, or `output` holds a run of another recipe.
        CheckFailed: the loss is not finite any more.
    """
    _check(recipe)
    start = time.perf_counter()
    random_seed(recipe.seed)
    training, held_out = open_dataset(recipe.data.root, "train"), open_dataset(recipe.data.root, "val")
    _claim(output, recipe)
    run, batches, held_out_batches = _set_up(recipe, training, held_out)
    if (output / "last.pt").exists():
        _resume(run, output / "last.pt")
        console.print(f"{output}: {len(run.log)} of {recipe.epochs} epochs are done, going on")
    else:
        console.print(
            f"{recipe.model} at {recipe.img_size} px, {len(training)} photographs of {len(training.classes)} classes "
            f"and {len(held_out)} held out, lr {recipe.optim.lr}·{recipe.batch_size}/512 = {recipe.peak_lr:.2e}"
        )
    for epoch in range(len(run.log), recipe.epochs):
        random_seed(recipe.seed, epoch + 1)  # an epoch draws the same after an interruption
        metrics = _train_epoch(run, recipe, batches, epoch)
        _evaluate(run, metrics, held_out_batches, len(training.classes))
        _save(run, output, metrics)
    plot(run.log, output / "curves.png")
    return _result(run, recipe, output, training.classes, len(held_out), time.perf_counter() - start)


def _check(recipe: Recipe) -> None:
    if not timm.is_model(recipe.model):
        raise InputError(f"unknown model {recipe.model!r}; `shvit list '*'` shows all")
    minimum = {"epochs": recipe.epochs, "batch_size": recipe.batch_size, "img_size": recipe.img_size}
    for name, value in minimum.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be 1 or more")


def _claim(output: Path, recipe: Recipe) -> None:
    """Writes recipe.yaml into `output`, or refuses if another recipe's is there."""
    import yaml

    path = output / "recipe.yaml"
    if path.exists():
        try:
            stored = yaml.safe_load(path.read_text())["recipe"]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a readable recipe; choose another --output") from error
        if unequal := differences(stored, recipe.as_dict()):
            raise InputError(f"{output} holds a run that differs in {', '.join(unequal)}; choose another --output")
        return
    versions = {"torch": str(torch.__version__), "timm": timm.__version__, "shvit": shvit.__version__}
    with write_whole(path) as partial:
        partial.write_text(yaml.safe_dump({"recipe": recipe.as_dict(), "versions": versions}, sort_keys=False))


def _resume(run: Run, path: Path) -> None:
    try:
        run.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # torch.load raises many types for a damaged file
        raise InputError(f"{path}: damaged ({type(error).__name__}); choose another --output") from error


def _set_up(recipe: Recipe, training: Any, held_out: Any) -> tuple[Run, DataLoader, DataLoader]:
    model = timm.create_model(recipe.model, num_classes=len(training.classes))
    model = model.to(memory_format=torch.channels_last)
    config = resolve_data_config({"input_size": (3, recipe.img_size, recipe.img_size)}, model=model)
    batches = train_loader(training, recipe, config["mean"], config["std"])
    held_out_batches = eval_loader(held_out, create_transform(**config), 2 * recipe.batch_size, recipe.data.workers)
    optim = recipe.optim
    optimizer = create_optimizer_v2(model, opt="adamw", lr=recipe.peak_lr, weight_decay=optim.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        warmup_epochs=min(optim.warmup_epochs, recipe.epochs - 1),
        warmup_prefix=True,
        warmup_lr=optim.warmup_lr,
        min_lr=optim.min_lr,
        step_on_epochs=False,
        updates_per_epoch=len(batches),
    )
    assert scheduler is not None
    ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
    return Run(model, ema, optimizer, scheduler, []), batches, held_out_batches


def _train_epoch(run: Run, recipe: Recipe, batches: DataLoader, epoch: int) -> dict[str, Any]:
    loss_of = LabelSmoothingCrossEntropy(recipe.augment.smoothing)
    run.model.train()
    losses, norms = [], []
    start = time.perf_counter()
    for index, (images, targets) in enumerate(_progress(batches, f"epoch {epoch + 1}/{recipe.epochs}")):
        update = epoch * len(batches) + index
        run.scheduler.step_update(update)
        loss = loss_of(run.model(images.contiguous(memory_format=torch.channels_last)), targets)
        run.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm(p.grad for p in run.model.parameters() if p.grad is not None).item()
        losses.append(loss.item())
        norms.append(norm)
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            raise _diverged(run, epoch, index, losses[-1], norm)
        dispatch_clip_grad(run.model.parameters(), recipe.optim.clip_grad, mode="agc")
        run.optimizer.step()
        run.ema.update(run.model, step=update)
    seconds = time.perf_counter() - start
    return {
        "epoch": epoch + 1,
        "lr": run.optimizer.param_groups[0]["lr"],
        "train_loss": sum(losses) / len(losses),
        "grad_norm": sum(norms) / len(norms),
        "images_per_s": len(losses) * (batches.batch_size or 1) / seconds,
    }


def _diverged(run: Run, epoch: int, index: int, loss: float, norm: float) -> CheckFailed:
    lr = run.optimizer.param_groups[0]["lr"]
    where = {"epoch": epoch + 1, "step": index + 1, "loss": str(loss), "grad_norm": str(norm), "lr": lr}
    return CheckFailed(
        f"the loss is {loss} with gradient norm {norm} at learning rate {lr:.2e}, epoch {epoch + 1}, step {index + 1}; "
        f"last.pt holds the {len(run.log)} finished epochs; lower --optim.lr and choose another --output",
        where,
    )


def _progress(batches: DataLoader, title: str) -> Iterator[Any]:
    """The batches, behind a progress bar on a terminal."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(batches, total=len(batches))


def _evaluate(run: Run, metrics: dict[str, Any], batches: DataLoader, num_classes: int) -> None:
    """Adds the accuracies of the weights and of their average to `metrics`, and prints them."""
    run.model.eval()
    with torch.inference_mode():
        plain = evaluate(run.model, batches, num_classes)
        averaged = evaluate(run.ema.module.eval(), batches, num_classes)
    metrics |= {"val_loss": plain.loss, "top1": plain.top1, "ema_loss": averaged.loss, "ema_top1": averaged.top1}
    console.print(
        f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.3f}, held out {plain.top1:.2f} % "
        f"(averaged weights {averaged.top1:.2f} %), lr {metrics['lr']:.1e}, {metrics['images_per_s']:.0f} images/s"
    )


def _save(run: Run, output: Path, metrics: dict[str, Any]) -> None:
    """Weights if they are the best yet, then last.pt, then the log: a crash between them costs this epoch at most."""
    for figure, name, model in (("top1", "best", run.model), ("ema_top1", "best_ema", run.ema.module)):
        if metrics[figure] > run.best(figure):
            write_checkpoint(model.state_dict(), output / f"{name}.safetensors")
    run.log.append(metrics)
    with write_whole(output / "last.pt") as partial:
        torch.save(run.state_dict(), partial)
    with write_whole(output / "metrics.jsonl") as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in run.log))


def plot(log: list[dict[str, Any]], path: Path) -> None:
    """Loss, accuracy, learning rate and gradient norm over epochs; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {
        "loss": {"train_loss": "training, smoothed labels", "val_loss": "held out", "ema_loss": "averaged weights"},
        "held-out top-1, %": {"top1": "weights", "ema_top1": "averaged weights"},
        "learning rate": {"lr": "last step of the epoch"},
        "gradient norm": {"grad_norm": "mean before clipping"},
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    epochs = [entry["epoch"] for entry in log]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for key, label in lines.items():
            axis.plot(epochs, [entry[key] for entry in log], marker="o", markersize=3, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    with write_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def _result(
    run: Run, recipe: Recipe, output: Path, classes: list[str], held_out: int, seconds: float
) -> dict[str, Any]:
    top1, ema_top1 = run.best("top1"), run.best("ema_top1")
    checkpoint = output / ("best_ema.safetensors" if ema_top1 >= top1 else "best.safetensors")
    console.print(f"best held-out accuracy {top1:.2f} %, of the averaged weights {ema_top1:.2f} %; see {checkpoint}")
    return {
        "output": str(output),
        "checkpoint": str(checkpoint),
        "model": recipe.model,
        "img_size": recipe.img_size,
        "epochs": len(run.log),
        "top1": top1,
        "ema_top1": ema_top1,
        "n_val": held_out,
        "classes": classes,
        "seconds": round(seconds, 1),
    }
