"""Certificates for people: one as the terminal shows it, and all formats of one model side by side."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from shvit.documents import load_json, to_json
from shvit.environment import advise
from shvit.errors import CheckFailed, InputError
from shvit.files import atomic_write
from shvit.terminal import quiet

from .backends.backend import Backend
from .backends.registry import BACKENDS
from .pipeline import check_calibration, export
from .source import Source
from .spec import Precision
from .verify import MAX_FLOAT_MACS, Arm64, Certificate

ROWS: Sequence[tuple[Backend[Any], Precision]] = [
    (backend, precision) for backend in BACKENDS.values() for precision in backend.compared
]
"""Formats and precisions that are compared with each other."""
HEAD = ("file", "top-1 %", "same top-1 %", "SNR dB", "MB", "excluded from int8", "passed")


def export_all(folder: Path, source: Source, console: Console) -> dict[str, Any]:
    """Export all of `ROWS` into a folder, with formats.md and formats.json; one that fails gets a row and no file.

    Formats whose packages are not installed are left out, and a line says so.

    Raises:
        InputError: there are no images to calibrate one of them with; nothing is written.
    """
    for backend, precision in ROWS:
        check_calibration(backend, with_precision(source, backend, precision))
    certificates: dict[tuple[str, str], dict[str, Any]] = {}
    backends = {backend.name: backend for backend, _ in ROWS}
    installed = [name for name, backend in backends.items() if imports(backend, console)]
    for backend, precision in (row for row in ROWS if row[0].name in installed):
        name = f"{source.spec.model}-{precision}{backend.ending}"
        console.print(f"{backend.title} {precision} …")
        try:
            export(backend, folder / name, with_precision(source, backend, precision), backend.all_options)
            certificate = load_json(folder / f"{name}.certificate.json")
        except CheckFailed as error:
            certificate = error.result
        except InputError as error:  # the model has what the format lacks
            console.print(str(error))
            certificate = {"passed": False, "error": str(error)}
        certificates[f"{backend.title} {precision}", name] = certificate
    text = markdown({row: certificate for (row, _), certificate in certificates.items()})
    files = {name: certificate for (_, name), certificate in certificates.items()}
    with atomic_write(folder / "formats.md") as partial:
        partial.write_text(text, encoding="utf-8")
    with atomic_write(folder / "formats.json") as partial:
        partial.write_text(to_json(files, indent=2) + "\n")
    for line in text.splitlines():
        console.print(line)
    return {"output": str(folder), "passed": {name: each["passed"] for name, each in files.items()}}


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


def with_precision(source: Source, backend: Backend[Any], precision: Precision) -> Source:
    """Return the same source for another format and precision."""
    return replace(source, spec=backend.all_options.complete(replace(source.spec, precision=precision)))


def markdown(certificates: dict[str, dict[str, Any]]) -> str:
    """Return a table with a row for each certificate, by its name, the model itself first."""
    accuracy = next((each["model_accuracy"] for each in certificates.values() if "model_accuracy" in each), None)
    lines = [_row(name, certificate) for name, certificate in certificates.items()]
    rule = ("---", *("---:" for _ in HEAD[1:-2]), "---", "---")
    model = ("PyTorch fp32", _percent(accuracy), "", "", "", "", "")
    return "".join(f"| {' | '.join(row)} |\n" for row in (HEAD, rule, model, *lines))


def _row(name: str, certificate: dict[str, Any]) -> tuple[str, ...]:
    """Return a row's cells; a file that overflowed has no figures."""
    holds = {True: "yes", False: "no", None: "undecided"}[certificate["passed"]]
    if "snr_db" not in certificate:
        return (name, "", "", "", "", "", holds)
    excluded = len(certificate["spec"]["excluded_layers"])
    return (
        name,
        _percent(certificate["accuracy"]),
        f"{certificate['top1_agreement']:.1f}",
        f"{certificate['snr_db']:.1f}",
        f"{certificate['artifact_bytes'] / 1e6:.2f}",
        f"{excluded} layer{'s' * (excluded > 1)}, {certificate['excluded_macs']:.0f} % of MACs" if excluded else "",
        holds,
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def show(certificate: Certificate, console: Console) -> None:
    """Print a certificate for people."""
    console.print(_headline(certificate))
    table = Table("figure", Column("value", justify="right"), show_header=False)
    rows = [
        ("signal to noise", f"{certificate.snr_db:.1f} dB below the outputs' spread"),
        (
            "error of an image, of the spread",
            f"median {certificate.median_rel_error:.1e}, 99 % within {certificate.p99_rel_error:.1e}, "
            f"largest {certificate.max_rel_error:.1e} ({certificate.worst_image})",
        ),
        ("largest difference", f"{certificate.max_abs_error:.1e}"),
        ("top-1 / top-5 agreement", f"{certificate.top1_agreement:.1f} / {certificate.top5_agreement:.1f} %"),
    ]
    if certificate.changed:
        near_ties = certificate.changed - certificate.changed_decisions
        rows.append(("other top-1", f"{certificate.changed_decisions} decisions, {near_ties} near-ties"))
    if certificate.accuracy is not None:
        rows.append(("accuracy, model → file", f"{certificate.model_accuracy:.2f} → {certificate.accuracy:.2f} %"))
    if certificate.worst_layer is not None:
        rows.append(("worst layer", f"{certificate.worst_layer}, {certificate.worst_layer_snr_db:.1f} dB"))
    if largest := certificate.largest_values:
        rows.append(("largest values", ", ".join(f"{name} {value:.3g}" for name, value in largest.items())))
    if excluded := certificate.spec.excluded_layers:
        share = f"{certificate.excluded_macs:.1f} % of the multiplications"
        rows.append(("excluded from int8", f"{', '.join(excluded)}: {share}"))
    rows += [
        ("weights", f"of {certificate.compared_layers} layers compared one by one"),
        ("preprocessing", f"within {certificate.gray_levels:.2g} gray levels of timm's"),
        ("trained weights", "no: random ones" if certificate.random_weights else "yes"),
        *(("note", note) for note in certificate.notes),
        ("size", f"{certificate.artifact_bytes / 1e6:.2f} MB"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if certificate.arm64 is not None:
        _show_arm64(certificate.arm64, console)


def _show_arm64(section: Arm64, console: Console) -> None:
    """Print the section on ARM64."""
    verdict = {True: "matches its model", False: "EXCEEDS its tolerance", None: "is undecided"}[section.passed]
    why = f": {'; '.join(section.reasons)}" if section.reasons else ""
    console.print(f"on ARM64 it {verdict}{why} ({section.images} images)")
    table = Table("figure", Column("value", justify="right"), show_header=False)
    versions = ", ".join(f"{name} {version}" for name, version in section.versions.items())
    table.add_row("processor", f"QEMU's {section.cpu}: {' '.join(section.features)}")
    table.add_row("runtime", f"{versions}; {section.system}")
    table.add_row("signal to noise", f"{section.snr_db:.1f} dB below the outputs' spread")
    table.add_row("error of an image, of the spread",
                  f"median {section.median_rel_error:.1e}, largest {section.max_rel_error:.1e}")  # fmt: skip
    table.add_row("top-1 / top-5 agreement", f"{section.top1_agreement:.1f} / {section.top5_agreement:.1f} %")
    table.add_row("other top-1", f"{section.changed_decisions} decisions, "
                  f"{section.changed - section.changed_decisions} near-ties")  # fmt: skip
    table.add_row(
        "against this machine", f"{section.host_snr_db:.1f} dB, {section.host_top1_agreement:.1f} % same top-1"
    )
    console.print(table)


def _headline(certificate: Certificate) -> str:
    """Return the verdict in a sentence, with what must not be overlooked."""
    random = " with random weights" if certificate.random_weights else ""
    compared = f"{certificate.images} images in {certificate.runtime}"
    if certificate.passed is None:
        return f"{certificate.artifact}{random} undecided: {'; '.join(certificate.reasons)}; give --images ({compared})"
    verdict = "matches its model" if certificate.passed else "EXCEEDS its tolerance"
    floats = (f"; {certificate.excluded_macs:.0f} % of its multiplications are not in int8, without which it would "
              "not keep to the bounds") if certificate.excluded_macs > MAX_FLOAT_MACS else ""  # fmt: skip
    return f"{certificate.artifact}{random} {verdict}: {compared}{floats}"
