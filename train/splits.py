"""Which folders are splits and which are classes, and which images stay together on one side of a split.

Everything is decided by names, alike for a folder and for a tar of it.
"""

import hashlib
import os
import re
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from shvit.errors import InputError, some
from shvit.files import is_folder
from shvit.weights.run_info import same_name

from .folders import Files, Listing, TarFiles, describe_skipped, is_hidden, list_images
from .shards import has_info

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
"""What folders (and tars) of a split are called, in any letter case."""
SPLIT_WORDS = {name for names in SPLIT_NAMES.values() for name in names}
SPLIT_WORDS |= {"trn", "tst", "dev", "eval", "holdout", "fold", "split", "part", "set", "subset", "batch"}


@dataclass(frozen=True)
class Parts:
    """The splits of a folder or a tar, or all of it where it has none."""

    train: Path | Listing | None = None
    val: Path | Listing | None = None
    whole: Path | Listing | None = None
    others: tuple[str, ...] = ()
    """Folders and tars beside the splits."""
    notes: tuple[str, ...] = ()


def find_parts(root: Path) -> Parts:
    """Which folders or tars in `root` are its splits; nothing is listed of a folder yet.

    Raises:
        InputError: no such folder, or the tar cannot be read.
    """
    if is_folder(root):
        entries = [entry for entry in _entries(root) if not is_hidden(entry.name)]
        folders = [entry.name for entry in entries if entry.is_dir()]
        tars = [entry.name for entry in entries if entry.suffix.lower() == ".tar" and entry.is_file()]
        chosen, others, notes = _choose(folders, tars, lambda name: _has_folders(root / name))
        parts = {split: root / name for split, name in chosen.items()}
        return Parts(parts.get("train"), parts.get("val"), None if parts else root, others, notes)
    listing = list_images(root)
    chosen, others, notes = _choose(listing.classes, [], lambda name: bool(listing.below(name).folders))
    inside = {split: listing.below(name) for split, name in chosen.items()}
    if inside and listing.skipped:
        notes = (*notes, describe_skipped(listing.skipped))
    return Parts(inside.get("train"), inside.get("val"), None if inside else listing, others, notes)


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() and not is_hidden(entry.name) for entry in _entries(folder))


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error


def _choose(
    folders: Sequence[str], tars: Sequence[str], has_folders: Callable[[str], bool]
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Folder or tar of each split, by name; those that are left beside them, and what is to be said of it.

    A single folder of such a name is a split if it holds folders, and else a class ("train", among vehicles).
    """
    found: dict[str, list[str]] = {}
    for split, known in SPLIT_NAMES.items():
        for kind in (folders, tars):
            named = [name for name in kind if name.lower().removesuffix(".tar") in known]
            named.sort(key=lambda name: known.index(name.lower().removesuffix(".tar")))
            found.setdefault(split, []).extend(named)
    roles = [split for split, names in found.items() if names]
    if len(roles) == 1 and not any(name in tars or has_folders(name) for name in found[roles[0]]):
        return {}, (), ()
    notes = []
    if not found["val"] and found["train"] and found["test"]:
        found["val"] = found.pop("test")
        notes.append(f"{found['val'][0]} is taken for validation, as there is no val/")
    chosen = {split: names[0] for split, names in found.items() if names and split != "test"}
    others = tuple(name for name in (*folders, *tars) if chosen and name not in chosen.values())
    if others:
        notes.append(f"not used: {some(others)}")
    return chosen, others, tuple(notes)


def check_outside(output: Path | None, data: Path | None) -> None:
    """Check that an output folder lies where no folder is taken for a class, now or the next time.

    Raises:
        InputError: it is the folder of the images or in it, links followed; beside the folders of a split it may be.
    """
    if output is None or data is None or not is_folder(data) or has_info(data):
        return
    above = set(_inodes(output))
    parts = find_parts(data)
    folders = [part for part in (parts.whole, parts.train, parts.val) if isinstance(part, Path)]
    folders += [entry for folder in folders for entry in _entries(folder) if entry.is_dir()]
    inside = next((folder for folder in folders if not above.isdisjoint(_inode(folder))), None)
    if inside is None and parts.whole is None:
        inside = _split_around(output, data)
    if inside is not None:
        raise InputError(f"--output {output}: lies in {inside}, whose folders are classes of images; choose another")


def _split_around(output: Path, data: Path) -> Path | None:
    """The folder of the splits, where it is the output folder; or one in it with a split's name that is around it."""
    place, root = output.resolve(), data.resolve()
    if place == root:
        return data
    below = place.relative_to(root).parts if root in place.parents else ("",)
    return data / below[0] if below[0].lower().startswith(tuple(SPLIT_NAMES)) else None


def _inodes(path: Path) -> Iterator[tuple[int, int]]:
    """Of a path that need not be there, and of all folders above it."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to each other
        raise InputError(f"--output {path}: links that lead nowhere; choose another") from error
    for each in (real, *real.parents):
        yield from _inode(each)


def _inode(path: Path) -> list[tuple[int, int]]:
    """Device and number of what is there, which are the same by whichever name; nothing if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [(status.st_dev, status.st_ino)]


def may_be_split(name: str) -> bool:
    """Whether a folder's name has a word that splits are called by, as `dev` or `eval`."""
    return any(word in SPLIT_WORDS for word in re.findall("[a-z]+", name.lower()))


def as_listing(part: Path | Listing) -> Listing:
    """The listing of a part of `find_parts`.

    Raises:
        InputError: it cannot be read, or two of its class folders have one name.
    """
    listing = list_images(part) if isinstance(part, Path) else part
    for name, other in pairwise(listing.classes):
        if same_name(name) == same_name(other):
            raise InputError(f"{listing.label}: the folders {name!a} and {other!a} have one name, whose "
                             "accents are written in two ways; put their images into one of them")  # fmt: skip
    return listing


def class_names(listing: Listing, option: str = "--data.root") -> list[str]:
    """The classes to train on: the folders right in it, sorted.

    Args:
        option: which option to give another folder with.

    Raises:
        InputError: there are none, one alone, or an empty one.
    """
    classes = listing.classes
    if not classes:
        raise InputError(f"{listing.label}: no class folders in it; put each class's images into a folder of "
                         "their own")  # fmt: skip
    counts = Counter(name.partition("/")[0] for name in listing.names if "/" in name)
    empty = next((name for name in classes if not counts[name]), None)
    if empty is not None:
        left = f" ({describe_skipped(listing.skipped)})" if listing.skipped else ""
        raise InputError(f"{listing.label}/{empty}: an empty class; remove the folder or put images into it{left}")
    if len(classes) == 1:
        lower = _single(listing)
        if len(lower.classes) > 1 and not lower.loose:
            raise InputError(f"{listing.label} holds the folder {classes[0]} alone, which would be one class; give "
                             f"{option} {lower.label}, which holds {some(lower.classes)}")  # fmt: skip
        raise InputError(f"{listing.label} holds one class alone, {classes[0]}; there is nothing to tell it from, so "
                         "put images of other classes into folders beside it")  # fmt: skip
    return classes


def _single(listing: Listing) -> Listing:
    """What is left when folders that are alone are gone into."""
    while len(listing.classes) == 1 and not listing.loose:
        listing = listing.below(listing.classes[0])
    return listing


def check_nesting(listing: Listing, classes: Sequence[str], option: str = "--data.root") -> str | None:
    """What is to be said where class folders hold folders of the same names alone, which may be the classes.

    Raises:
        InputError: and they have names of splits, or hold splits themselves.
    """
    _check_inner_splits(listing)
    inner: dict[str, set[str]] = {name: set() for name in map(same_name, classes)}
    for name in map(same_name, listing.names):
        folder, _, rest = name.partition("/")
        if folder in inner:
            inner[folder].add(rest.rpartition("/")[0].rpartition("/")[2])
    alike = [(a, b) for a, b in pairwise(inner) if inner[a] == inner[b] and len(inner[a]) > 1 and "" not in inner[a]]
    for a, b in alike:
        if may_be_split(a) or may_be_split(b):
            raise InputError(f"{listing.label}: {a}/ and {b}/ hold the same folders ({some(sorted(inner[a]))}) and "
                             "look like splits, not like classes; call them train/ and val/, or give "
                             f"{option} {listing.label}/{a}")  # fmt: skip
    if len(alike) == len(classes) - 1:
        return f"every class folder holds folders of the same names ({some(sorted(inner[alike[0][0]]))}): its parts?"
    return None


def _check_inner_splits(listing: Listing) -> None:
    """Refuse classes that are split inside: all of a class's folders are called as splits are, two or more."""
    inner: dict[str, set[str]] = defaultdict(set)
    for name in listing.names:
        folder, *below = name.split("/")
        inner[folder].add(below[0] if len(below) > 1 else "")
    for folder, names in inner.items():
        if "" not in names and len({_split_of(name) for name in names} - {None}) == len(names) > 1:
            found = " and ".join(f"{folder}/{name}" for name in sorted(names))
            raise InputError(f"{listing.label}: {found} are splits inside of a class; put the classes into the splits, "
                             f"as train/{folder} and val/{folder}")  # fmt: skip


def _split_of(name: str) -> str | None:
    """Of which split a folder has the name, if of any."""
    return next((split for split, known in SPLIT_NAMES.items() if name.lower() in known), None)


# --- groups -----------------------------------------------------------------------------------------------------------

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


# --- duplicates -------------------------------------------------------------------------------------------------------

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
