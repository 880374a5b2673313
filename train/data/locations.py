"""Checks of dataset locations: a local path or a plain name, never an address or a command.

The libraries behind datasets open more than files: WebDataset's `gopen` starts a shell for `pipe:…` and programs for
`http:` and `gs:`, fsspec knows forty schemes, and TensorFlow Datasets and `datasets` fetch code for some names. So
names from a recipe, an option or a list of shards are checked here before they reach such a library.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path, PurePosixPath

from shvit.errors import InputError

NAMED = ("wds/", "hfds/", "hfids/", "tfds/", "torch/")
"""timm's prefixes of named datasets."""
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
"""Start of an address; one letter and a colon are a drive."""
WORD = r"[A-Za-z0-9_](?!.*\.\.)[\w.-]{0,95}"
NAMES = {
    "wds/": (re.compile(r""), "data.root is the folder of the shards, so nothing follows the prefix"),
    "hfds/": (
        re.compile(rf"{WORD}(/{WORD})?"),
        "a dataset of the Hugging Face hub is called name or organization/name",
    ),
    "tfds/": (
        re.compile(r"[a-z0-9_]{1,96}(/[\w.-]{1,96})?(:[\d.*]{1,32})?"),
        "a TensorFlow dataset is called name, name/config or name:version",
    ),
    "torch/": (re.compile(r"[A-Za-z0-9_]{1,64}"), "a dataset of torchvision is called by one word, such as cifar10"),
}
NAMES["hfids/"] = NAMES["hfds/"]
BUILDERS = {"pandas", "cache", "generator", "sql", "spark"}
"""Names of builders in `datasets` that read local files; the first one unpickles files of the working directory, in
versions before 5."""
CODE = (".py", ".ipynb", ".sh", ".so")
SPLIT = re.compile(r"[\w+.:%\[\]()/, -]{0,200}")
MAX_SHARDS = 100_000


def check_path(path: Path | None, option: str) -> None:
    """Check that a dataset's location is a path.

    Args:
        option: its name in messages.

    Raises:
        InputError: the location is an address, such as `pipe:`, `https:` or `s3:`.
    """
    text = str(path or "")
    if "\0" in text:
        raise InputError(f"{option} has a NUL character; give a path")
    if SCHEME.match(text) and not _is_there(text):
        raise InputError(f"{option} {text[:80]!r} is an address or a command, and only a path is opened; download the "
                         "data, and give its folder")  # fmt: skip


def _is_there(text: str) -> bool:
    """Return whether a path exists: a name with a colon, such as a folder `2024:summer`, is not an address then."""
    try:
        return not text.startswith("pipe:") and Path(text).exists()
    except OSError:
        return False


def check_dataset_name(name: str, split: str) -> None:
    """Check the name of a dataset that timm opens, and of its split.

    Raises:
        InputError: the prefix is unknown, the name is a path, an address or a script, or the split's name is malformed.
    """
    prefix = next((each for each in NAMED if name.startswith(each)), None)
    if prefix is None:
        raise InputError(f"data.name {name[:80]!r} is not known; it begins with one of {', '.join(NAMED)}")
    pattern, hint = NAMES[prefix]
    rest = name.removeprefix(prefix)
    if not pattern.fullmatch(rest) or rest.lower().endswith(CODE):
        raise InputError(f"data.name {name[:80]!r} is not the name of a dataset; {hint}")
    if prefix in ("hfds/", "hfids/") and rest.lower() in BUILDERS:
        raise InputError(f"data.name {name!r} reads files of the working directory and is not a dataset; give one "
                         "of the Hugging Face hub")  # fmt: skip
    if prefix != "wds/" and (not SPLIT.fullmatch(split) or ".." in split or "//" in split):
        raise InputError(f"{name}: {split[:80]!r} is not the name of a split; choose one, such as train or validation")


# --- shards -----------------------------------------------------------------------------------------------------------


def shard_paths(root: Path, names: Sequence[str], source: str) -> tuple[Path, ...]:
    """Return the paths of shards, whose names are relative to their folder.

    Args:
        source: origin of the names, in messages.

    Raises:
        InputError: a name is absolute, leads out of the folder, or is an address; or there are too many names.
    """
    if len(names) > MAX_SHARDS:
        raise InputError(f"{source}: names {len(names)} shards, more than the {MAX_SHARDS:,} allowed")
    folder = root.absolute()
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if (
            not parts or ".." in parts or parts[0] == "/" or "\0" in name or "::" in name or len(name) > 1000
            or SCHEME.match(name) or re.match(r"[A-Za-z]:", name)
        ):  # fmt: skip
            raise InputError(
                f"{source}: the shard {name[:80]!r} is not a file below {root}; name shards relative to it"
            )
    return tuple(folder / name for name in names)


BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern such as `train-{0000..0099}.tar` or `{a,b}.tar` stands for.

    Raises:
        InputError: the pattern stands for more than `MAX_SHARDS`, or is malformed.
    """
    texts = BRACES.split(pattern)  # alternates between text outside of braces and inside
    choices = [_choices(inner, pattern) for inner in texts[1::2]]
    if any(brace in text for text in texts[::2] for brace in "{}$"):
        raise InputError(f"{pattern[:80]!r} is not a pattern of shards; write one such as train-{{0000..0099}}.tar")
    if (count := prod(map(len, choices))) > MAX_SHARDS:
        raise InputError(f"{pattern[:80]!r} stands for {count:.0e} shards, more than the {MAX_SHARDS:,} allowed")
    return ["".join(_joined(texts[::2], chosen)) for chosen in product(*choices)]


def _choices(inner: str, pattern: str) -> list[str]:
    bounds = RANGE.fullmatch(inner)
    if bounds is None:
        return inner.split(",")
    first, last = bounds.groups()
    if int(last) < int(first) or int(last) - int(first) >= MAX_SHARDS:
        raise InputError(f"{pattern[:80]!r}: {{{inner}}} must be an ascending range of at most {MAX_SHARDS:,}")
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def _joined(between: list[str], chosen: tuple[str, ...]) -> Iterator[str]:
    yield between[0]
    for choice, text in zip(chosen, between[1:], strict=True):
        yield choice
        yield text
