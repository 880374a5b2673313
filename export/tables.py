"""Certificates as the terminal shows them."""

from rich.console import Console
from rich.table import Column, Table

from .verify import MAX_FLOAT_MACS, Arm64, Certificate


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
