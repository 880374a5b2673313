"""Training and validation images of tables of labels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shvit.errors import InputError, refuse, some
from shvit.weights.run_info import Task, same_name

from ..data.datasets import Images, Splits, open_splits
from ..data.eval_dataset import TrainedOn, unseen_part
from ..data.groups import group_keys, in_validation
from ..data.pixels.formats import RGB, PixelFormat
from ..recipe import Data, Recipe
from .rows import Rows, canonical_split, read_rows


def open_labeled_splits(data: Data, task: Task, in_chans: int = 3) -> Splits:
    """Open the training and validation images of a recipe with a table of labels.

    The table's column of splits tells which images are which; or a second table has the validation images; or else
    about every tenth image, chosen by a hash of its name or of its group, is kept for validation.

    Raises:
        InputError: as `read_table`, `find_columns`, `read_targets`; files are missing, or a part has no images.
    """
    assert data.labels is not None
    training = read_rows(data.labels, data, task, in_chans)
    if data.val_labels is None:
        return _split(training, data)
    validation = read_rows(data.val_labels, data, task, in_chans)
    if training.splits or validation.splits:
        raise InputError(
            f"{data.labels}: has a column of splits, and --data.val-labels is given; leave one of them out"
        )
    if same := {*training.files} & {*validation.files}:
        raise InputError(f"{len(same)} images are in both {data.labels} and {data.val_labels}, such as {min(same)}; "
                         "take them out of one")  # fmt: skip
    validation = _with_classes(validation, training.classes, data)
    notes = (*training.notes, *validation.notes)
    return _with_missing(Splits(training.images(None, "training"), validation.images(None, "validation"), notes))


def open_recipe_splits(recipe: Recipe) -> Splits:
    """Open the training and validation images of a recipe, of a table or of folders; not for streams."""
    if recipe.data.labels is None:
        return open_splits(recipe.data, recipe.in_chans)
    return open_labeled_splits(recipe.data, recipe.task, recipe.in_chans)


def open_labeled(
    labels: Path,
    root: Path | None,
    task: Task,
    split: str | None = None,
    trained_on: TrainedOn | None = None,
    pixels: PixelFormat = RGB,
    **columns: Any,
) -> Images:
    """Open the images of one table to evaluate on: where it has a column of splits, those of a split.

    Args:
        labels: the table.
        root: the folder of its images; its own where None.
        split: train, val or test; val by default.
        trained_on: as in `open_eval_dataset`, for a table without splits.
        pixels: the format that images are decoded in.
        columns: what the columns are, by the names of `Data`'s fields.

    Raises:
        InputError: as `open_labeled_splits`, or no image is of that split.
    """
    rows = read_rows(labels, Data(root=root, labels=labels, **columns), task, pixels.in_chans)
    if not rows.splits:
        refuse(f"{labels} has no column of splits", split=split)
        return unseen_part(rows.images(None, "all images").read_as(pixels), rows.listing.root, trained_on)
    wanted = canonical_split(split or "val")
    places = rows.places(wanted)
    if not places:
        raise InputError(f"{labels}: no image is of the split {wanted}, only of {some(sorted(set(rows.splits)))}")
    return rows.images(places, f"its {wanted} images").read_as(pixels)


def _split(rows: Rows, data: Data) -> Splits:
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


def _with_classes(rows: Rows, classes: Sequence[str], data: Data) -> Rows:
    """Return the rows of a validation table with the classes of the training table; those not among its own have none.

    Raises:
        InputError: it has classes that the training table does not have.
    """
    places = {same_name(name): place for place, name in enumerate(classes)}
    if unknown := [name for name in rows.classes if same_name(name) not in places]:
        raise InputError(f"{data.val_labels}: has classes that {data.labels} does not have: {some(unknown)}")
    order = [places[same_name(name)] for name in rows.classes]
    if rows.values.ndim == 1:
        return replace(rows, classes=list(classes), values=np.array(order, np.int64)[rows.values])
    values = np.full((len(rows.values), len(classes)), rows.others, np.float32)
    values[:, order] = rows.values
    return replace(rows, classes=list(classes), values=values)
