"""Which images must stay on one side of a split: copies by their names, groups by a pattern, and duplicate files."""

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
"""End of the original's name in the name of a copy: Roboflow's `.rf.<hash>`, `_aug_`, `-aug2`."""
ROBOFLOW_SUFFIX = re.compile(r"_(?:jpe?g|png|webp|bmp|tiff?|heic|gif|avif)$", re.IGNORECASE)


def group_keys(names: Sequence[str], pattern: str | None) -> list[str]:
    """Return the group key of each image; images with the same key must stay on one side of a split.

    Args:
        names: image names, relative to their class's folder.
        pattern: regular expression whose first group is the key; without a match, the key is the image's name.
            If None, copies belong to their original, and any other image is its own group.

    Raises:
        InputError: the pattern is not a regular expression with a group.
    """
    if pattern is None:
        return _keys_of_copies(names)
    search = _compile(pattern).search
    with _time_limit(
        MATCHING_S + len(names) / 10_000, f"--data.group {pattern!r}: takes too long; write a simpler one"
    ):
        matches = list(map(search, names))
    return [match[1] if match and match[1] is not None else name for match, name in zip(matches, names, strict=True)]


MATCHING_S = 10.0


@contextmanager
def _time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raise InputError if the block takes longer; only in the main thread of a POSIX system."""
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
    """The original of an image, by its name."""

    folder: str
    """Folder with a trailing slash; empty for the class's folder itself."""
    stem: str
    """File name of the original without suffix; the image's own if it is not a copy."""
    is_copy: bool


def _keys_of_copies(names: Sequence[str]) -> list[str]:
    """Return the original's name without suffix for a copy and its original, and its own name for any other image.

    A copy's original is in its own folder, or else the only image of that name. If there are several in other folders,
    or none, all images of that name belong together.
    """
    origins = [_origin(name) for name in names]
    folders: dict[str, set[str]] = defaultdict(set)
    for origin in origins:
        if not origin.is_copy:
            folders[origin.stem].add(origin.folder)

    def place(origin: _Origin) -> tuple[str, str | None]:
        """Return stem and folder of the original; None for an ambiguous folder."""
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
    """Count validation images in a group with a training image of their class; see `group_keys`."""
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
        raise InputError(f"--data.group {pattern!r}: has no group; put the common part into parentheses, as in "
                         r"'^(.*)_frame\d+'")  # fmt: skip
    return compiled


def _original(base: str) -> str | None:
    """Return the name without suffix of a copy's original; None if the image is not a copy."""
    match = COPY.search(base)
    if match is None or match.start() == 0:
        return None
    return ROBOFLOW_SUFFIX.sub("", base[: match.start()])


def in_validation(key: str) -> bool:
    """Return whether a key is kept for validation: about every tenth, the same ones on every machine."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()[0] < 256 / 10


MAX_SIZES = 200_000  # files whose sizes are compared to find duplicates
MAX_READ = 10_000  # files that are read to find duplicates


def count_duplicates(
    training: Files | TarFiles, train_indices: Sequence[int], validation: Files | TarFiles, val_indices: Sequence[int]
) -> tuple[int, int]:
    """Count validation images with the same bytes as a training image, and how many were compared.

    Files are read only where sizes are equal, and up to `MAX_READ` of them.

    Args:
        train_indices: the training images.
        val_indices: the validation images.
    """
    duplicates = compared = 0
    if len(train_indices) + len(val_indices) > MAX_SIZES:
        return duplicates, compared
    try:
        by_size: dict[int, list[int]] = {}
        for index in train_indices:
            by_size.setdefault(training.size(index), []).append(index)
        digests: dict[int, set[bytes]] = {}
        budget = MAX_READ
        for index in val_indices:
            size = validation.size(index)
            alike = by_size.get(size, [])
            if alike:
                if size not in digests:
                    budget -= len(alike)
                    if budget < 0:
                        break
                    digests[size] = {hashlib.sha256(training.read(other)).digest() for other in alike}
                duplicates += hashlib.sha256(validation.read(index)).digest() in digests[size]
            compared += 1
    except (OSError, InputError):
        pass  # a file that cannot be read is reported when it is loaded
    return duplicates, compared
