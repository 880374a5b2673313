"""Images whose labels are in a table: matched to files, split into training and validation."""

import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shvit.errors import InputError, refuse, some
from shvit.files import is_file
from shvit.weights.run_info import Task, same_name

from ..data.datasets import Images, Splits, open_splits
from ..data.eval_dataset import TrainedOn, unseen_part
from ..data.groups import group_keys, in_validation
from ..data.image_folders import Files, Listing, TarFiles, describe_skipped, list_images
from ..data.locations import check_path
from ..data.splits import SPLIT_NAMES
from ..recipe import Data, Recipe
from .columns import find_columns
from .table import Table, read_table
from .targets import Targets, read_targets


class LabeledImages(Images):
    """Images whose targets are float32 vectors: item i is (RGB image, (targets,)).

    Args:
        source: reader of the files.
        classes: names of the targets: classes, labels, or one value.
        labels: float32 (images of `source`, targets).
        task: what the targets are; for classification proportions of the classes.
    """

    def __init__(
        self,
        source: Files | TarFiles,
        classes: Sequence[str],
        labels: np.ndarray,
        task: Task,
        indices: Sequence[int] | None = None,
        part: str = "all images",
    ):
        super().__init__(source, classes, indices, part)
        self.labels = labels
        self.task = task

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:  # type: ignore[override]
        image, _ = super().__getitem__(index)
        return image, self.labels[self.indices[index]]

    @property
    def blank_target(self) -> np.ndarray:
        """The mean of all targets, which teaches nothing that the others do not."""
        return self.chosen.mean(0)

    @property
    def ignored_target(self) -> np.ndarray:
        """Nothing known of any target."""
        return np.full(len(self.classes), np.nan, np.float32)

    def check_target(self, index: int, target: np.ndarray) -> None:
        """Targets were checked when the table was read."""

    @property
    def targets(self) -> None:
        """None: no image has one class."""
        return None

    @property
    def chosen(self) -> np.ndarray:
        """The labels of these images, (images, targets)."""
        return self.labels[list(self.indices)]

    @property
    def class_counts(self) -> list[int]:
        """Number of images that have each label; of proportions, their sum, rounded."""
        return self.chosen.sum(0).round().astype(int).tolist()

    def describe(self, index: int) -> str:
        """Return the labels of an item, for the identity of the images."""
        return " ".join(f"{value:.9g}" for value in self.labels[self.indices[index]])

    def reordered(self, index: Sequence[int], classes: Sequence[str]) -> "LabeledImages":
        """Return the images with other classes' targets, NaN for those that these images do not tell.

        Args:
            index: for each of `self.classes` the place among `classes`, or -1 to leave it out.
        """
        labels = np.full((len(self.labels), len(classes)), np.nan, np.float32)
        for old, new in enumerate(index):
            if new >= 0:
                labels[:, new] = self.labels[:, old]
        return LabeledImages(self.source, classes, labels, self.task, self.indices, self.part)

    def subset(self, indices: Sequence[int], part: str) -> "LabeledImages":
        """Return other items of the same source."""
        return LabeledImages(self.source, self.classes, self.labels, self.task, indices, part)


# --- splits -----------------------------------------------------------------------------------------------------------


def open_labeled_splits(data: Data, task: Task) -> Splits:
    """Open the training and validation images of a recipe with a table of labels.

    The table's column of splits tells which images are which; or a second table has the validation images; or else
    about every tenth image, chosen by a hash of its name or of its group, is kept for validation.

    Raises:
        InputError: as `read_table`, `find_columns`, `read_targets`; files are missing, or a part has no images.
    """
    assert data.labels is not None
    training = _read(data.labels, data, task)
    if data.val_labels is None:
        return _split(training, data)
    validation = _read(data.val_labels, data, task)
    if training.splits or validation.splits:
        raise InputError(
            f"{data.labels}: has a column of splits, and --data.val-labels is given; leave one of them out"
        )
    if same := set(training.paths) & set(validation.paths):
        raise InputError(f"{len(same)} images are in both {data.labels} and {data.val_labels}, such as {min(same)}; "
                         "take them out of one")  # fmt: skip
    validation = validation.with_classes(_match(validation, training.classes, data))
    return Splits(training.images(None, "training"), validation.images(None, "validation"),
                  (*training.notes, *validation.notes))  # fmt: skip


def open_recipe_splits(recipe: Recipe) -> Splits:
    """Open the training and validation images of a recipe, of a table or of folders; not for streams."""
    return open_splits(recipe.data) if recipe.data.labels is None else open_labeled_splits(recipe.data, recipe.task)


def open_labeled(
    labels: Path,
    root: Path | None,
    task: Task,
    split: str | None = None,
    trained_on: TrainedOn | None = None,
    **columns: Any,
) -> Images:
    """Open the images of one table to evaluate on: where it has a column of splits, those of a split.

    Args:
        labels: the table.
        root: the folder of its images; its own where None.
        split: train, val or test; val by default.
        trained_on: as in `open_eval_dataset`, for a table without splits.
        columns: what the columns are, by the names of `Data`'s fields.

    Raises:
        InputError: as `open_labeled_splits`, or no image is of that split.
    """
    rows = _read(labels, Data(root=root, labels=labels, **columns), task)
    if not rows.splits:
        refuse(f"{labels} has no column of splits", split=split)
        return unseen_part(rows.images(None, "all images"), rows.listing.root, trained_on)
    wanted = _canonical(split or "val")
    places = rows.places(wanted)
    if not places:
        raise InputError(f"{labels}: no image is of the split {wanted}, only of {some(sorted(set(rows.splits)))}")
    return rows.images(places, f"its {wanted} images")


def _split(rows: "_Rows", data: Data) -> Splits:
    if rows.splits:
        parts = [rows.places(split) for split in ("train", "val")]
        notes = [*rows.notes]
        for name, places in zip(("training", "validation"), parts, strict=True):
            if not places:
                raise InputError(f"{data.labels}: its column of splits has no {name} images, only "
                                 f"{some(sorted(set(rows.splits)))}; call them train and val")  # fmt: skip
        if rest := len(rows.paths) - sum(map(len, parts)):
            notes.append(f"{rest} images of other splits are left out")
    else:
        keys = group_keys(rows.names, data.group)
        chosen = [in_validation(key) for key in keys]
        parts = [[place for place, kept in enumerate(chosen) if kept == wanted] for wanted in (False, True)]
        notes = [*rows.notes]
        if not all(parts):
            raise InputError(f"{data.labels}: {len(keys)} images are too few to keep some for validation; give a "
                             "column split, or --data.val-labels")  # fmt: skip
    splits = Splits(rows.images(parts[0], "training"), rows.images(parts[1], "validation"), tuple(notes))
    return _with_missing(splits)


def _with_missing(splits: Splits) -> Splits:
    """Return the splits with notes on classes that one of them lacks."""
    if getattr(splits.train, "task", "classification") == "regression":
        return splits
    notes = list(splits.notes)
    for part, name in ((splits.train, "training"), (splits.val, "validation")):
        missing = [each for each, count in zip(part.classes, part.class_counts, strict=True) if not count]
        if missing:
            notes.append(f"without a {name} image: {some(missing, 10)}")
    return Splits(splits.train, splits.val, tuple(notes))


def _match(rows: "_Rows", classes: Sequence[str], data: Data) -> dict[str, int]:
    """Return the place of each of a validation table's classes among the training table's."""
    places = {same_name(name): place for place, name in enumerate(classes)}
    if unknown := [name for name in rows.classes if same_name(name) not in places]:
        raise InputError(f"{data.val_labels}: has classes that {data.labels} does not have: {some(unknown)}")
    return places


# --- rows -------------------------------------------------------------------------------------------------------------


class _Rows:
    """The images of a table, each once, in the order in which it first stands there."""

    def __init__(
        self,
        listing: Listing,
        paths: list[str],
        classes: list[str],
        values: np.ndarray,
        splits: list[str],
        task: Task,
        notes: tuple[str, ...],
    ):
        self.listing, self.paths, self.classes, self.values = listing, paths, classes, values
        self.splits, self.task, self.notes = splits, task, notes

    @property
    def names(self) -> list[str]:
        """Names in one form however their accents are written."""
        return list(map(same_name, self.paths))

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
            files = [self.listing.root / path for path in self.paths]
            source = Files(list(zip(files, targets, strict=True)), self.names)
        if whole:
            return Images(source, self.classes, places, part)
        return LabeledImages(source, self.classes, self.values, self.task, places, part)

    def with_classes(self, places: Mapping[str, int]) -> "_Rows":
        """Return the rows with the targets of all classes, by their places; those not among its own have none."""
        order = [places[same_name(name)] for name in self.classes]
        classes = [name for name, _ in sorted(places.items(), key=lambda each: each[1])]
        if self.values.ndim == 1:
            values = np.array(order, np.int64)[self.values]
        else:
            values = np.zeros((len(self.values), len(classes)), np.float32)
            values[:, order] = self.values
        return _Rows(self.listing, self.paths, classes, values, self.splits, self.task, self.notes)


def _read(path: Path, data: Data, task: Task) -> _Rows:
    """Read a table and find its files."""
    check_path(path, "--data.labels")
    table = read_table(path)
    columns = find_columns(table, data)
    targets = read_targets(table, columns, task, data)
    root = data.root or path.parent
    check_path(root, "--data.root")
    listing = list_images(root)
    paths = _find_files(table, columns.files, listing)
    rows, values, notes = _merge(table, paths, targets, task)
    splits = [_canonical(str(table.columns[columns.split][row] or "")) for row in rows] if columns.split else []
    if listing.skipped:
        notes += (f"{listing.label}: {describe_skipped(listing.skipped)}",)
    if rest := len(listing.names) - len(rows):
        notes += (f"{listing.label}: {rest} images are not in {path.name}, and are left out",)
    return _Rows(listing, [paths[row] for row in rows], targets.classes, values, splits, task, notes)


def _canonical(split: str) -> str:
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
