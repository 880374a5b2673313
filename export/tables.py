"""Certificates as the terminal shows them."""

from rich.console import Console
from rich.table import Column, Table

from .verdict import Figures
from .verify import Arm64, Certificate

MAX_FLOAT_MACS = 10.0  # percent of the multiplications that may be in float before an int8 file's first line says so


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
        *_decision_rows(certificate),
    ]
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


def _decision_rows(figures: Figures) -> list[tuple[str, str]]:
    """Return the rows of what is decided: one class of each image, or each of its labels; none for other outputs."""
    changed = f"{figures.changed_decisions} decisions, {figures.changed - figures.changed_decisions} near-ties"
    if figures.top1_agreement is not None:
        agreement = ("top-1 / top-5 agreement", f"{figures.top1_agreement:.1f} / {figures.top5_agreement:.1f} %")
        return [agreement, *([("other top-1", changed)] if figures.changed else [])]
    if figures.decisions:
        return [("labels on another side", f"{changed}, of {figures.decisions} decisions")]
    return []


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
    for row in _decision_rows(section):
        table.add_row(*row)
    same = "" if section.host_top1_agreement is None else f", {section.host_top1_agreement:.1f} % same top-1"
    table.add_row("against this machine", f"{section.host_snr_db:.1f} dB{same}")
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
