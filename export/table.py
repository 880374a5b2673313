"""Every format and precision of one model side by side: what each costs in accuracy and saves in size."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from shvit.documents import load_json, to_json
from shvit.errors import CheckFailed
from shvit.files import atomic_write

from .pipeline import SUFFIXES, Format, Options, Source, check_calibration, export
from .spec import Precision

ROWS: tuple[tuple[Format, Precision], ...] = (
    ("onnx", "fp32"),
    ("onnx", "fp16"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
    ("coreml", "fp16"),
    ("coreml", "int8"),
    ("coreml", "w8a8"),
)
NAMES = {"onnx": "ONNX", "openvino": "OpenVINO", "coreml": "Core ML"}
PACKAGES: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "coreml": ("coremltools",),
}
"""What each format is written and run with."""
HEAD = ("file", "top-1 %", "same top-1 %", "SNR dB", "MB", "not in int8", "holds")


def export_all(folder: Path, source: Source, console: Console) -> dict[str, Any]:
    """Exports all of `ROWS` into `folder`, with formats.md and formats.json; one that drifts gets a row and no file.

    Raises:
        InputError: one of them cannot be made of this source; nothing is written.
        ModuleNotFoundError: a package that one of them needs is not installed; nothing is written.
    """
    for kind, precision in ROWS:
        check_calibration(kind, with_precision(source, kind, precision))
    for name in dict.fromkeys(name for kind, _ in ROWS for name in PACKAGES[kind]):
        importlib.import_module(name)
    certificates = {}
    for kind, precision in ROWS:
        name = f"{source.spec.model}-{precision}{SUFFIXES[kind]}"
        console.print(f"{NAMES[kind]} {precision} …")
        options = Options(dynamic_batch=kind != "coreml")
        try:
            export(kind, folder / name, with_precision(source, kind, precision), options)
            certificates[name] = load_json(folder / f"{name}.certificate.json")
        except CheckFailed as error:
            certificates[name] = error.result
    text = markdown(certificates)
    with atomic_write(folder / "formats.md") as partial:
        partial.write_text(text, encoding="utf-8")
    with atomic_write(folder / "formats.json") as partial:
        partial.write_text(to_json(certificates, indent=2) + "\n")
    for line in text.splitlines():
        console.print(line)
    return {"output": str(folder), "passed": {name: each["passed"] for name, each in certificates.items()}}


def with_precision(source: Source, kind: Format, precision: Precision) -> Source:
    """The same source for another format; Core ML's takes images."""
    return replace(source, spec=replace(source.spec, precision=precision, uint8_input=kind == "coreml"))


def markdown(certificates: dict[str, dict[str, Any]]) -> str:
    """A table with a row for each certificate, the model itself first."""
    accuracy = next((each["model_accuracy"] for each in certificates.values() if "model_accuracy" in each), None)
    rows: list[tuple[str, ...]] = [("PyTorch fp32", _percent(accuracy), "", "", "", "", "")]
    rows += [_row(f"{NAMES[kind]} {precision}", certificate)
             for (kind, precision), certificate in zip(ROWS, certificates.values(), strict=True)]  # fmt: skip
    rule = ("---", *("---:" for _ in HEAD[1:-2]), "---", "---")
    return "".join(f"| {' | '.join(row)} |\n" for row in (HEAD, rule, *rows))


def _row(name: str, certificate: dict[str, Any]) -> tuple[str, ...]:
    """Its cells; of a file that overflowed there are no figures."""
    holds = {True: "yes", False: "no", None: "undecided"}[certificate["passed"]]
    if "snr_db" not in certificate:
        return (name, "", "", "", "", "", holds)
    kept = len(certificate["spec"]["excluded_layers"])
    return (
        name,
        _percent(certificate["accuracy"]),
        f"{certificate['top1_agreement']:.1f}",
        f"{certificate['snr_db']:.1f}",
        f"{certificate['artifact_bytes'] / 1e6:.2f}",
        f"{kept} layer{'s' * (kept > 1)}, {certificate['excluded_macs']:.0f} % of MACs" if kept else "",
        holds,
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
