"""The certificate beside an exported file: reading it, and checking that the file has not changed since."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .documents import load_json, parse_model
from .errors import CheckFailed, InputError
from .files import is_there

MAX_BYTES = 64 << 20


def certificate_path(artifact: Path) -> Path:
    """Return the path of an artifact's certificate, which stands beside it."""
    return artifact.with_name(artifact.name + ".certificate.json")


@dataclass(frozen=True)
class Origin:
    """What an artifact was made from, according to its certificate."""

    model: str
    checkpoint: str | None
    """Name of the weights; None for random ones."""
    checkpoint_sha256: str | None
    """None for random weights."""
    ema: bool
    data: dict[str, Any] | None
    """The identity of the images that the weights were trained on, where it is known."""


def read_origin(artifact: Path) -> Origin | None:
    """Return what the certificate beside an artifact says about its model; None where there is no certificate.

    Raises:
        InputError: the certificate is not readable.
    """
    record = read_certificate(artifact)
    if record is None:
        return None
    if record.model is None:
        raise InputError(f"{certificate_path(artifact)}: does not name the model; export again, or remove it")
    return Origin(record.model, record.checkpoint, record.checkpoint_sha256, record.ema, record.data)


@dataclass(frozen=True)
class CertificateRecord:
    """The part of a certificate that all kinds of artifacts share."""

    artifact: str
    """The artifact's file name."""
    artifact_sha256: str
    model: str | None = None
    """None for a detector."""
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    ema: bool = False
    data: dict[str, Any] | None = None


def read_certificate(artifact: Path) -> CertificateRecord | None:
    """Return what the certificate beside an artifact says; None where there is no certificate.

    Raises:
        InputError: the certificate is not readable.
    """
    path = certificate_path(artifact)
    if not is_there(path):
        return None
    try:
        return parse_model(CertificateRecord, load_json(path, MAX_BYTES), str(path))
    except InputError as error:
        raise InputError(f"{error}: not a readable certificate; export again, or remove it") from error


def check_unchanged(artifact: Path, found: str) -> None:
    """Compare an artifact's SHA-256 with the one in the certificate beside it, if there is one.

    Args:
        found: the artifact's SHA-256, in hex digits.

    Raises:
        InputError: the certificate is not readable, or is another file's.
        CheckFailed: the artifact has changed since it was certified.
    """
    path, record = certificate_path(artifact), read_certificate(artifact)
    if record is None:
        return
    name, expected = record.artifact, record.artifact_sha256
    if found == expected:
        return
    if name != artifact.name:
        raise InputError(f"{path}: is the certificate of another file, {name[:200]}; export again, or remove it")
    raise CheckFailed(
        f"{artifact} has changed since it was certified: its SHA-256 is {found[:12]}…, and was {expected[:12]}…; "
        "export it again",
        {"artifact": str(artifact), "artifact_sha256": found, "certified_sha256": expected},
    )
