"""The certificate beside an exported file: the fields that all kinds share, read and written in one place."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .documents import load_json, parse_model, to_json
from .errors import CheckFailed, InputError
from .files import is_there

MAX_BYTES = 64 << 20
FORMAT_VERSION = 1
"""It rises when a field changes its meaning; certificates of other versions are refused."""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """Fields of every certificate: the file that it describes, what the file was made from, and the verdict.

    Classifiers' and detectors' certificates add their figures. What has a default here may be missing in a file.
    """

    format_version: int = FORMAT_VERSION
    artifact: str
    """The artifact's file name."""
    artifact_sha256: str
    artifact_bytes: int = 0
    operators: Mapping[str, int] = field(default_factory=dict)
    """Number of each operator in the artifact, most frequent first."""
    model: str | None = None
    checkpoint: str | None = None
    """The weights' path or published name; None for random weights."""
    checkpoint_sha256: str | None = None
    """None for random weights."""
    ema: bool = False
    """True if the checkpoint's EMA weights were taken."""
    data: Mapping[str, Any] | None = None
    """Identity of the images that the weights were trained on, where their run recorded it."""
    runtime: str = ""
    """Runtime of the artifact; mil is this project's evaluator of Core ML packages."""
    images: int = 0
    """Number of images that artifact and model were compared on."""
    image_source: str = ""
    passed: bool | None = None
    """None where the images are not enough to decide."""
    reasons: tuple[str, ...] = ()
    """Reasons for a refusal, or for no verdict; empty for a pass."""
    versions: Mapping[str, str] = field(default_factory=dict)


def certificate_path(artifact: Path) -> Path:
    """Return the path of an artifact's certificate, beside it."""
    return artifact.with_name(artifact.name + ".certificate.json")


def write_certificate(certificate: Envelope, path: Path) -> None:
    """Write a certificate as JSON."""
    path.write_text(to_json(asdict(certificate), indent=2) + "\n")


def read_certificate(artifact: Path) -> Envelope | None:
    """Return the shared fields of the certificate beside an artifact; None where there is no certificate.

    Raises:
        InputError: the certificate is not readable, or of another format version.
    """
    path = certificate_path(artifact)
    if not is_there(path):
        return None
    try:
        content = load_json(path, MAX_BYTES)
        certificate = parse_model(Envelope, content, str(path))
    except InputError as error:
        raise InputError(f"{error}: not a readable certificate; export again, or remove it") from error
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path}: not a readable certificate (it has format version {content.get('format_version')}, "
                         f"and this shvit reads {FORMAT_VERSION}); export again, or remove it")  # fmt: skip
    return certificate


def read_origin(artifact: Path) -> Envelope | None:
    """Return what `read_certificate` does; raise InputError also for a certificate that names no model."""
    certificate = read_certificate(artifact)
    if certificate is not None and certificate.model is None:
        raise InputError(f"{certificate_path(artifact)}: does not name the model; export again, or remove it")
    return certificate


def check_unchanged(artifact: Path, sha256: str) -> None:
    """Compare an artifact's SHA-256, in hex digits, with the one in the certificate beside it, if there is one.

    Raises:
        InputError: the certificate is not readable, or is another file's.
        CheckFailed: the artifact has changed since it was certified.
    """
    certificate = read_certificate(artifact)
    if certificate is None or sha256 == certificate.artifact_sha256:
        return
    expected = certificate.artifact_sha256
    if certificate.artifact != artifact.name:
        raise InputError(f"{certificate_path(artifact)}: is the certificate of another file, "
                         f"{certificate.artifact[:200]}; export again, or remove it")  # fmt: skip
    raise CheckFailed(
        f"{artifact} has changed since it was certified: its SHA-256 is {sha256[:12]}…, and was {expected[:12]}…; "
        "export it again",
        {"artifact": str(artifact), "artifact_sha256": sha256, "certified_sha256": expected},
    )
