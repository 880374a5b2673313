"""Which images belong together on one side of a split: copies by their names, groups by a pattern, equal bytes."""

import hashlib
import os
import re
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from shvit.errors import InputError

from .image_folders import Files, TarFiles

COPY = re.compile(r"\.rf\.|[._-]aug(?:mented|mentation)?(?=[._-]|\d|$)", re.IGNORECASE)
"""Where the name of an original ends in that of a copy: Roboflow's `.rf.<hash>`, `_aug_`, `-aug2`."""
ROBOFLOW_SUFFIX = re.compile(r"_(?:jpe?g|png|webp|bmp|tiff?|heic|gif|avif)$", re.IGNORECASE)


def group_keys(names: Sequence[str], pattern: str | None) -> list[str]:
    """What tells for each image which others must be on its side of a split.

    Args:
        names: relative to their class's folder.
        pattern: a regular expression whose first group is the key; where it matches nothing, the image's name is.
            By default copies belong to their original, and any other image stands alone.

    Raises:
        InputError: the pattern is no regular expression with a group.
    """
    if pattern is None:
        return _keys_of_copies(names)
    search = _compile(pattern).search
    with _within(MATCHING_S + len(names) / 10_000, f"--data.group {pattern!r}: takes too long; write a simpler one"):
        matches = list(map(search, names))
    return [match[1] if match and match[1] is not None else name for match, name in zip(matches, names, strict=True)]


MATCHING_S = 10.0


@contextmanager
def _within(seconds: float, message: str) -> Iterator[None]:
    """Raise InputError where it takes longer; in the main thread of a POSIX system, where that can be told."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise InputError(message)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Origin(NamedTuple):
    """What an image's name says of it."""

    folder: str
    """With the slash behind it; empty right in the class's folder."""
    stem: str
    """The file name of its original without suffix; its own if it is no copy."""
    is_copy: bool


def _keys_of_copies(names: Sequence[str]) -> list[str]:
    """For a copy and its original the original's name without suffix, for any other image its own name.

    A copy's original is that in its own folder, or else the only one of that name. Where several in other folders may
    be it, or none is there, all images of that name belong together.
    """
    origins = [_origin(name) for name in names]
    folders: dict[str, set[str]] = defaultdict(set)
    for origin in origins:
        if not origin.is_copy:
            folders[origin.stem].add(origin.folder)

    def place(origin: _Origin) -> tuple[str, str | None]:
        """Stem and folder of its original; None where it is not clear which folder's it is."""
        choice = folders.get(origin.stem, set())
        folder = origin.folder if origin.folder in choice else next(iter(choice)) if len(choice) == 1 else None
        return origin.stem, folder

    copied = {place(origin) for origin in origins if origin.is_copy}
    unclear = {stem for stem, folder in copied if folder is None}
    keys = []
    for name, origin in zip(names, origins, strict=True):
        stem, folder = place(origin)
        if stem in unclear:
            keys.append(stem)
        else:
            keys.append(f"{folder}{stem}" if (stem, folder) in copied else name)
    return keys


def _origin(name: str) -> _Origin:
    before, slash, base = name.rpartition("/")
    original = _original(base)
    stem = os.path.splitext(base)[0] if original is None else original  # noqa: PTH122
    return _Origin(before + slash, stem, original is not None)


def count_copies(training: Files | TarFiles, validation: Files | TarFiles, pattern: str | None) -> int:
    """Validation images that are of a group with a training image of their class, by names; see `group_keys`."""
    names = [*training.names, *validation.names]
    classes = [target for _, target in (*training.samples, *validation.samples)]
    keys = group_keys(names, pattern)
    grouped = [(target, key) if key != name else None for name, target, key in zip(names, classes, keys, strict=True)]
    trained = set(grouped[: len(training)]) - {None}
    return sum(group in trained for group in grouped[len(training) :])


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"--data.group {pattern!r}: not a regular expression ({error})") from error
    if not compiled.groups:
        raise InputError(f"--data.group {pattern!r}: has no group; put what belongs together into parentheses, as in "
                         r"'^(.*)_frame\d+'")  # fmt: skip
    return compiled


def _original(base: str) -> str | None:
    """The name without suffix of what an image is a copy of; None if it is none."""
    match = COPY.search(base)
    if match is None or match.start() == 0:
        return None
    return ROBOFLOW_SUFFIX.sub("", base[: match.start()])


def is_held_out(key: str) -> bool:
    """About every tenth key, the same on every machine; file names need not be UTF-8."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()[0] < 256 / 10


MAX_SIZES = 200_000  # files whose size is asked for to find duplicates
MAX_READ = 10_000  # and that are read


def count_duplicates(
    training: "Files | TarFiles", trained: Sequence[int], validation: "Files | TarFiles", held_out: Sequence[int]
) -> tuple[int, int]:
    """How many of how many validation images have the very bytes of a training image.

    Files are read only where sizes are the same, and of very many, some are looked at.

    Args:
        trained: indices of the training images.
        held_out: indices of the validation images.
    """
    found = looked_at = 0
    if len(trained) + len(held_out) > MAX_SIZES:
        return found, looked_at
    try:
        by_size: dict[int, list[int]] = {}
        for index in trained:
            by_size.setdefault(training.size(index), []).append(index)
        digests: dict[int, set[bytes]] = {}
        budget = MAX_READ
        for index in held_out:
            size = validation.size(index)
            alike = by_size.get(size, [])
            if alike:
                if size not in digests:
                    budget -= len(alike)
                    if budget < 0:
                        break
                    digests[size] = {hashlib.sha256(training.read(other)).digest() for other in alike}
                found += hashlib.sha256(validation.read(index)).digest() in digests[size]
            looked_at += 1
    except (OSError, InputError):
        pass  # a file that cannot be read is named when its turn comes
    return found, looked_at
