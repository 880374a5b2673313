"""A certificate as the terminal shows it: the verdict in a sentence, and its figures."""

from rich.console import Console
from rich.table import Column, Table

from .verify import MAX_FLOAT_MACS, Certificate


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
    if kept := certificate.spec.excluded_layers:
        rows.append(("not in int8", f"{', '.join(kept)}: {certificate.excluded_macs:.1f} % of the multiplications"))
    rows.append(("weights", f"of {certificate.compared_layers} layers compared one by one"))
    rows.append(("preprocessing", f"within {certificate.gray_levels:.2g} gray levels of timm's"))
    rows.append(("weights' file", "none: random weights" if certificate.random_weights else "trained"))
    rows += [("note", note) for note in certificate.notes]
    rows.append(("size", f"{certificate.artifact_bytes / 1e6:.2f} MB"))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _headline(certificate: Certificate) -> str:
    """The verdict in a sentence, with what must not be overlooked."""
    random = " with random weights" if certificate.random_weights else ""
    compared = f"{certificate.images} images in {certificate.runtime}"
    if certificate.passed is None:
        return f"{certificate.artifact}{random} undecided: {'; '.join(certificate.reasons)}; give --images ({compared})"
    verdict = "gives its model's answers" if certificate.passed else "DRIFTS from its model"
    floats = ""
    if certificate.excluded_macs > MAX_FLOAT_MACS:
        floats = (f"; {certificate.excluded_macs:.0f} % of its multiplications are not in int8, without which it would "
                  "not keep to the bounds")  # fmt: skip
    return f"{certificate.artifact}{random} {verdict}: {compared}{floats}"
