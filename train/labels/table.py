"""Tables of labels as people have them: CSV with any of its separators, TSV and Parquet, as columns of cells."""

import codecs
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shvit.errors import InputError, first_line, some
from shvit.files import open_file, read_bytes

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet")
MAX_BYTES = 2 << 30
MAX_COLUMNS = 30_000
MAX_CELLS = 200_000_000
MAX_TEXT = 100_000  # bytes of a cell
SEPARATORS = (",", ";", "\t")
"""Characters that separate the cells of a CSV: a comma, in countries with a decimal comma a semicolon, or a tab."""
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Table:
    """A table: a list of cells for each named column. A CSV's cells are text, a Parquet's what its types say."""

    path: Path
    columns: dict[str, list[Any]]
    lines: Sequence[int]
    """For each row, the number that messages have: of the line in a CSV, of the row in a Parquet."""

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """Return what messages call a row."""
        return f"{self.path}: {'row' if self.path.suffix.lower() == '.parquet' else 'line'} {self.lines[row]}"


def is_table(path: Path) -> bool:
    """Return whether a path has the suffix of a table."""
    return path.suffix.lower() in SUFFIXES


def read_table(path: Path) -> Table:
    """Read a table whose first line, or schema, names its columns.

    Raises:
        InputError: no such file, another suffix, a table that is damaged, too large, empty, or whose rows have other
            numbers of cells than it has columns.
    """
    if not is_table(path):
        raise InputError(f"{path}: labels are read from {', '.join(SUFFIXES)}; save them as one of these")
    table = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_text(path)
    if not len(table):
        raise InputError(f"{path}: has no rows; give a line for each image below the names of the columns")
    return table


def _checked(path: Path, names: Sequence[str], rows: int) -> list[str]:
    """Return the names of the columns without blanks around them, after checking them and the table's size."""
    names = [name.strip() for name in names]
    if len(names) > MAX_COLUMNS or len(names) * rows > MAX_CELLS:
        raise InputError(
            f"{path}: {len(names):,} columns of {rows:,} rows are more than the {MAX_CELLS:,} cells allowed"
        )
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path}: two columns are called {twice!r}; the first line must name each one differently")
    return names


# --- CSV --------------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> Table:
    content = read_bytes(path, MAX_BYTES)
    try:
        text = content.decode("utf-16" if content.startswith(UTF_16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text, nor UTF-16 with its mark; save it again as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{path}: has NUL characters, so that it is no table of text; save it again as UTF-8")
    return _split(path, text, _separator(path, text))


def _separator(path: Path, text: str) -> str:
    """Return the separator: the one in the first line; of several, the one that most cells are separated by."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    first = text.split("\n", 1)[0]
    return max(SEPARATORS, key=lambda each: len(next(csv.reader([first], delimiter=each), [])))


def _split(path: Path, text: str, separator: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, lines = [], []
    try:
        names = next(reader, [])
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue  # a line that is left blank, often the last
            if len(cells) != len(names):
                raise InputError(f"{path}: line {reader.line_num} has {len(cells)} cells and the first line names "
                                 f"{len(names)} columns; put quotes around cells that hold {separator!r}")  # fmt: skip
            rows.append(cells)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num} is not readable ({first_line(error)}); save the table again"
                         ) from error  # fmt: skip
    names = _checked(path, names, len(rows))
    columns = {name: [row[place].strip() for row in rows] for place, name in enumerate(names) if not _is_index(name)}
    return Table(path, columns, lines)


def _is_index(name: str) -> bool:
    """Return whether a column is the row numbers that pandas writes, which have no name of their own."""
    return not name or name.startswith(("Unnamed: ", "__index_level_"))


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Table:
    """Read the columns of text, numbers and lists of them; others, such as the images themselves, are no labels."""
    from pyarrow import parquet

    try:
        with open_file(path) as file, parquet.ParquetFile(file) as table:
            schema, rows = table.schema_arrow, table.metadata.num_rows
            _checked(path, schema.names, rows)
            _check_bytes(path, table.metadata)
            names = [field.name for field in schema if _is_plain(field.type) and not _is_index(field.name)]
            texts = [leaf.path for leaf in map(table.schema.column, range(len(table.schema)))
                     if leaf.physical_type == "BYTE_ARRAY"]  # fmt: skip
            file.seek(0)
            columns = parquet.read_table(file, columns=names, read_dictionary=texts)
            for name in names:
                _check_expansion(path, columns.column(name))
            plain = columns.to_pydict()
    except InputError:
        raise
    except Exception as error:  # pyarrow has its own for each kind of damage
        raise InputError(f"{path}: not a readable Parquet file ({first_line(error)}); write it again") from error
    return Table(path, {name.strip(): cells for name, cells in plain.items()}, range(1, rows + 1))


def _is_plain(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    tests = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(test(kind) for test in tests)


def _check_bytes(path: Path, metadata: Any) -> None:
    total = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if total > MAX_BYTES:
        raise InputError(f"{path}: holds {total / 1e9:.1g} GB of values, more than the {MAX_BYTES / 1e9:.1g} allowed; "
                         "keep only the columns of files and labels")  # fmt: skip


def _check_expansion(path: Path, column: "pyarrow.ChunkedArray") -> None:
    """Raise InputError for values that are stored once and would take gigabytes where each row has its own."""
    import pyarrow.compute as compute

    for chunk in column.chunks:
        values = chunk.flatten() if hasattr(chunk, "flatten") and hasattr(chunk, "offsets") else chunk
        words = getattr(values, "dictionary", None)
        longest = 0 if words is None or not len(words) else compute.max(compute.binary_length(words)).as_py() or 0
        if longest > MAX_TEXT or len(values) > MAX_CELLS:
            raise InputError(f"{path}: a cell of {longest:,} bytes, or {len(values):,} labels, are more than the "
                             f"{MAX_TEXT:,} bytes and {MAX_CELLS:,} labels allowed")  # fmt: skip


def describe_columns(table: Table) -> str:
    """Return the names of a table's columns, for messages."""
    return some(list(table.columns))
