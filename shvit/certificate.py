"""The certificate beside an exported file: where it stands, and whether the file is still the one that it is of."""

import json
from pathlib import Path

from .errors import CheckFailed, InputError


def certificate_path(artefact: Path) -> Path:
    """Where an artefact's certificate stands: beside it."""
    return artefact.with_name(artefact.name + ".certificate.json")


def check_unchanged(artefact: Path, found: str) -> None:
    """Compares an artefact's SHA-256 with the one in its certificate, where one stands beside it.

    Args:
        found: the artefact's, hex digits.

    Raises:
        InputError: the certificate is not readable, or is another file's.
        CheckFailed: the artefact has changed since it was certified.
    """
    path = certificate_path(artefact)
    if not path.exists():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, expected = str(record["artefact"]), str(record["artefact_sha256"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a readable certificate; export again, or remove it") from error
    if found == expected:
        return
    if name != artefact.name:
        raise InputError(f"{path}: is the certificate of another file, {name}; export again, or remove it")
    raise CheckFailed(
        f"{artefact} has changed since it was certified: its SHA-256 is {found[:12]}…, and was {expected[:12]}…; "
        "export it again",
        {"artefact": str(artefact), "artefact_sha256": found, "certified_sha256": expected},
    )
