"""Which columns of a table are the files, the labels and the split: as options say, or by the names that people use."""

from dataclasses import dataclass
from typing import Any

from shvit.errors import InputError, some

from ..recipe import Data
from .table import Table, describe_columns

FILES = (
    "file_name", "filename", "file", "file_path", "filepath", "image_path", "path", "image_file", "image_name", "image",
    "img", "image_id", "img_id", "id_code", "id",
)  # fmt: skip
"""Names of a column of files; of several, the first in this order."""
LABELS = (
    "label", "labels", "class", "classes", "class_name", "category", "categories", "tag", "tags", "target", "targets",
    "value", "score",
)  # fmt: skip
SPLITS = ("split", "subset", "partition", "data_set", "set")


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read."""

    files: str
    labels: tuple[str, ...]
    """One column, or one for each class."""
    split: str | None


def find_columns(table: Table, data: Data) -> Columns:
    """Return which columns are which.

    Raises:
        InputError: an option names a column that is not there, or nothing tells which columns are meant.
    """
    files = _given(table, data.file_column, "--data.file-column") or _by_name(table, FILES)
    if files is None:
        raise InputError(f"{table.path}: no column is called {some(FILES, 3)} or alike, and the columns are "
                         f"{describe_columns(table)}; name that of the files with --data.file-column")  # fmt: skip
    split = next(iter(_all_by_name(table, SPLITS, {files, *data.label_columns})), None)
    return Columns(files, _label_columns(table, data, {files, split}), split)


def _given(table: Table, name: str | None, option: str) -> str | None:
    if name is not None and name not in table.columns:
        raise InputError(f"{option} {name}: {table.path} has no such column, but {describe_columns(table)}")
    return name


def _by_name(table: Table, names: tuple[str, ...]) -> str | None:
    known = {_plain(column): column for column in table.columns}
    return next((known[name] for name in names if name in known), None)


def _all_by_name(table: Table, names: tuple[str, ...], others: set[str]) -> list[str]:
    return [column for column in table.columns if _plain(column) in names and column not in others]


def is_usual(column: str) -> bool:
    """Return whether a column has a usual name of labels."""
    return _plain(column) in LABELS


def _plain(column: str) -> str:
    """Return a column's name as the lists above write it: `File Name` as file_name."""
    return column.lower().replace(" ", "_").replace("-", "_")


def _label_columns(table: Table, data: Data, others: set[Any]) -> tuple[str, ...]:
    if data.label_columns:
        for name in data.label_columns:
            _given(table, name, "--data.label-columns")
        return data.label_columns
    usual = _all_by_name(table, LABELS, others)
    if len(usual) == 1:
        return (usual[0],)
    rest = [column for column in table.columns if column not in others]
    if len(rest) == 1 or (not usual and rest and all(_are_numbers(table.columns[column]) for column in rest)):
        return tuple(rest)
    if not rest:
        raise InputError(f"{table.path}: has only the columns {describe_columns(table)}; add one of labels")
    why = f"{' and '.join(usual)} may all be the labels" if usual else "nothing tells which of them are labels"
    raise InputError(f"{table.path}: its columns are {describe_columns(table)}, and {why}; name one column, or one for "
                     "each class, with --data.label-columns")  # fmt: skip


def _are_numbers(cells: list[Any]) -> bool:
    return all(number(cell) is not None for cell in cells)


def number(cell: Any) -> float | None:
    """Return the number in a cell, finite, true as 1 and false as 0; None where it has none."""
    if isinstance(cell, str):
        cell = WORDS.get(cell.lower(), cell)
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if abs(value) < 1e30 else None  # which NaN and infinity are not


WORDS = {"true": 1, "false": 0}
