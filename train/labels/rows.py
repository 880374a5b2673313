"""The rows of a table of labels, matched to the files of a folder or a tar."""

import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shvit.errors import InputError, some
from shvit.files import is_file
from shvit.weights.run_info import Task, same_name

from ..data.datasets import Images
from ..data.image_folders import Files, Listing, TarFiles, describe_skipped, list_images
from ..data.locations import check_path
from ..data.splits import SPLIT_NAMES
from ..recipe import Data
from .columns import find_columns
from .images import LabeledImages
from .table import Table, read_table
from .targets import Targets, read_targets


@dataclass(frozen=True)
class Rows:
    """The images of a table, each once, in the order in which it first stands there."""

    listing: Listing
    """The images of the folder or tar."""
    paths: list[str]
    """Names in it."""
    classes: list[str]
    values: np.ndarray
    others: float
    """Both as in `Targets`."""
    splits: list[str]
    """train, val, test or another name; empty if the table has no column of splits."""
    task: Task
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Names in one form however their accents are written."""
        return list(map(same_name, self.paths))

    @property
    def files(self) -> list[Path]:
        """Paths of the images; for a tar below its own."""
        return [self.listing.root / path for path in self.paths]

    def places(self, split: str) -> list[int]:
        """Return the images of a split."""
        return [place for place, name in enumerate(self.splits) if name == split]

    def images(self, places: Sequence[int] | None, part: str) -> Images:
        """Return some of the images, or all."""
        whole = self.values.ndim == 1
        targets = self.values.tolist() if whole else [0] * len(self.paths)
        source: Files | TarFiles
        if self.listing.members is not None:
            source = TarFiles(self.listing, list(zip(self.paths, targets, strict=True)), self.names)
        else:
            source = Files(list(zip(self.files, targets, strict=True)), self.names)
        if whole:
            return Images(source, self.classes, places, part)
        return LabeledImages(source, self.classes, self.values, self.task, places, part, self.others)


def read_rows(path: Path, data: Data, task: Task, in_chans: int = 3) -> Rows:
    """Read a table and find its files, which are images of a number of channels."""
    check_path(path, "--data.labels")
    table = read_table(path)
    columns = find_columns(table, data)
    targets = read_targets(table, columns, task, data)
    root = data.root or path.parent
    check_path(root, "--data.root")
    listing = list_images(root, in_chans)
    paths = _find_files(table, columns.files, listing)
    rows, values, notes = _merge(table, paths, targets, task)
    splits = _read_splits(table, columns.split, paths, rows) if columns.split else []
    if listing.skipped:
        notes += (f"{listing.label}: {describe_skipped(listing.skipped)}",)
    if rest := len(listing.names) - len(rows):
        notes += (f"{listing.label}: {rest} images are not in {path.name}, and are left out",)
    return Rows(listing, [paths[row] for row in rows], targets.classes, values, targets.others, splits, task, notes)


def _read_splits(table: Table, column: str, paths: Sequence[str], rows: Sequence[int]) -> list[str]:
    """Return the split of each image, whose first row is in `rows`.

    Raises:
        InputError: an image stands in two splits.
    """
    names = [canonical_split(str(cell or "")) for cell in table.columns[column]]
    split_of = {paths[row]: names[row] for row in rows}
    for row, (path, name) in enumerate(zip(paths, names, strict=True)):
        if name != split_of[path]:
            raise InputError(f"{table.where(row)}: {path} is in the split {name} here, and in {split_of[path]} before; "
                             "give each image one")  # fmt: skip
    return [names[row] for row in rows]


def canonical_split(split: str) -> str:
    """Return train, val or test for any of a split's usual names; the name itself for others."""
    plain = split.strip().lower()
    return next((name for name, known in SPLIT_NAMES.items() if plain in known), plain)


def _find_files(table: Table, column: str, listing: Listing) -> list[str]:
    """Return the name in the listing of each row's file.

    A name may be without its suffix, as the ids of many tables are, where only one image has it.

    Raises:
        InputError: files are missing, ambiguous or outside of the folder.
    """
    known = {same_name(name): name for name in listing.names}
    without_suffix: dict[str, list[str]] = defaultdict(list)
    for name in listing.names:
        without_suffix[same_name(os.path.splitext(name)[0])].append(name)  # noqa: PTH122
    found = []
    missing = list[str]()
    for row, cell in enumerate(table.columns[column]):
        given = _relative(table, row, cell, listing)
        alike = [known[given]] if given in known else without_suffix.get(given, [])
        if len(alike) > 1:
            raise InputError(f"{table.where(row)}: {given} may be {some(alike)}; write the whole name")
        found += alike
        if not alike:
            missing.append(given)
    if missing:
        where = "" if table.path.parent == listing.root else " of --data.root"
        raise InputError(f"{table.path}: {len(missing)} of its {len(table)} images are not in the folder{where} "
                         f"{listing.label}, such as {missing[0]!r}; give --data.root, the folder that its names are "
                         "relative to, or leave out their rows")  # fmt: skip
    return found


def _relative(table: Table, row: int, cell: object, listing: Listing) -> str:
    """Return a file's name relative to the listing's folder, with slashes."""
    text = "" if cell is None else str(cell).strip()
    if not text:
        raise InputError(f"{table.where(row)} has no file name; give one, or leave the row out")
    path = text.replace("\\", "/") if "\\" in text and not is_file(listing.root / text) else text
    root = str(listing.root.absolute()).rstrip("/")
    path = posixpath.normpath(path.removeprefix(f"{root}/"))
    if path.startswith(("/", "../")):
        raise InputError(f"{table.where(row)}: {text!r} is not below {listing.label}; give --data.root, the folder "
                         "that file names are relative to")  # fmt: skip
    return same_name(path)


def _merge(
    table: Table, paths: Sequence[str], targets: Targets, task: Task
) -> tuple[list[int], np.ndarray, tuple[str, ...]]:
    """Return the row of each image, its values, and notes: a label in each of several rows is one list of labels.

    Raises:
        InputError: an image has two classes or values.
    """
    values = targets.values
    counts = Counter(paths)
    if len(counts) == len(paths):
        return list(range(len(paths))), values, ()
    first: dict[str, int] = {}
    values = values.copy()
    for row, path in enumerate(paths):
        place = first.setdefault(path, row)
        if place == row:
            continue
        if task == "multi_label":
            values[place] = np.maximum(values[place], values[row])
        elif not np.array_equal(values[place], values[row]):
            raise InputError(f"{table.where(row)}: {path} has another label in line {table.lines[place]}; give each "
                             "image one, or --task multi_label for several")  # fmt: skip
    rows = list(first.values())
    return rows, values[rows], (f"{len(paths) - len(rows)} rows of {table.path.name} are of images that stand there "
                                "already",)  # fmt: skip
