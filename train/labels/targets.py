"""The targets of images, from the cells of a table: a class, proportions of classes, some labels, or a value."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shvit.errors import InputError, some
from shvit.weights.run_info import MAX_CLASSES, Task, is_name, same_name

from ..recipe import Data
from .columns import Columns, is_usual, number
from .table import Table

SEPARATORS = ("|", ";", ",")
"""Characters that separate several labels in a cell."""
MAX_TARGETS = 2_000_000_000  # numbers in the targets of all images
SUM_TOLERANCE = 0.02
"""How far the proportions of an image may be from 1 in sum: they are often written with two decimals."""


@dataclass(frozen=True)
class Targets:
    """The targets of each row of a table."""

    classes: list[str]
    values: np.ndarray
    """Class indices, int64 (rows,); or float32 (rows, classes): proportions, labels as 0 and 1, or one value."""
    others: float = 0.0
    """The target of a class that the table does not name; NaN where nothing is known of it."""


def read_targets(table: Table, columns: Columns, task: Task, data: Data) -> Targets:
    """Return the classes and targets of a table.

    Raises:
        InputError: a cell has not what the task needs, or there is only one class.
    """
    names = columns.labels
    if task == "regression":
        if len(names) > 1:
            raise InputError(f"{table.path}: a regression has one value for each image, and {some(names)} are "
                             "several columns; name the one with --data.label-columns")  # fmt: skip
        return Targets([_name(table, names[0])], _numbers(table, names))
    if task == "multi_label":
        if len(names) > 1 or _is_indicator(table, names[0]):
            return _indicators(table, names)
        return _label_lists(table, names[0], data.label_separator)
    return _proportions(table, names) if len(names) > 1 else _classes(table, names[0])


def _classes(table: Table, column: str) -> Targets:
    """Read one column of class names."""
    cells = [_text(table, column, row) for row in range(len(table))]
    classes = _sorted(set(map(same_name, cells)))
    if len(classes) < 2:
        raise InputError(f"{table.path}: the column {column} has only one class, {classes[0]}; give images of others")
    if len(classes) > max(1000, len(table) // 2) or _are_measurements(classes):
        raise InputError(f"{table.path}: the column {column} has {len(classes)} different values in {len(table)} rows, "
                         "such as " f"{some(classes, 2)}, which are no classes; for numbers give --task regression"
                         )  # fmt: skip
    places = {name: place for place, name in enumerate(classes)}
    return Targets(classes, np.array([places[same_name(cell)] for cell in cells], np.int64))


def _are_measurements(names: Sequence[str]) -> bool:
    """Return whether all names are numbers, and some have a fraction."""
    values = [number(name) for name in names]
    return all(value is not None for value in values) and not all(float(value or 0).is_integer() for value in values)


def _text(table: Table, column: str, row: int) -> str:
    """Return the class name in a cell."""
    cell = table.columns[column][row]
    name = "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else str(cell).strip()
    if not name:
        raise InputError(f"{table.where(row)} has no class in the column {column}; give each image one")
    return _name(table, name)


def _name(table: Table, name: str) -> str:
    if not is_name(name):
        raise InputError(f"{table.path}: {name[:80]!r} cannot be the name of a class; names have no control characters")
    return name


def _sorted(names: Iterable[str]) -> list[str]:
    """Return names in order; whole numbers by their value, so that 10 follows 9."""
    names = list(names)
    if len(names) > MAX_CLASSES:
        raise InputError(f"{len(names):,} classes are more than the {MAX_CLASSES:,} allowed; choose another column")
    whole = all(name.isdecimal() and name.isascii() and len(name) < 19 for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if whole else None)


# --- a column for each class ------------------------------------------------------------------------------------------


def _numbers(table: Table, names: Sequence[str]) -> np.ndarray:
    """Read columns of numbers as float32 (rows, columns)."""
    _check_size(table, len(names))
    values = np.empty((len(table), len(names)), np.float32)
    for place, name in enumerate(names):
        for row, cell in enumerate(table.columns[name]):
            value = number(cell)
            if value is None:
                raise InputError(f"{table.where(row)} has {str(cell)[:40]!r} in the column {name}, and a number is "
                                 "needed; correct it, or leave the row out")  # fmt: skip
            values[row, place] = value
    return values


def _check_size(table: Table, classes: int) -> None:
    if len(table) * classes > MAX_TARGETS:
        raise InputError(f"{table.path}: {len(table):,} rows of {classes:,} labels are too many; leave out rare labels")


def _is_indicator(table: Table, column: str) -> bool:
    """Return whether one column has 0 and 1 for the label that it is named after, rather than labels."""
    return not is_usual(column) and all(number(cell) in (0, 1) for cell in table.columns[column])


def _indicators(table: Table, names: Sequence[str]) -> Targets:
    """Read a column of 0 and 1 for each label."""
    values = _numbers(table, names)
    _refuse_where(table, names, values, (values != 0) & (values != 1), "a label is 0 or 1")
    return Targets([_name(table, name) for name in names], values, others=math.nan)  # a label without a column


def _proportions(table: Table, names: Sequence[str]) -> Targets:
    """Read a column for each class: 1 for the class of an image and 0 for the others, or proportions."""
    values = _numbers(table, names)
    _refuse_where(table, names, values, values < 0, "a proportion is 0 or more")
    sums = values.sum(1)
    off = np.flatnonzero(np.abs(sums - 1) > SUM_TOLERANCE)
    if off.size:
        several = "; for images with several labels give --task multi_label" if np.isin(values, (0, 1)).all() else ""
        raise InputError(f"{table.where(int(off[0]))}: the columns {some(names, 3)} are {sums[off[0]]:g} in sum, and "
                         f"the proportions of an image's classes are 1{several}")  # fmt: skip
    classes = [_name(table, name) for name in names]
    if np.isin(values, (0, 1)).all():
        return Targets(classes, values.argmax(1).astype(np.int64))
    return Targets(classes, values / sums[:, None])


def _refuse_where(table: Table, names: Sequence[str], values: np.ndarray, wrong: np.ndarray, rule: str) -> None:
    """Raise InputError for the first value that is marked as wrong."""
    if wrong.any():
        row, column = map(int, np.argwhere(wrong)[0])
        raise InputError(f"{table.where(row)} has {values[row, column]:g} in the column {names[column]}, and {rule}; "
                         "correct it, or leave the row out")  # fmt: skip


# --- several labels in a cell -----------------------------------------------------------------------------------------


def _label_lists(table: Table, column: str, separator: str | None) -> Targets:
    """Read a column of any number of labels, in text between separators, as JSON, or as a Parquet's lists."""
    cells = table.columns[column]
    read = _reader(table, column, separator)
    lists = [list(map(same_name, read(row, cell))) for row, cell in enumerate(cells)]
    classes = _sorted({_name(table, label) for labels in lists for label in labels})
    if not classes:
        raise InputError(f"{table.path}: the column {column} has no label at all; name another with "
                         "--data.label-columns")  # fmt: skip
    _check_size(table, len(classes))
    places = {name: place for place, name in enumerate(classes)}
    values = np.zeros((len(lists), len(classes)), np.float32)
    for row, labels in enumerate(lists):
        values[row, [places[label] for label in labels]] = 1
    return Targets(classes, values)


def _reader(table: Table, column: str, separator: str | None) -> Callable[[int, Any], list[str]]:
    """Return the function that reads a column's cells, of which one may be empty: that image has no label."""
    cells = [cell for cell in table.columns[column] if cell is not None]
    if any(isinstance(cell, list | tuple | np.ndarray) for cell in cells):
        return lambda row, cell: _listed(table, row, cell)
    texts = [str(cell).strip() for cell in cells]
    if texts and all(not text or text.startswith("[") for text in texts):
        return lambda row, cell: _listed(table, row, _parsed(table, row, str(cell or "").strip()))
    chosen = separator or _separator(table, column, texts)
    return lambda row, cell: [
        part.strip() for part in str(cell if cell is not None else "").split(chosen) if part.strip()
    ]


def _separator(table: Table, column: str, texts: Sequence[str]) -> str:
    """Return what separates the labels in cells.

    Raises:
        InputError: several characters may do, or blanks, which names may have too.
    """
    found = [each for each in SEPARATORS if any(each in text for text in texts)]
    if len(found) > 1:
        raise InputError(f"{table.path}: {' and '.join(map(repr, found))} may both separate labels in the column "
                         f"{column}; say which one does with --data.label-separator")  # fmt: skip
    spaced = next((text for text in texts if len(text.split()) > 1), None)
    if not found and spaced is not None:
        raise InputError(f"{table.path}: {spaced[:60]!r} in the column {column} may be one label or several; say it "
                         "with --data.label-separator ' ' (several) or '|' (one)")  # fmt: skip
    return found[0] if found else SEPARATORS[0]


def _parsed(table: Table, row: int, text: str) -> object:
    if not text:
        return []
    try:
        return json.loads(text.replace("'", '"') if '"' not in text else text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{table.where(row)}: {text[:60]!r} is not a list of labels") from error


def _listed(table: Table, row: int, cell: Any) -> list[str]:
    if cell is None:
        return []
    if not isinstance(cell, list | tuple | np.ndarray) or any(not isinstance(each, str | int) for each in cell):
        raise InputError(f"{table.where(row)}: {str(cell)[:60]!r} is not a list of labels")
    return [str(each).strip() for each in cell]
