"""How fast a recipe trains here: the step, the loader, both together, and what the run itself costs.

Cases take turns round by round, in reversed order every other round, so that ratios hold on a busy machine.
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
from shvit.errors import InputError

from .data.datasets import open_splits
from .data.streams import is_stream
from .distributed import World, join
from .loop import Training
from .recipe import Compute, Recipe
from .run.logger import Journal
from .signals import Interrupt
from .step.loader import Batch, Feed
from .step.setup import PRECISIONS, Run, check_recipe, open_training, set_up

ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """Images per second of this machine, over all processes; medians over rounds, ratios taken round by round."""

    model: str
    img_size: int
    batch_size: int
    steps: int
    step_images_per_s: float
    """The optimizer step alone, on a batch that is there already."""
    plain_images_per_s: float
    """The same in float32, eager, contiguous."""
    speedup: float
    """Of the recipe's settings over the plain ones."""
    loader_images_per_s: float
    """The loader alone, with the recipe's workers, after their start."""
    one_worker_images_per_s: float
    """The loader alone, with one worker."""
    loader_scaling: float
    """The loader's speed over that of as many times one worker."""
    both_images_per_s: float
    """Steps fed by the loader."""
    overhead_percent: float
    """What the loop adds to mixing, forward, backward, clipping, optimizer and averaging: checks, scalars, schedule."""
    peak_memory_mb: float | None
    """Of this process and its largest worker; of the GPU where there is one. None where the system does not tell."""
    device: str
    threads: int
    workers: int


def benchmark(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Measures `steps` steps of each kind and prints them.

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
    memory = "not told by the system" if speed.peak_memory_mb is None else f"{speed.peak_memory_mb:.0f} MB"
    console.print(
        f"settings {speed.speedup:.2f}× plain, the loop adds {speed.overhead_percent:.1f} %, peak memory {memory}; "
        f"{speed.device}, {speed.threads} threads"
    )
    return asdict(speed)


def _measure(recipe: Recipe, world: World, steps: int, folder: Path) -> Speed:
    turns = check_recipe(recipe, world)
    splits = None if is_stream(recipe.data) else open_splits(recipe.data)
    classes, feed = open_training(recipe, world, turns, splits)
    plain_recipe = replace(recipe, compute=Compute(
        device=recipe.compute.device, device_batch_size=recipe.compute.device_batch_size, channels_last=False,
    ))  # fmt: skip
    training = Training(recipe, folder, world, classes, feed, turns, Interrupt(), splits)
    run, plain = training.run, set_up(plain_recipe, world, classes, feed.steps_per_epoch, turns)
    training.journal = Journal(folder, recipe, run, feed.steps_per_epoch, terminal.console(quiet=True))
    batches = list(islice(feed.batches(0, 1), turns))
    endless = repeat(batches[0])
    per_round = max(1, -(-steps // ROUNDS))

    def looped() -> None:
        training._step(endless)
        if run.step % recipe.save.log_steps == 0:
            training._look()

    cases = {"step": _bare_step(run, batches), "plain": _bare_step(plain, batches), "loop": looped}
    seconds = _take_turns(cases, per_round, world)
    loader, one, both = _loaders(recipe, feed, run, steps, world, turns)
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
    """Of this process and its largest child so far; None on Windows, which has no getrusage."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1e6 if sys.platform == "darwin" else 1e3  # ru_maxrss is in bytes there, in kB elsewhere
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / unit


def _bare_step(run: Run, batches: list[Batch]) -> Callable[[], None]:
    """What a step cannot do without: the recipe's mixing on the device, and what changes the weights."""
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


def _take_turns(cases: dict[str, Callable[[], None]], count: int, world: World) -> dict[str, list[float]]:
    """Seconds a call of each case in each round, after two calls to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for call in cases.values():
        call()
        call()
    for turn in range(ROUNDS):
        for name in list(cases)[:: 1 if turn % 2 == 0 else -1]:
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


def _loaders(recipe: Recipe, feed: Feed, run: Run, steps: int, world: World, turns: int) -> tuple[float, float, float]:
    """Images per second of the loader, of the loader with one worker, and of steps that it feeds."""
    images, workers = recipe.batch_size * steps, recipe.data.workers

    def consume(feed: Feed, use: Callable[[list[Batch]], None]) -> float:
        ahead = 1 + 4 * max(workers, 1)  # steps that workers have ready before they are asked
        batches: Iterator[Batch] = feed.batches(0, steps + ahead)
        for _ in range(ahead):
            use(list(islice(batches, turns)))
        start = time.perf_counter()
        for _ in range(steps):
            use(list(islice(batches, turns)))
        _wait(world)
        return images / (time.perf_counter() - start)

    def step(batches: list[Batch]) -> None:
        run.update(run.forward_backward(batches))

    def drop(batches: list[Batch]) -> None:
        pass

    single = replace(recipe, data=replace(recipe.data, workers=1))
    one = consume(open_training(single, world, turns)[1], drop)
    loader = consume(feed, drop) if workers != 1 else one
    return loader, one, consume(feed, step)
