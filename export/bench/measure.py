"""Latency of models and runtimes, interleaved: each case has a process of its own, and one at a time runs.

Absolute times drift with the machine; when the cases take turns, in reversed order every other round, all of them meet
the same drift, so that ratios hold. Where other programs take the core meanwhile, ratios are of processor times.
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

from shvit.environment import users_environment
from shvit.errors import InputError
from shvit.files import scratch_folder
from shvit.weights.published import published_top1

from . import worker
from .cases import (
    FILES,
    Case,
    Settings,
    Subject,
    case_of_file,
    case_of_model,
    check_runtimes,
    choose_cores,
)
from .records import PREEMPTED_PERCENT, PROCESSOR, WALL, BenchResult, Machine
from .roofline import measure_machine

TURN_S = 0.15  # seconds that a case's turn within a round lasts at least; of processor time, if its case has one thread
LAST_S = 2.0  # seconds that its process has to end by itself
WIDEST = 0.1  # of a ratio's confidence interval, relative; a wider one decides nothing
Progress = Callable[[str], None]


@dataclass
class Running:
    """A case under way."""

    case: Case
    process: subprocess.Popen[str]
    load: float = 0.0
    first: float = 0.0
    peak: int | None = None
    rounds: list[list[float]] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends a command, if any, and waits for the answer.

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
        answer = json.loads(line) if line else {"error": f"its process ended with status {self.process.wait()}"}
        if "error" in answer:
            raise InputError(f"{self.case.model} in {self.case.runtime}: {answer['error']}")
        return answer

    def open(self) -> None:
        opened = self.ask()
        self.load = opened["load"]
        if opened["lacks_bf16"]:
            self.case = replace(self.case, precision="fp32")
        self.first = self.ask(batch=self.case.batch_size)["first"]

    def turn(self) -> None:
        answer = self.ask(seconds=TURN_S, processor=self.case.is_one_cpu_thread)
        self.rounds.append(answer["wall"])
        self.cpu.append(answer["cpu"])
        self.peak = answer["peak"]

    @property
    def preempted_percent(self) -> float | None:
        """As in `BenchResult`."""
        if not self.case.is_one_cpu_thread:
            return None
        wall = sum(map(sum, self.rounds))
        cpu = sum(mean * len(times) for mean, times in zip(self.cpu, self.rounds, strict=True))
        return 100 * max(0.0, 1 - cpu / wall)

    def seconds(self, basis: str) -> list[float]:
        """Of a batch, in each round: the median call by the wall's clock, the mean call by the processor's."""
        return self.cpu if basis == PROCESSOR else [median(times) for times in self.rounds]


@contextmanager
def start(case: Case) -> Iterator[Running]:
    """The case's process, ended on the way out; one of Core ML may end by itself, as it has temporary files."""
    process = subprocess.Popen(
        [sys.executable, "-I", worker.__file__, json.dumps(case.job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**users_environment(), **case.environment},
    )
    try:
        yield Running(case, process)
    finally:
        if case.job["runner"] == "coreml":
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=LAST_S)
        process.kill()
        process.communicate()


def run_rounds(cases: Sequence[Case], rounds: int, progress: Progress = lambda _: None) -> list[Running]:
    """Opens every case, then lets them take turns, in reversed order every other round."""
    with ExitStack() as stack:
        running = []
        for case in cases:
            progress(f"opening {case.model} in {case.runtime}")
            running.append(stack.enter_context(start(case)))
            running[-1].open()
        for number in range(rounds):
            progress(f"batch {cases[0].batch_size}, round {number + 1} of {rounds}")
            for each in running if number % 2 == 0 else reversed(running):
                each.turn()
    return running


def summarize(running: Sequence[Running], machine: Machine) -> list[BenchResult]:
    """Percentiles, spread and ratios to the first case, of cases of one batch size."""
    return [_summary(each, running[0], machine) for each in running]


def basis_of(running: Sequence[Running]) -> str:
    """By which time these cases can be compared: `PROCESSOR` if others took a core of theirs and all allow it."""
    shares = [each.preempted_percent for each in running]
    known = [share for share in shares if share is not None]
    return PROCESSOR if len(known) == len(shares) and max(known) > PREEMPTED_PERCENT else WALL


def _summary(running: Running, first: Running, machine: Machine) -> BenchResult:
    case = running.case
    calls = 1e3 * np.concatenate([np.asarray(times) for times in running.rounds]) / case.batch_size
    p50, p90, p99 = percentiles(calls)
    basis = basis_of([running, first])
    pairs = zip(running.seconds(basis), first.seconds(basis), strict=True)
    ratio, low, high = ratio_of([mine / other for mine, other in pairs])
    cpu = 1e3 * median(running.cpu) / case.batch_size
    own = cpu if basis_of([running]) == PROCESSOR else p50
    elsewhere = "cuda" in case.runtime or "tensorrt" in case.runtime or case.job["threads"] != machine.threads
    peak = None if elsewhere else machine.peak_gflops.get(case.precision)
    gflops = None if case.macs is None else 2e-9 * case.macs / (1e-3 * own)
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
        percent_of_peak=None if gflops is None or peak is None else 100 * gflops / peak,
        top1=published_top1(case.model, case.img_size),
        ratio_basis=basis,
        preempted_percent=running.preempted_percent,
    )


def percentiles(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """The 50th, 90th and 99th, interpolated between neighbors."""
    p50, p90, p99 = (float(value) for value in np.quantile(values, [0.5, 0.9, 0.99]))
    return p50, p90, p99


def ratio_of(ratios: Sequence[float]) -> tuple[float | None, float, float]:
    """The median of the rounds' ratios and its 95 % confidence interval; None for it if that is too wide to decide.

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
    return (middle if high - low <= WIDEST * middle else None), low, high


def bench(
    models: Sequence[str],
    runtimes: Sequence[str],
    batch_sizes: Sequence[int],
    settings: Settings,
    rounds: int,
    against: Sequence[Path] = (),
    progress: Progress = lambda _: None,
) -> tuple[Machine, list[BenchResult]]:
    """Times every model in every runtime at every batch size.

    Args:
        models: timm names, or files of `shvit export`, each of which runs in the runtime of its format.
        runtimes: of `RUNTIMES`.
        against: files of anyone's; they come first, so that ratios are to the first of them, and run with their
            runtime's defaults.
        progress: is told what happens.

    Raises:
        InputError: an unknown model or runtime, one that does not run here, a file that cannot be read, or an option
            out of range.
    """
    check_runtimes(runtimes)
    if not models or not batch_sizes or not (runtimes or all(Path(name).suffix in FILES for name in models)):
        raise InputError("nothing to time; give at least one model, one runtime and one batch size")
    for option, value in (("--threads", settings.threads), ("--batch-sizes", min(batch_sizes)), ("--rounds", rounds)):
        if value < 1:
            raise InputError(f"{option} {value} must be 1 or more")
    cores = choose_cores(settings.threads)
    with scratch_folder() as folder, pinned(cores, settings.threads):
        subjects = {name: Subject(name, settings, folder) for name in models if Path(name).suffix not in FILES}
        for subject in subjects.values():
            _ = subject.opened  # an unknown name before anything is measured
        plan = []
        for batch_size in sorted(set(batch_sizes)):
            cases = [case_of_file(path, batch_size, settings, cores, tuned=False) for path in against]
            for name in models:
                if name not in subjects:
                    cases.append(case_of_file(Path(name), batch_size, settings, cores, tuned=True))
                    continue
                for runtime in runtimes:
                    progress(f"preparing {name} for {runtime}")
                    cases.append(case_of_model(subjects[name], runtime, batch_size, cores))
            plan.append(cases)
        progress("measuring the machine")
        machine = measure_machine()
        results = []
        for cases in plan:
            results += summarize(run_rounds(cases, rounds, progress), machine)
    return machine, results


def bench_files(
    files: Sequence[tuple[Path, str, float | None]], threads: Sequence[int], rounds: int, progress: Progress
) -> tuple[Machine, list[BenchResult]]:
    """Times exported files, one image at a time, with each number of threads.

    Args:
        files: path, what to call it, and its multiply-adds in units of 10⁹ if they are known.

    Raises:
        InputError: more threads than cores, or a file that cannot be read.
    """
    with pinned(choose_cores(max(threads)), max(threads)):
        cases = []
        for count in dict.fromkeys(threads):
            cores = choose_cores(count)
            for path, name, gmacs in files:
                case = case_of_file(path, 1, Settings(count), cores, tuned=True)
                runtime = f"{case.runtime}-{count}-threads" if count > 1 else case.runtime
                macs = None if gmacs is None else round(1e9 * gmacs)
                cases.append(replace(case, model=name, runtime=runtime, macs=macs))
        progress("measuring the machine")
        machine = measure_machine()
        return machine, summarize(run_rounds(cases, rounds, progress), machine)


@contextmanager
def pinned(cores: Sequence[int], threads: int) -> Iterator[None]:
    """This process on these cores alone, as far as the operating system lets it, with as many threads of PyTorch.

    The workers pin themselves.
    """
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
