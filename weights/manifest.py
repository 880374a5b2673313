"""The published checkpoints: manifest.toml, read strictly."""

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from shvit.errors import InputError
from shvit.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["SHA256", "Published", "find", "read_manifest"]

MANIFEST = Path(__file__).with_name("manifest.toml")
METRICS = {"classification": {"top1"}, "detection": {"box_ap", "mask_ap"}}
LAYOUTS = ("timm", "reference")
SUFFIXES = (".safetensors", ".pth")
MAX_BYTES = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Published:
    """One published checkpoint; manifest.toml tells what each field means."""

    name: str
    model: str
    task: str
    layout: str
    url: str
    license: str
    img_size: tuple[int, int]
    accuracy: Mapping[str, float]
    accuracy_source: str
    sha256: str | None = None

    @property
    def file_name(self) -> str:
        """Its name in the cache."""
        return self.name + PurePosixPath(urlsplit(self.url).path).suffix


def read_manifest(path: Path = MANIFEST) -> tuple[Published, ...]:
    """The entries of a manifest, in its order.

    Raises:
        InputError: it cannot be read, or an entry is incomplete, has an unknown key, or a value that is not allowed.
    """
    try:
        content = tomllib.loads(read_text(path, MAX_BYTES))
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: not a readable manifest ({error})") from error
    tables = content.pop("checkpoint", None)
    if content or not isinstance(tables, list):
        raise InputError(f"{path}: holds {', '.join(content) or 'no checkpoint'}; it takes [[checkpoint]] tables alone")
    entries = tuple(_entry(table, f"{path}: checkpoint {number}") for number, table in enumerate(tables, start=1))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: the name {name!r} is given {names.count(name)} times; names are unique")
    return entries


def _entry(table: Any, where: str) -> Published:
    if not isinstance(table, dict):
        raise InputError(f"{where}: is {table!r}; it must be a table")
    known = [field.name for field in fields(Published)]
    unknown = [key for key in table if key not in known]
    missing = [key for key in known if key not in table and key != "sha256"]
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; choose from {', '.join(known)}")
    if missing:
        raise InputError(f"{where}: has no {missing[0]}; only sha256 may be left out")
    for key, is_valid, allowed in _rules(table):
        if key in table and not is_valid:
            raise InputError(f"{where}: {key} is {table[key]!r}; it must be {allowed}")
    return Published(**{**table, "img_size": tuple(table["img_size"])})


def _rules(table: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """(key, whether its value is allowed, what is allowed)."""
    get = table.get
    texts = ("name", "model", "license", "accuracy_source")
    url, img_size, accuracy = get("url"), get("img_size"), get("accuracy")
    metrics = METRICS.get(str(get("task")), set())
    return [
        *((key, isinstance(get(key), str) and bool(get(key)), "a text") for key in texts),
        ("name", re.fullmatch(r"[\w.-]+", str(get("name"))) is not None, "letters, digits and ._- alone"),
        ("task", bool(metrics), f"one of {', '.join(METRICS)}"),
        ("layout", get("layout") in LAYOUTS, f"one of {', '.join(LAYOUTS)}"),
        ("url", isinstance(url, str) and url.startswith("https://") and url.endswith(SUFFIXES),
         f"an https address that ends in {' or '.join(SUFFIXES)}"),
        ("img_size", isinstance(img_size, list) and len(img_size) == 2 and all(_is_count(n) for n in img_size),
         "[height, width] in pixels"),
        ("accuracy", isinstance(accuracy, dict) and bool(accuracy) and accuracy.keys() <= metrics
         and all(isinstance(value, float) and 0 < value < 100 for value in accuracy.values()),
         f"a table of {' and '.join(sorted(metrics))} in percent"),
        ("sha256", isinstance(get("sha256"), str) and SHA256.fullmatch(str(get("sha256"))) is not None,
         "64 lower-case hex digits, or left out"),
    ]  # fmt: skip


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def find(name: str) -> Published:
    """The entry called `name`; an InputError that suggests others if there is none."""
    entries = read_manifest()
    for entry in entries:
        if entry.name == name:
            return entry
    names = [entry.name for entry in entries]
    close = difflib.get_close_matches(name, names, n=3)
    raise InputError(f"unknown checkpoint {name!r}; choose from {', '.join(close or names)} (`shvit weights list`)")
