"""The certificate beside an exported file: where it stands, and whether the file is still the one that it is of."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckFailed, InputError

MAX_BYTES = 64 << 20


def certificate_path(artefact: Path) -> Path:
    """Where an artefact's certificate stands: beside it."""
    return artefact.with_name(artefact.name + ".certificate.json")


@dataclass(frozen=True)
class Origin:
    """What a certificate says that its artefact was made from."""

    model: str
    checkpoint: str | None
    """What the weights were called; None of random ones, and where an older certificate does not tell."""
    checkpoint_sha256: str | None
    """None of random weights."""
    ema: bool
    data: dict[str, Any] | None
    """The identity of the images that the weights were trained on, where their run told it."""


def read_origin(artefact: Path) -> Origin | None:
    """What the certificate beside an artefact says of its model; None where there is no certificate.

    Raises:
        InputError: the certificate is not readable.
    """
    record = _read(artefact)
    if record is None:
        return None
    values = {name: record.get(name) for name in ("model", "checkpoint", "checkpoint_sha256")}
    texts = all(value is None or (isinstance(value, str) and len(value) < 4096) for value in values.values())
    if not texts or values["model"] is None:
        raise InputError(f"{certificate_path(artefact)}: not a readable certificate; export again, or remove it")
    data = record.get("data")
    return Origin(
        model=str(values["model"]),
        checkpoint=values["checkpoint"],
        checkpoint_sha256=values["checkpoint_sha256"],
        ema=record.get("ema") is True,
        data=data if isinstance(data, dict) else None,
    )


def _read(artefact: Path) -> dict[str, Any] | None:
    path = certificate_path(artefact)
    if not path.exists():
        return None
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable certificate; export again, or remove it") from error
    return record


def check_unchanged(artefact: Path, found: str) -> None:
    """Compares an artefact's SHA-256 with the one in its certificate, where one stands beside it.

    Args:
        found: the artefact's, hex digits.

    Raises:
        InputError: the certificate is not readable, or is another file's.
        CheckFailed: the artefact has changed since it was certified.
    """
    path, record = certificate_path(artefact), _read(artefact)
    if record is None:
        return
    if "artefact" not in record or "artefact_sha256" not in record:
        raise InputError(f"{path}: not a readable certificate; export again, or remove it")
    name, expected = str(record["artefact"]), str(record["artefact_sha256"])
    if found == expected:
        return
    if name != artefact.name:
        raise InputError(f"{path}: is the certificate of another file, {name}; export again, or remove it")
    raise CheckFailed(
        f"{artefact} has changed since it was certified: its SHA-256 is {found[:12]}…, and was {expected[:12]}…; "
        "export it again",
        {"artefact": str(artefact), "artefact_sha256": found, "certified_sha256": expected},
    )
