"""Which folders are splits, and which are classes.

All decisions are by name, and the same for a folder and for a tar of it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from shvit.errors import InputError, some
from shvit.files import is_folder
from shvit.weights.run_info import same_name

from .image_folders import Listing, describe_skipped, is_hidden, list_images
from .shards import has_info

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
"""Names of a split's folder or tar, in any letter case."""
SPLIT_WORDS = {name for names in SPLIT_NAMES.values() for name in names}
SPLIT_WORDS |= {"trn", "tst", "dev", "eval", "holdout", "fold", "split", "part", "set", "subset", "batch"}


@dataclass(frozen=True)
class Parts:
    """The splits of a folder or a tar, or all of it if it has none."""

    train: Path | Listing | None = None
    val: Path | Listing | None = None
    whole: Path | Listing | None = None
    others: tuple[str, ...] = ()
    """Folders and tars beside the splits."""
    notes: tuple[str, ...] = ()


def find_parts(root: Path, in_chans: int = 3) -> Parts:
    """Find the folders or tars in `root` that are its splits, without listing a folder's images yet.

    Args:
        in_chans: as in `list_images`.

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
    listing = list_images(root, in_chans)
    chosen, others, notes = _choose(listing.classes, [], lambda name: bool(listing.below(name).folders))
    inside = {split: listing.below(name) for split, name in chosen.items()}
    if inside and listing.skipped:
        notes = (*notes, describe_skipped(listing.skipped))
    return Parts(inside.get("train"), inside.get("val"), None if inside else listing, others, notes)


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() and not is_hidden(entry.name) for entry in _entries(folder))


def _entries(folder: Path) -> list[Path]:
    """List the entries of a folder, sorted.

    Raises:
        InputError: the folder cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error


def _choose(
    folders: Sequence[str], tars: Sequence[str], has_folders: Callable[[str], bool]
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Choose the folder or tar of each split by name; return them, those that are left, and notes for the user.

    A single folder with such a name is a split if it holds folders, else a class ("train", among vehicles).
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
        notes.append(f"{found['val'][0]} is used for validation, since there is no val/")
    chosen = {split: names[0] for split, names in found.items() if names and split != "test"}
    others = tuple(name for name in (*folders, *tars) if chosen and name not in chosen.values())
    if others:
        notes.append(f"not used: {some(others)}")
    return chosen, others, tuple(notes)


def check_outside(output: Path | None, data: Path | None) -> None:
    """Check that an output folder is not where it would be read as a class.

    Raises:
        InputError: it is the folder of the images or in it, following links; beside the folders of a split is allowed.
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
        raise InputError(f"--output {output}: is in {inside}, whose folders are classes of images; choose another")


def _split_around(output: Path, data: Path) -> Path | None:
    """Return the folder of the splits if it is the output, or one in it with a split's name that holds the output."""
    place, root = output.resolve(), data.resolve()
    if place == root:
        return data
    below = place.relative_to(root).parts if root in place.parents else ("",)
    return data / below[0] if below[0].lower().startswith(tuple(SPLIT_NAMES)) else None


def _inodes(path: Path) -> Iterator[tuple[int, int]]:
    """Yield device and inode of a path, which need not exist, and of all folders above it."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to each other
        raise InputError(f"--output {path}: a cycle of links; choose another") from error
    for each in (real, *real.parents):
        yield from _inode(each)


def _inode(path: Path) -> list[tuple[int, int]]:
    """Return device and inode of a path, the same by any of its names; empty if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [(status.st_dev, status.st_ino)]


def may_be_split(name: str) -> bool:
    """Return whether a folder's name contains a word for a split, such as `dev` or `eval`."""
    return any(word in SPLIT_WORDS for word in re.findall("[a-z]+", name.lower()))


def as_listing(part: Path | Listing, in_chans: int = 3) -> Listing:
    """List a part of `find_parts`, whose images have a number of channels.

    Raises:
        InputError: the part cannot be read, or two of its class folders have one name.
    """
    listing = list_images(part, in_chans) if isinstance(part, Path) else part
    for name, other in pairwise(listing.classes):
        if same_name(name) == same_name(other):
            raise InputError(f"{listing.label}: the folders {name!a} and {other!a} have one name, whose "
                             "accents are written in two ways; put their images into one of them")  # fmt: skip
    return listing


def class_names(listing: Listing, option: str = "--data.root") -> list[str]:
    """Return the classes to train on, the names of the top-level folders, sorted.

    Args:
        option: the option of the folder, for messages.

    Raises:
        InputError: there is no class, only one, or an empty one.
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
            raise InputError(f"{listing.label} holds only the folder {classes[0]}, which would be one class; give "
                             f"{option} {lower.label}, which holds {some(lower.classes)}")  # fmt: skip
        raise InputError(f"{listing.label} holds only one class, {classes[0]}; put images of other classes "
                         "into folders beside it")  # fmt: skip
    return classes


def _single(listing: Listing) -> Listing:
    """Return the listing below all folders that have no siblings."""
    while len(listing.classes) == 1 and not listing.loose:
        listing = listing.below(listing.classes[0])
    return listing


def check_nesting(listing: Listing, classes: Sequence[str], option: str = "--data.root") -> str | None:
    """Return a note if class folders hold folders of the same names, which may be the real classes.

    Raises:
        InputError: the class folders have names of splits too, or hold splits themselves.
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
    """Refuse classes that hold splits: two or more folders, all with names of splits."""
    inner: dict[str, set[str]] = defaultdict(set)
    for name in listing.names:
        folder, *below = name.split("/")
        inner[folder].add(below[0] if len(below) > 1 else "")
    for folder, names in inner.items():
        if "" not in names and len({_split_of(name) for name in names} - {None}) == len(names) > 1:
            found = " and ".join(f"{folder}/{name}" for name in sorted(names))
            raise InputError(f"{listing.label}: {found} are splits inside a class; put the classes into the splits, "
                             f"such as train/{folder} and val/{folder}")  # fmt: skip


def _split_of(name: str) -> str | None:
    """Return the split whose name a folder has; None if it has none."""
    return next((split for split, known in SPLIT_NAMES.items() if name.lower() in known), None)
