"""The published checkpoints and accuracies: manifest.toml, read strictly, and published.toml."""

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveInt

from shvit.documents import parse_model
from shvit.errors import InputError
from shvit.files import read_text
from shvit.img_size import ImgSize

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Published", "Sha256", "find", "read_manifest"]

MANIFEST = Path(__file__).with_name("manifest.toml")
BASELINES = Path(__file__).with_name("published.toml")
METRICS = {"classification": {"top1"}, "detection": {"box_ap", "mask_ap"}}
MAX_BYTES = 1 << 20


def _matching(pattern: str, problem: str) -> AfterValidator:
    """Return a check of a text, whose message is `problem`."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(problem)
        return text

    return AfterValidator(check)


Text = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, _matching(r"[0-9a-f]{64}", "it is not a SHA-256, which has 64 lower-case hex digits")]
Name = Annotated[str, _matching(r"[\w.-]+", "it may have letters, digits and ._- alone")]
Url = Annotated[
    str, _matching(r"https://.+\.(safetensors|pth)", "it must be an https address of a .safetensors or .pth")
]
Percent = Annotated[float, Field(gt=0, lt=100)]


@dataclass(frozen=True)
class Published:
    """One published checkpoint; the first lines of manifest.toml say what each field means."""

    name: Name
    model: Text
    task: Literal["classification", "detection"]
    layout: Literal["timm", "reference"]
    url: Url
    license: Text
    img_size: tuple[PositiveInt, PositiveInt]
    accuracy: Mapping[str, Percent]
    accuracy_source: Text
    sha256: Sha256 | None = None
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (pydantic's name for it)

    def __post_init__(self) -> None:
        metrics = METRICS[self.task]
        if not self.accuracy or not self.accuracy.keys() <= metrics:
            raise ValueError(f"its accuracy must be a table of {' and '.join(sorted(metrics))} in percent")

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        return self.name + PurePosixPath(urlsplit(self.url).path).suffix


@dataclass(frozen=True)
class _Manifest:
    checkpoint: tuple[Published, ...]
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012


def read_manifest(path: Path = MANIFEST) -> tuple[Published, ...]:
    """Return the entries of a manifest, in its order.

    Raises:
        InputError: it cannot be read, or an entry is incomplete, has an unknown key, or a value that is not allowed.
    """
    try:
        content = tomllib.loads(read_text(path, MAX_BYTES))
        entries = parse_model(_Manifest, content, str(path), "its first lines say what each key holds").checkpoint
    except InputError:
        raise
    except (RecursionError, TypeError, ValueError) as error:  # TypeError: a date, which no key holds
        raise InputError(f"{path}: not a readable manifest ({error})") from error
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: the name {name!r} is given {names.count(name)} times; names are unique")
    return entries


def find(name: str) -> Published:
    """Return the entry called `name`; raise an InputError that suggests others if there is none."""
    entries = read_manifest()
    for entry in entries:
        if entry.name == name:
            return entry
    names = [entry.name for entry in entries]
    close = difflib.get_close_matches(name, names, n=3)
    raise InputError(f"unknown checkpoint {name!r}; choose from {', '.join(close or names)} (`shvit weights list`)")


def published_top1(name: str, img_size: ImgSize) -> float | None:
    """Return ImageNet-1k top-1 in percent at exactly `img_size` pixels; None where it is not known.

    Args:
        name: timm's, such as repvit_m1_1, which means the weights that timm loads by default, or with a tag:
            repvit_m1_1.dist_300e_in1k.
    """
    for entry in read_manifest():
        named = entry.task == "classification" and name in (entry.model, entry.name)
        if named and entry.img_size == img_size:
            return entry.accuracy["top1"]
    return _baselines().get(name, {}).get(img_size.height) if img_size.is_square else None


@cache
def _baselines() -> dict[str, dict[int, float]]:
    """Return accuracy by size for each name, with its tag and without."""
    listed = tomllib.loads(BASELINES.read_text(encoding="utf-8"))["top1"]
    sizes = {name: {int(size): float(top1) for size, top1 in row.items()} for name, row in listed.items()}
    return sizes | {name.partition(".")[0]: row for name, row in sizes.items()}
