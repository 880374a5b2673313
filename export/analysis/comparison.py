"""All formats of one model side by side: each exported and verified, on ARM64 too if asked, then timed together."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from shvit.documents import load_json, to_json
from shvit.environment import advise
from shvit.errors import CheckFailed, InputError
from shvit.files import atomic_write
from shvit.terminal import quiet

from ..arm64.compare import check_arm64
from ..arm64.emulator import Cpu
from ..backends.backend import Backend
from ..backends.registry import BACKENDS
from ..bench.cases import Settings
from ..bench.measure import measure_models
from ..bench.records import BenchResult, describe_preemption
from ..bench.runtimes import check_runtimes
from ..pipeline import check_calibration, export
from ..source import Source
from ..spec import Precision

ROWS: Sequence[tuple[Backend[Any], Precision]] = [
    (backend, precision) for backend in BACKENDS.values() for precision in backend.compared
]
"""Formats and precisions that are compared with each other."""
FIGURES = ("top-1 %", "same top-1 %", "SNR dB", "ARM64: SNR dB", "MB", "ms", "ratio")
HEAD = ("file", *FIGURES, "excluded from int8", "passed")
OPTIONAL = ("ARM64: SNR dB", "ms", "ratio")  # columns that stand only where something was measured
OF_CLASSES = ("top-1 %", "same top-1 %")  # columns that say nothing of other tasks
RULE = ("---", *("---:" for _ in FIGURES), "---", "---")


@dataclass(frozen=True)
class Row:
    """One file of the table."""

    title: str
    backend: Backend[Any]
    certificate: Mapping[str, Any]
    """What `certify` states; of a file that could not be written only `passed` and `error`."""
    latency: BenchResult | None = None

    def cells(self) -> tuple[str, ...]:
        """Return the row's cells; a file that overflowed has no figures."""
        certificate, latency = self.certificate, self.latency
        holds = {True: "yes", False: "no", None: "undecided"}[certificate["passed"]]
        if "snr_db" not in certificate:
            return (self.title, *("" for _ in FIGURES), "", holds)
        arm64, excluded = certificate.get("arm64"), len(certificate["spec"]["excluded_layers"])
        return (
            self.title,
            _percent(certificate["accuracy"]),
            _percent(certificate["top1_agreement"], 1),
            f"{certificate['snr_db']:.1f}",
            f"{arm64['snr_db']:.1f}" if arm64 else "",
            f"{certificate['artifact_bytes'] / 1e6:.2f}",
            f"{latency.latency_ms_p50:.2f}" if latency else "",
            f"{latency.ratio_to_first:.2f}" if latency and latency.ratio_to_first else "",
            f"{excluded} layer{'s' * (excluded > 1)}, {certificate['excluded_macs']:.0f} % of MACs" if excluded else "",
            holds,
        )


def export_all(folder: Path, source: Source, rounds: int, arm64: Cpu | None, console: Console) -> dict[str, Any]:
    """Export all of `ROWS` into a folder, with formats.md and formats.json; one that fails gets a row and no file.

    Formats whose packages are not installed are left out, and a line says so.

    Args:
        rounds: those of the benchmark that times the files, interleaved, one image at a time on one thread; 0 for none.
        arm64: the processor on which QEMU runs files in the ARM64 build of their runtime, where there is one.

    Raises:
        InputError: there are no images to calibrate one of them with, or what ARM64 needs is not installed; nothing is
            written.
    """
    for backend, precision in ROWS:
        check_calibration(backend, with_precision(source, backend, precision))
    backends = {backend.name: backend for backend, _ in ROWS}
    installed = [name for name, backend in backends.items() if imports(backend, console)]
    for backend in (backends[name] for name in installed):
        if arm64 is not None and backend.arm64 is not None:
            check_arm64(backend)
    rows = {}
    for backend, precision in (row for row in ROWS if row[0].name in installed):
        name, title = f"{source.spec.model}-{precision}{backend.ending}", f"{backend.title} {precision}"
        console.print(f"{title} …")
        certificate = _try(backend, folder / name, with_precision(source, backend, precision), arm64, console)
        rows[name] = Row(title, backend, certificate)
    _write(folder, rows)
    timed = {
        name: row for name, row in rows.items() if row.certificate["passed"] is not False and runs_here(row.backend)
    }
    if rounds and timed:
        rows |= _timed(folder, timed, rounds, console)
        _write(folder, rows)
    for line in markdown(list(rows.values())).splitlines():
        console.print(line)
    return {"output": str(folder), "passed": {name: row.certificate["passed"] for name, row in rows.items()}}


def _try(backend: Backend[Any], path: Path, source: Source, arm64: Cpu | None, console: Console) -> dict[str, Any]:
    """Return the certificate of a file, or of what became of it."""
    try:
        export(backend, path, source, backend.options_for(source.spec), arm64 if backend.arm64 else None, console.print)
    except CheckFailed as error:
        return error.result
    except InputError as error:  # the model has what the format lacks
        console.print(str(error))
        return {"passed": False, "error": str(error)}
    certificate: dict[str, Any] = load_json(path.with_name(f"{path.name}.certificate.json"))
    return certificate


def _timed(folder: Path, rows: Mapping[str, Row], rounds: int, console: Console) -> dict[str, Row]:
    """Return the rows with latencies, whose ratios are to the first."""
    console.print("timing …")
    paths = [str(folder / name) for name in rows]
    results = measure_models(paths, [], [1], Settings(threads=1), rounds).results
    if preemption := describe_preemption(results):
        console.print(f"ratios are of processor times, as {preemption}")
    return {name: replace(row, latency=result) for (name, row), result in zip(rows.items(), results, strict=True)}


def _write(folder: Path, rows: Mapping[str, Row]) -> None:
    records = {name: {**row.certificate, "latency": row.latency and asdict(row.latency)} for name, row in rows.items()}
    with atomic_write(folder / "formats.md") as partial:
        partial.write_text(markdown(list(rows.values())), encoding="utf-8")
    with atomic_write(folder / "formats.json") as partial:
        partial.write_text(to_json(records, indent=2) + "\n")


def markdown(rows: Sequence[Row]) -> str:
    """Return a table of rows, the model itself first, without the columns that hold nothing."""
    known = (row.certificate["model_accuracy"] for row in rows if "model_accuracy" in row.certificate)
    model = ("PyTorch fp32", _percent(next(known, None)), *("" for _ in HEAD[2:]))
    cells = [model, *(row.cells() for row in rows)]
    tasks = {row.certificate.get("spec", {}).get("task", "classification") for row in rows}
    optional = OPTIONAL if tasks == {"classification"} else (*OF_CLASSES, *OPTIONAL)
    used = [column for column, name in enumerate(HEAD) if name not in optional or any(row[column] for row in cells)]
    lines = ([row[column] for column in used] for row in (HEAD, RULE, *cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def imports(backend: Backend[Any], console: Console) -> bool:
    """Return whether a backend's packages are installed; if not, say what installs them."""
    try:
        with quiet():
            for name in backend.packages:
                importlib.import_module(name)
    except ModuleNotFoundError as missing:
        console.print(f"{backend.title} is left out: {advise(missing.name or '', ['export'])}")
        return False
    return True


def runs_here(backend: Backend[Any]) -> bool:
    """Return whether a backend's files can be timed on this machine."""
    try:
        check_runtimes([backend.runtime])
    except InputError:
        return False
    return True


def with_precision(source: Source, backend: Backend[Any], precision: Precision) -> Source:
    """Return the same source for another format and precision."""
    return replace(source, spec=backend.options_for(source.spec).complete(replace(source.spec, precision=precision)))


def _percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
