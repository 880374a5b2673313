"""Latency of models and runtimes, interleaved round by round in one process.

Absolute times drift with the machine; interleaving lets every case meet the same drift, so ratios hold.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from shvit.deploy import deploy
from shvit.errors import InputError
from shvit.files import write_whole

from .onnx import write_onnx
from .runtimes import OPENERS, open_artefact, torch_predict
from .spec import Spec, open_model
from .verify import versions

RUNTIMES = ("torch", "onnxruntime")
Run = Callable[[torch.Tensor], object]
MIN_TURN_S = 0.05  # a case's turn within a round repeats its call for at least so long


@dataclass(frozen=True)
class BenchResult:
    """Latency of one case over all rounds. Times are of one image: the batch's time over its size."""

    model: str
    runtime: str
    img_size: int
    batch_size: int
    threads: int
    rounds: int
    latency_ms_p50: float
    latency_ms_p10: float
    latency_ms_p90: float
    ratio_to_first: float
    """Median over rounds of this case's time over the first case's of the same batch size, in the same round."""
    images_per_s: float
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Case:
    """Something to time: `call` runs one batch."""

    model: str
    runtime: str
    img_size: int
    batch_size: int
    call: Callable[[], object]


def build_cases(
    models: list[str], runtimes: list[str], batch_sizes: list[int], threads: int, img_size: int | None, folder: Path
) -> list[Case]:
    """One case for each model, runtime and batch size; ONNX files of models given by name are put into `folder`.

    Args:
        models: timm names, or files of `shvit export`, each of which runs in the runtime of its format.

    Raises:
        InputError: an unknown model, or a file that is no artefact of ours.
    """
    cases = []
    for name in models:
        for runtime, spec, predict in _predictors(name, runtimes, threads, img_size, folder):
            for batch_size in batch_sizes:
                batch = spec.feed((255 * torch.rand(batch_size, *spec.shape)).to(torch.uint8))
                cases.append(Case(Path(name).name, runtime, spec.img_size, batch_size, _bind(predict, batch)))
    return cases


def _bind(predict: Run, batch: torch.Tensor) -> Callable[[], object]:
    return lambda: predict(batch)


def _predictors(
    name: str, runtimes: list[str], threads: int, img_size: int | None, folder: Path
) -> list[tuple[str, Spec, Run]]:
    if Path(name).suffix in OPENERS:
        artefact = open_artefact(Path(name), threads)
        return [(artefact.runtime, artefact.spec, artefact.run)]
    model, spec = open_model(name, img_size=img_size)
    deployed = deploy(model, spec.img_size)
    found: list[tuple[str, Spec, Run]] = []
    if "torch" in runtimes:
        found.append(("torch", spec, torch_predict(deployed)))
    if "onnxruntime" in runtimes:
        path = folder / f"{name}.onnx"
        write_onnx(deployed, path, spec, dynamic_batch=True)
        found.append(("onnxruntime", spec, open_artefact(path, threads).run))
    return found


def run_rounds(cases: list[Case], rounds: int, progress: Callable[[int], None] = lambda _: None) -> list[list[float]]:
    """Seconds a call of each case in each round: cases take turns, in reversed order every other round."""
    for case in cases:
        case.call()
        case.call()
    seconds: list[list[float]] = [[] for _ in cases]
    for turn in range(rounds):
        order = range(len(cases)) if turn % 2 == 0 else range(len(cases) - 1, -1, -1)
        for index in order:
            seconds[index].append(_time(cases[index].call))
        progress(turn + 1)
    return seconds


def _time(call: Callable[[], object]) -> float:
    """Median seconds of a call within one turn."""
    times: list[float] = []
    end = time.perf_counter() + MIN_TURN_S
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def summarize(cases: list[Case], seconds: list[list[float]], threads: int) -> list[BenchResult]:
    """Medians, spread and ratios of `run_rounds`."""
    device, found = device_name(), versions()
    results = []
    for case, times in zip(cases, seconds, strict=True):
        first = next(i for i, other in enumerate(cases) if other.batch_size == case.batch_size)
        per_image = torch.tensor(times, dtype=torch.float64) * 1e3 / case.batch_size
        p10, p50, p90 = per_image.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        results.append(
            BenchResult(
                model=case.model,
                runtime=case.runtime,
                img_size=case.img_size,
                batch_size=case.batch_size,
                threads=threads,
                rounds=len(times),
                latency_ms_p50=p50,
                latency_ms_p10=p10,
                latency_ms_p90=p90,
                ratio_to_first=median(a / b for a, b in zip(times, seconds[first], strict=True)),
                images_per_s=1e3 / p50,
                device=device,
                versions=found,
            )
        )
    return results


def bench(
    models: list[str],
    runtimes: list[str],
    batch_sizes: list[int],
    threads: int = 1,
    img_size: int | None = None,
    rounds: int = 11,
    progress: Callable[[int], None] = lambda _: None,
) -> list[BenchResult]:
    """Times every model in every runtime at every batch size; see `build_cases` and `run_rounds`.

    Raises:
        InputError: as `build_cases`, an unknown runtime, or an option out of range.
    """
    if unknown := set(runtimes) - set(RUNTIMES):
        raise InputError(f"unknown runtime {unknown.pop()!r}; choose from {', '.join(RUNTIMES)}")
    if not models or not runtimes or not batch_sizes:
        raise InputError("nothing to time; give at least one model, one runtime and one batch size")
    for option, value in (("--threads", threads), ("--batch-sizes", min(batch_sizes)), ("--rounds", rounds)):
        if value < 1:
            raise InputError(f"{option} {value} must be 1 or more")
    previous = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.set_num_threads(threads)
            cases = build_cases(models, runtimes, batch_sizes, threads, img_size, Path(folder))
            return summarize(cases, run_rounds(cases, rounds, progress), threads)
        finally:
            torch.set_num_threads(previous)


def write_results(results: list[BenchResult], path: Path) -> None:
    """Writes the records as a JSON list, whole or not at all."""
    with write_whole(path) as partial:
        partial.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


def device_name() -> str:
    """The processor's name and the number of its cores that this process may use."""
    import os

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"
