"""Latency of models and runtimes, interleaved: each case has a process of its own, and only one runs at a time.

Absolute times drift with the machine; when the cases are interleaved, in reversed order every other round, all of them
meet the same drift, so that ratios hold. Where other programs take the core meanwhile, ratios are of processor times.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from shvit.environment import take_turns, users_environment
from shvit.errors import InputError, first_line
from shvit.files import scratch_folder
from shvit.img_size import ImgSize, ImgSizeLike
from shvit.weights.manifest import published_top1

from ..backends import worker
from .cases import BenchCase, BenchModel, Settings, choose_cores, create_case, create_file_case, resolve_models
from .records import PREEMPTED_PERCENT, PROCESSOR, WALL, BenchResult, LeftOut, Machine, Measurements, Scaling
from .roofline import measure_machine
from .runtimes import DEFAULT_RUNTIMES, check_runtimes, is_artifact

ROUND_S = 0.15  # minimum seconds that a case runs in a round; of processor time, if the case has one thread
EXIT_S = 2.0  # seconds that a worker has to end by itself
MAX_INTERVAL = 0.1  # relative width of a ratio's confidence interval; a wider one decides nothing
SWEEP_SIDES = (128, 192, 256, 384, 512, 768, 1024)  # height and width in pixels
SWEEP_BATCHES = (1, 2, 4, 8, 16, 32, 64)
SWEEP_ROUNDS = 5
MAX_REASON = 200  # characters of why a model was left out
Progress = Callable[[str], None]


@dataclass
class RunningCase:
    """A case with its worker process, and the times measured so far."""

    case: BenchCase
    process: subprocess.Popen[str]
    load: float = 0.0
    first: float = 0.0
    peak: int | None = None
    rounds: list[list[float]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def request(self, **command: float | bool) -> dict[str, Any]:
        """Send a command, if any, and return the worker's response.

        Raises:
            InputError: the runtime failed.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            if command:
                self.process.stdin.write(json.dumps(command) + "\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        response = json.loads(line) if line else {"error": f"its process ended with status {self.process.wait()}"}
        if "error" in response:
            raise InputError(f"{self.case.model} in {self.case.runtime}: {response['error']}")
        return response

    def open(self) -> None:
        opened = self.request()
        self.load = opened["load"]
        if opened["lacks_bf16"]:
            self.case = replace(self.case, precision="fp32")
        self.first = self.request(batch=self.case.batch_size)["first"]

    def run_round(self) -> None:
        response = self.request(seconds=ROUND_S, processor=self.case.is_one_cpu_thread)
        self.rounds.append(response["wall"])
        self.cpu.append(response["cpu"])
        self.peak = response["peak"]

    @property
    def preempted_percent(self) -> float | None:
        """The field of `BenchResult`."""
        if not self.case.is_one_cpu_thread:
            return None
        wall = sum(map(sum, self.rounds))
        cpu = sum(mean * len(times) for mean, times in zip(self.cpu, self.rounds, strict=True))
        return 100 * max(0.0, 1 - cpu / wall)

    def seconds(self, basis: str) -> list[float]:
        """Return the seconds of a batch in each round: the median call by wall time, the mean by processor time."""
        return self.cpu if basis == PROCESSOR else [median(times) for times in self.rounds]


@contextmanager
def start(case: BenchCase) -> Iterator[RunningCase]:
    """Start the case's worker and end it on the way out; Core ML's may end by itself, as it has temporary files."""
    process = subprocess.Popen(
        [sys.executable, "-I", worker.__file__, json.dumps(case.job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**users_environment(), **case.environment},
    )
    try:
        yield RunningCase(case, process)
    finally:
        if case.job["runner"] == "coreml":
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=EXIT_S)
        process.kill()
        process.communicate()


def run_rounds(cases: Sequence[BenchCase], rounds: int, progress: Progress = lambda _: None) -> list[RunningCase]:
    """Open every case, then run them interleaved."""
    with ExitStack() as stack:
        running = []
        for case in cases:
            progress(f"opening {case.model} in {case.runtime}, {case.img_size} px, batch {case.batch_size}")
            running.append(stack.enter_context(start(case)))
            running[-1].open()
        for number, each in take_turns(running, rounds):
            progress(f"batch {cases[0].batch_size}, round {number + 1} of {rounds}")
            each.run_round()
    return running


def summarize(running: Sequence[RunningCase], machine: Machine) -> list[BenchResult]:
    """Return percentiles, spread and ratios to the first case, for cases of one batch size."""
    return [_summarize_case(each, running[0], machine) for each in running]


def time_basis(running: Sequence[RunningCase]) -> str:
    """Return the clock for comparing these cases: `PROCESSOR` if other programs took a core and all cases allow it."""
    shares = [each.preempted_percent for each in running]
    known = [share for share in shares if share is not None]
    return PROCESSOR if len(known) == len(shares) and max(known) > PREEMPTED_PERCENT else WALL


def _summarize_case(running: RunningCase, first: RunningCase, machine: Machine) -> BenchResult:
    case = running.case
    calls = 1e3 * np.concatenate([np.asarray(times) for times in running.rounds]) / case.batch_size
    p50, p90, p99 = percentiles(calls)
    basis = time_basis([running, first])
    pairs = zip(running.seconds(basis), first.seconds(basis), strict=True)
    ratio, low, high = ratio_interval([mine / other for mine, other in pairs])
    cpu = 1e3 * median(running.cpu) / case.batch_size
    own = cpu if time_basis([running]) == PROCESSOR else p50
    return BenchResult(
        model=case.model,
        runtime=case.runtime,
        precision=case.precision,
        img_size=case.img_size,
        batch_size=case.batch_size,
        threads=case.job["threads"],
        rounds=len(running.rounds),
        calls=len(calls),
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p99=p99,
        cpu_ms=cpu,
        ratio_to_first=ratio,
        ratio_low=low,
        ratio_high=high,
        load_ms=1e3 * running.load,
        first_ms=1e3 * running.first,
        peak_memory_mb=None if running.peak is None else running.peak / 1e6,
        gmacs=None if case.macs is None else case.macs / 1e9,
        percent_of_peak=_percent_of_peak(case, own, machine),
        top1=published_top1(case.model, case.img_size),
        ratio_basis=basis,
        preempted_percent=running.preempted_percent,
    )


def _percent_of_peak(case: BenchCase, ms: float, machine: Machine) -> float | None:
    elsewhere = "cuda" in case.runtime or "tensorrt" in case.runtime or case.job["threads"] != machine.threads
    peak = None if elsewhere else machine.peak_gflops.get(case.precision)
    return None if case.macs is None or peak is None else 100 * (2e-9 * case.macs / (1e-3 * ms)) / peak


def percentiles(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Return the 50th, 90th and 99th percentile, interpolated between neighbors."""
    p50, p90, p99 = (float(value) for value in np.quantile(values, [0.5, 0.9, 0.99]))
    return p50, p90, p99


def ratio_interval(ratios: Sequence[float]) -> tuple[float | None, float, float]:
    """Return the median of the rounds' ratios, None if its interval is too wide to decide, and its 95 % interval.

    The interval is that of a quantile by order statistics: no assumption on how noise is distributed, one outlier among
    many rounds is harmless, and few rounds decide nothing.
    """
    from scipy.stats import quantile_test

    middle = median(ratios)
    if set(ratios) == {1.0}:
        return 1.0, 1.0, 1.0  # the first case by itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interval = quantile_test(ratios, q=middle, p=0.5).confidence_interval()
    low, high = float(interval.low), float(interval.high)
    if not (np.isfinite(low) and np.isfinite(high)):
        return None, min(ratios), max(ratios)
    return (middle if high - low <= MAX_INTERVAL * middle else None), low, high


def benchmark(
    models: Sequence[str | Path],
    runtimes: Sequence[str] = DEFAULT_RUNTIMES,
    *,
    batch_sizes: Sequence[int] = (1,),
    threads: int = 1,
    img_size: ImgSizeLike | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    rounds: int = 15,
    against: Sequence[Path] = (),
    progress: Progress = lambda _: None,
) -> Measurements:
    """Measure the latency of models in runtimes, as `shvit bench` does.

    Args:
        models: names that timm knows, or files of `shvit export`, which run in the runtime of their format.
        runtimes: those of the named models; see `shvit bench --help`.
        batch_sizes: images per call.
        threads: CPU threads of each runtime, each on a core of its own.
        img_size: input size in pixels, one number or (height, width); each model's own where None.
        checkpoint: weights of the models, a file or a name of `shvit weights list`; random ones where None.
        pretrained: use each model's published weights in place of a checkpoint.
        rounds: rounds in which each case is timed.
        against: third-party files to compare with.
        progress: receives a line for each step.

    Raises:
        InputError: as `measure_models` and `resolve_models`.
    """
    file = None if checkpoint is None else Path(checkpoint)
    names, weights = resolve_models(list(map(str, models)), file, pretrained, progress)
    size = None if img_size is None else ImgSize.of(img_size)
    settings = Settings(threads, weights, size, pretrained=pretrained)
    return measure_models(names, runtimes, batch_sizes, settings, rounds, against, progress)


def measure_models(
    models: Sequence[str],
    runtimes: Sequence[str],
    batch_sizes: Sequence[int],
    settings: Settings,
    rounds: int,
    against: Sequence[Path] = (),
    progress: Progress = lambda _: None,
) -> Measurements:
    """Time every model in every runtime at every batch size; the arguments are those of `benchmark`.

    Files in `against` come first, so that ratios are to the first of them, and run with their runtime's defaults. A
    model that one runtime's format cannot hold is timed in the others.

    Raises:
        InputError: an unknown model or runtime, one that does not run here, a file that cannot be read, an option out
            of range, or nothing is left to time.
    """
    check_runtimes(runtimes)
    if not models or not batch_sizes or not (runtimes or all(map(is_artifact, models))):
        raise InputError("nothing to time; give at least one model, one runtime and one batch size")
    for option, value in (("--threads", settings.threads), ("--batch-sizes", min(batch_sizes)), ("--rounds", rounds)):
        if value < 1:
            raise InputError(f"{option} {value} must be 1 or more")
    cores = choose_cores(settings.threads)
    with scratch_folder() as folder, pinned(cores, settings.threads):
        named = {name: BenchModel(name, settings, folder) for name in models if not is_artifact(name)}
        for model in named.values():
            _ = model.opened  # an unknown name before anything is measured

        failed: dict[tuple[str, str], InputError] = {}

        def create_cases(batch_size: int) -> Iterator[BenchCase]:
            for path in against:
                yield create_file_case(path, batch_size, settings, cores, tuned=False)
            for name in models:
                if name not in named:
                    yield create_file_case(Path(name), batch_size, settings, cores, tuned=True)
                for runtime in runtimes if name in named else ():
                    if (name, runtime) in failed:
                        continue
                    progress(f"preparing {name} for {runtime}")
                    try:
                        yield create_case(named[name], runtime, batch_size, cores)
                    except InputError as error:
                        failed[name, runtime] = error

        plan = [list(create_cases(size)) for size in sorted(set(batch_sizes))]
        if not any(plan):
            raise next(iter(failed.values()))
        progress("measuring the machine")
        machine = measure_machine()
        results: list[BenchResult] = []
        for cases in plan:
            results += summarize(run_rounds(cases, rounds, progress), machine)
        left_out = (LeftOut(*pair, reason=first_line(error)[:MAX_REASON]) for pair, error in failed.items())
        return Measurements(machine, tuple(results), left_out=tuple(left_out))


def measure_files(
    files: Sequence[tuple[Path, str, float | None]], threads: Sequence[int], rounds: int, progress: Progress
) -> tuple[Machine, list[BenchResult]]:
    """Time exported files, one image at a time, with each number of threads.

    Args:
        files: path, what to call it, and its multiply-adds in units of 10⁹ if they are known.

    Raises:
        InputError: more threads than cores, or a file that cannot be read.
    """
    with pinned(choose_cores(max(threads)), max(threads)):
        cases = []
        for count in dict.fromkeys(threads):
            for path, name, gmacs in files:
                case = create_file_case(path, 1, Settings(count), choose_cores(count), tuned=True)
                runtime = f"{case.runtime}-{count}-threads" if count > 1 else case.runtime
                macs = None if gmacs is None else round(1e9 * gmacs)
                cases.append(replace(case, model=name, runtime=runtime, macs=macs))
        progress("measuring the machine")
        machine = measure_machine()
        return machine, summarize(run_rounds(cases, rounds, progress), machine)


@contextmanager
def pinned(cores: Sequence[int], threads: int) -> Iterator[None]:
    """Keep this process on these cores, where the operating system allows it, with as many threads of PyTorch."""
    threads_before = torch.get_num_threads()
    cores_before = os.sched_getaffinity(0) if cores else set()
    torch.set_num_threads(threads)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        if cores:
            os.sched_setaffinity(0, cores_before)


def measure_scaling(
    name: str, runtime: str, settings: Settings, folder: Path, progress: Progress = lambda _: None
) -> list[Scaling]:
    """Time a model over image sizes, one image at a time, and over batch sizes, at the model's own size."""
    cores = choose_cores(settings.threads)
    with pinned(cores, settings.threads):
        by_size = [BenchModel(name, replace(settings, img_size=ImgSize(side, side)), folder) for side in SWEEP_SIDES]
        own = BenchModel(name, settings, folder)
        sizes = [create_case(model, runtime, 1, cores) for model in by_size]
        batches = [create_case(own, runtime, batch, cores) for batch in SWEEP_BATCHES]
        by_pixels = _measure_sweep("pixels", [side * side for side in SWEEP_SIDES], sizes, progress)
        return [by_pixels, _measure_sweep("batch_size", SWEEP_BATCHES, batches, progress)]


def _measure_sweep(over: str, values: Sequence[int], cases: Sequence[BenchCase], progress: Progress) -> Scaling:
    running = run_rounds(cases, SWEEP_ROUNDS, progress)
    basis = time_basis(running)
    times = [1e3 * median(each.seconds(basis)) / each.case.batch_size for each in running]
    memory = [each.peak / 1e6 for each in running if each.peak is not None]  # all: `peak_memory` was checked before
    return Scaling(
        model=cases[0].model,
        runtime=cases[0].runtime,
        over=over,
        values=tuple(values),
        latency_ms=tuple(times),
        peak_memory_mb=tuple(memory),
        exponent=exponent(values, times),
        memory_exponent=exponent(values, memory),
        basis=basis,
    )


def exponent(values: Sequence[float], measured: Sequence[float]) -> float:
    """Return the power p of the least-squares fit measured = c·valuesᵖ, in logarithms."""
    return float(np.polyfit(np.log(values), np.log(measured), 1)[0])
