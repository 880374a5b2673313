"""Metadata of every artifact, whatever its format: its spec, labels, ranges and the versions that made it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from shvit import __version__
from shvit.documents import parse_json, parse_model, to_json
from shvit.errors import InputError
from shvit.weights.run_info import is_name

from .spec import Spec

INPUT = "image"  # name of every artifact's one input
FORMAT_VERSION = 1  # version of these notes; it rises when what stands under a key changes its meaning
FORMAT_KEY, SPEC_KEY, LABELS_KEY, RANGES_KEY = "shvit.format", "shvit.spec", "shvit.labels", "shvit.ranges"
Ranges = Mapping[str, tuple[float, float]]  # lowest and highest value of tensors in 8 bits, by name


def describe(spec: Spec, labels: Sequence[str] = (), ranges: Ranges | None = None) -> dict[str, str]:
    """Return what an artifact says of itself: format version, spec, labels, learned ranges, license, versions."""
    import timm

    return {
        FORMAT_KEY: str(FORMAT_VERSION),
        SPEC_KEY: spec.to_json(),
        **({LABELS_KEY: to_json(list(labels))} if labels else {}),
        **({RANGES_KEY: to_json(ranges)} if ranges else {}),
        "shvit.version": __version__,
        "torch.version": torch.__version__,
        "timm.version": timm.__version__,
        "license": "mit" if spec.model.startswith("shvit") else "see the model's card in timm",
    }


def spec_from(metadata: dict[str, str], path: Path) -> Spec:
    """Return the spec in a file's metadata; raise InputError where there is none, or one of another format version."""
    if SPEC_KEY not in metadata:
        raise InputError(f"{path}: was not written by `shvit export`, so its preprocessing is not known; "
                         "export the model again with it")  # fmt: skip
    if (version := metadata.get(FORMAT_KEY)) != str(FORMAT_VERSION):
        actual = "no format version" if version is None else f"format version {version[:20]!r}"
        raise InputError(f"{path}: has {actual}, and this shvit reads {FORMAT_VERSION}; export the model again")
    return Spec.from_json(metadata[SPEC_KEY], str(path))


def labels_from(metadata: dict[str, str], path: Path) -> tuple[str, ...]:
    """Return the names of the classes in a file's metadata; raise InputError where they are not a list of names."""
    where = f"{path}: its labels"
    labels = parse_model(list[str], parse_json(metadata.get(LABELS_KEY, "[]"), where), where, "export the model again")
    if wrong := next((each for each in labels if not is_name(each)), None):
        raise InputError(f"{where}: {wrong[:80]!r} cannot be a name; export the model again")
    return tuple(labels)


def ranges_from(metadata: dict[str, str], path: Path) -> dict[str, tuple[float, float]]:
    """Return the ranges learned for 8-bit tensors in a file's metadata; raise InputError where they are not ranges."""
    where = f"{path}: its ranges"
    text = metadata.get(RANGES_KEY, "{}")
    return parse_model(dict[str, tuple[float, float]], parse_json(text, where), where, "export the model again")
