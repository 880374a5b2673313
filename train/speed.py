"""Training speed of a recipe on this machine: the step, the loader, both together, and the loop's overhead.

Cases are interleaved round by round, in reversed order every other round, so that ratios hold on a busy machine.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from timm.utils import dispatch_clip_grad
from torch import nn

from shvit import terminal
from shvit.environment import take_turns
from shvit.errors import InputError
from shvit.img_size import ImgSize

from .distributed import World, join
from .loop import Training
from .recipe import Compute, Recipe
from .run.logger import TrainLogger
from .signals import SignalHandler
from .step.batch import Batch
from .step.loader import TrainLoader
from .step.setup import check_recipe, open_images, open_training, set_up
from .step.state import PRECISIONS, Run

ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """Images per second of this machine, over all processes; medians over rounds, ratios taken round by round."""

    model: str
    img_size: ImgSize
    batch_size: int
    steps: int
    step_images_per_s: float
    """The optimizer step alone, on a batch in memory."""
    plain_images_per_s: float
    """The same in float32, eager, contiguous."""
    speedup: float
    """Speed of the recipe's settings over the plain ones."""
    loader_images_per_s: float
    """The loader alone, with the recipe's workers, after their start."""
    one_worker_images_per_s: float
    """The loader alone, with one worker."""
    loader_scaling: float
    """Speed of the loader over that of one worker times the number of workers."""
    both_images_per_s: float
    """Steps on batches from the loader."""
    overhead_percent: float
    """Time that the loop adds to mixing, forward, backward, clipping, optimizer and EMA: checks, scalars, schedule."""
    peak_memory_mb: float | None
    """Peak memory of this process and its largest worker, or of the GPU; None where the system does not report it."""
    device: str
    threads: int
    workers: int


def benchmark(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Measure `steps` steps of each kind and print a table.

    Raises:
        InputError: as `train`, or `steps` is below 1.
    """
    if steps < 1:
        raise InputError(f"--benchmark {steps} must be 1 or more steps")
    with join(recipe.compute.device) as world, tempfile.TemporaryDirectory() as folder:
        speed = _measure(recipe, world, steps, Path(folder))
    table = Table("what", "images/s")
    rows = {
        "step alone": speed.step_images_per_s,
        "step alone, plain float32": speed.plain_images_per_s,
        f"loader alone, {speed.workers} workers": speed.loader_images_per_s,
        "loader alone, 1 worker": speed.one_worker_images_per_s,
        "both": speed.both_images_per_s,
    }
    for name, value in rows.items():
        table.add_row(name, f"{value:.1f}")
    console = terminal.console()
    console.print(table)
    memory = "not reported by the system" if speed.peak_memory_mb is None else f"{speed.peak_memory_mb:.0f} MB"
    console.print(
        f"settings {speed.speedup:.2f}× plain, the loop adds {speed.overhead_percent:.1f} %, peak memory {memory}; "
        f"{speed.device}, {speed.threads} threads"
    )
    return asdict(speed)


def _measure(recipe: Recipe, world: World, steps: int, folder: Path) -> Speed:
    accum_steps = check_recipe(recipe, world)
    splits, preprocessing = open_images(recipe, world)
    classes, train_loader = open_training(recipe, world, accum_steps, splits, preprocessing)
    plain_recipe = replace(recipe, compute=Compute(
        device=recipe.compute.device, device_batch_size=recipe.compute.device_batch_size, channels_last=False,
    ))  # fmt: skip
    training = Training(
        recipe, folder, world, classes, train_loader, accum_steps, SignalHandler(), splits, preprocessing
    )
    run, per_epoch = training.run, train_loader.steps_per_epoch
    plain = set_up(plain_recipe, world, classes, per_epoch, accum_steps, train_loader.statistics, preprocessing)
    training.logger = TrainLogger(folder, recipe, run, train_loader.steps_per_epoch, terminal.console(quiet=True))
    batches = list(islice(train_loader.batches(0, 1), accum_steps))
    endless = repeat(batches[0])
    per_round = max(1, -(-steps // ROUNDS))

    def looped() -> None:
        training._step(endless)
        if run.step % recipe.save.log_steps == 0:
            training._flush_log()

    cases = {"step": _bare_step(run, batches), "plain": _bare_step(plain, batches), "loop": looped}
    seconds = _interleave(cases, per_round, world)
    single = open_training(
        replace(recipe, data=replace(recipe.data, workers=1)), world, accum_steps, splits, preprocessing
    )[1]
    loader, one, both = _loaders(recipe, train_loader, single, run, steps, world, accum_steps)
    size, workers = recipe.batch_size, recipe.data.workers
    memory = torch.cuda.max_memory_allocated() / 1e6 if world.device.type == "cuda" else _peak_memory_mb()
    ratio = {name: median(a / b for a, b in zip(seconds[name], seconds["step"], strict=True)) for name in seconds}
    return Speed(
        model=recipe.model,
        img_size=recipe.img_size,
        batch_size=size,
        steps=steps,
        step_images_per_s=size / median(seconds["step"]),
        plain_images_per_s=size / median(seconds["plain"]),
        speedup=ratio["plain"],
        loader_images_per_s=loader,
        one_worker_images_per_s=one,
        loader_scaling=loader / (one * max(workers, 1)),
        both_images_per_s=both,
        overhead_percent=100 * (ratio["loop"] - 1),
        peak_memory_mb=memory,
        device=torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        workers=workers,
    )


def _peak_memory_mb() -> float | None:
    """Return the peak memory of this process and its largest child; None on Windows, which has no getrusage."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss is in bytes there, in kB elsewhere
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / unit


def _bare_step(run: Run, batches: list[Batch]) -> Callable[[], None]:
    """Return the least that a step must do: the recipe's mixing on the device, and the update of the weights."""
    optim = run.recipe.optim
    dtype = PRECISIONS[run.recipe.compute.precision]

    def step() -> None:
        run.train_mode()
        for batch in batches:
            images, targets = run.augment(batch, 0, 0)
            with torch.autocast(run.world.device.type, dtype, enabled=dtype is not None):
                loss = run.task(images, targets)["loss"] / len(batches)
            run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
        if optim.clip_grad is not None:
            dispatch_clip_grad(list(run.model.parameters()), optim.clip_grad, mode=optim.clip_mode)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        run.task.update_ema(run.step)

    return step


def _interleave(cases: dict[str, Callable[[], None]], count: int, world: World) -> dict[str, list[float]]:
    """Measure seconds per call of each case in each round, after two calls to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for call in cases.values():
        call()
        call()
    for _, name in take_turns(list(cases), ROUNDS):
        _wait(world)
        start = time.perf_counter()
        for _ in range(count):
            cases[name]()
        _wait(world)
        seconds[name].append((time.perf_counter() - start) / count)
    return seconds


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _loaders(
    recipe: Recipe,
    train_loader: TrainLoader,
    single: TrainLoader,
    run: Run,
    steps: int,
    world: World,
    accum_steps: int,
) -> tuple[float, float, float]:
    """Measure images per second of the loader, of the loader with one worker, and of steps on its batches."""
    images, workers = recipe.batch_size * steps, recipe.data.workers

    def consume(loader: TrainLoader, use: Callable[[list[Batch]], None]) -> float:
        ahead = 1 + 4 * max(workers, 1)  # steps that workers prefetch
        batches: Iterator[Batch] = loader.batches(0, steps + ahead)
        for _ in range(ahead):
            use(list(islice(batches, accum_steps)))
        start = time.perf_counter()
        for _ in range(steps):
            use(list(islice(batches, accum_steps)))
        _wait(world)
        return images / (time.perf_counter() - start)

    def step(batches: list[Batch]) -> None:
        run.update(run.forward_backward(batches))

    def drop(batches: list[Batch]) -> None:
        pass

    one = consume(single, drop)
    loader = consume(train_loader, drop) if workers != 1 else one
    return loader, one, consume(train_loader, step)
