"""How time and memory grow with the image and with the batch: sweeps, and the power that fits each."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from .cases import Case, Settings, Subject, case_of_model, choose_cores
from .measure import Progress, Running, basis_of, pinned, start
from .records import Scaling

SIDES = (128, 192, 256, 384, 512, 768, 1024)  # height and width in pixels
BATCHES = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 5


def sweep(
    model: str, runtime: str, settings: Settings, folder: Path, progress: Progress = lambda _: None
) -> list[Scaling]:
    """Time of an image and memory over image sizes, one image at a time, and over batch sizes, at the model's own size.

    Args:
        folder: for the files that are made on the way.
    """
    cores = choose_cores(settings.threads)
    with pinned(cores, settings.threads):
        by_size = [Subject(model, replace(settings, img_size=side), folder) for side in SIDES]
        own = Subject(model, settings, folder)
        sizes = [case_of_model(subject, runtime, 1, cores) for subject in by_size]
        batches = [case_of_model(own, runtime, batch, cores) for batch in BATCHES]
        return [
            _measure(model, runtime, "pixels", [side * side for side in SIDES], sizes, progress),
            _measure(model, runtime, "batch_size", BATCHES, batches, progress),
        ]


def _measure(
    model: str, runtime: str, over: str, values: Sequence[int], cases: Sequence[Case], progress: Progress
) -> Scaling:
    with ExitStack() as stack:
        running: list[Running] = []
        for case, value in zip(cases, values, strict=True):
            progress(f"{model} in {runtime}: {over} {value}")
            running.append(stack.enter_context(start(case)))
            running[-1].open()
        for number in range(ROUNDS):
            for each in running if number % 2 == 0 else reversed(running):
                each.turn()
    basis = basis_of(running)
    times = [1e3 * median(each.seconds(basis)) / each.case.batch_size for each in running]
    memory = [each.peak / 1e6 for each in running if each.peak is not None]  # all, or `peak_memory` was asked before
    return Scaling(
        model=model,
        runtime=runtime,
        over=over,
        values=tuple(values),
        latency_ms=tuple(times),
        peak_memory_mb=tuple(memory),
        exponent=exponent(values, times),
        memory_exponent=exponent(values, memory),
        basis=basis,
    )


def exponent(values: Sequence[float], measured: Sequence[float]) -> float:
    """The power p of the least-squares fit measured = c·valuesᵖ, in logarithms."""
    return float(np.polyfit(np.log(values), np.log(measured), 1)[0])
