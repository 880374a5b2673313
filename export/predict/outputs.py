"""Files of predictions: JSON Lines, CSV, Parquet and NumPy arrays, made of a job's records."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shvit.documents import to_json
from shvit.errors import InputError
from shvit.files import atomic_write, check_output_folder, check_replaceable, is_file, open_file

from .journal import Journal, Record
from .models import Kind

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".jsonl", ".csv", ".parquet", ".npy")
BEGINNINGS = {".jsonl": b'{"path": ', ".csv": b"path,", ".parquet": b"PAR1", ".npy": b"\x93NUMPY"}
"""The first bytes of what is written, by which it is known that a file may be replaced."""
ROWS = 4096  # images that are converted at a time
MAX_GROUP_BYTES = 64 << 20
SEPARATOR = "|"  # between the labels of an image in CSV


@dataclass(frozen=True)
class Columns:
    """The columns of a job's output."""

    kind: Kind
    top: int
    """Number of classes of each image, of the kind `classes`; 0 for others."""
    frames: bool
    """Whether images may be frames of videos, which have a number and a time."""
    shapes: Mapping[str, tuple[int, ...]]
    """Name and shape, for one image, of each array of features."""

    @property
    def predicted(self) -> tuple[str, ...]:
        """The names of what records hold of an image besides its path."""
        known: dict[Kind, tuple[str, ...]] = {"value": ("value",), "features": ()}
        return known.get(self.kind, ("labels", "probabilities"))

    @property
    def row_bytes(self) -> int:
        return 4 * sum(map(prod, self.shapes.values()))

    @property
    def dtype(self) -> np.dtype:
        """Return the type of an image's features, with a field of float32 for each array."""
        return np.dtype([(name, "<f4", shape) for name, shape in self.shapes.items()])


def check_output(output: Path | None, has_features: bool) -> None:
    """Raise InputError, before any work is done, where predictions could not be written to the file `output`."""
    if output is None:
        if has_features:
            raise InputError("features are written to a file; give --output F.parquet or F.npy")
        return
    allowed = SUFFIXES[2:] if has_features else SUFFIXES[:3]
    if output.suffix not in allowed:
        what = "features are" if has_features else "predictions are"
        raise InputError(f"--output {output}: {what} written as {', '.join(allowed)}; choose one of these suffixes")
    check_output_folder(output.parent)
    for path in _files(output):
        check_replaceable(path)
        if is_file(path) and path.stat().st_size:
            with open_file(path) as file:
                if not file.read(16).startswith(BEGINNINGS[path.suffix]):
                    raise InputError(f"{path}: is there already, and is not what this command writes; choose another "
                                     "--output")  # fmt: skip
    if output.suffix == ".parquet":
        import pyarrow.parquet  # noqa: F401  (or says how it is installed)


def check_labels(output: Path | None, columns: Columns, classes: Sequence[str]) -> None:
    """Raise InputError where the names of labels cannot be told apart in the file `output`."""
    if output is None or output.suffix != ".csv" or columns.kind != "labels":
        return
    if (wrong := next((name for name in classes if SEPARATOR in name), None)) is not None:
        raise InputError(f"--output {output}: the label {wrong!r} holds {SEPARATOR}, which stands between labels; "
                         "give --output F.jsonl or F.parquet")  # fmt: skip


def _files(output: Path) -> list[Path]:
    """Return the files that are written: beside an array, the lines that name its rows."""
    return [output.with_suffix(".jsonl"), output] if output.suffix == ".npy" else [output]


def write_output(journal: Journal, output: Path, columns: Columns) -> None:
    """Write what a job predicted, atomically, as the suffix says; raise InputError where that is not possible."""
    for path in _files(output):
        with atomic_write(path) as partial:
            WRITERS[path.suffix](journal, partial, columns)


def _write_jsonl(journal: Journal, path: Path, columns: Columns) -> None:
    with path.open("wb") as file:
        file.writelines(journal.texts())


def _write_csv(journal: Journal, path: Path, columns: Columns) -> None:
    ranked = [f"{name}_{rank}" for rank in range(1, columns.top + 1) for name in ("label", "probability")]
    names = ranked if columns.kind == "classes" else columns.predicted
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", *(("frame", "seconds") if columns.frames else ()), *names, "error"])
        for record in journal.records():
            place = (record.get("frame"), record.get("seconds")) if columns.frames else ()
            cells = [None] * len(names) if "error" in record else _cells(record, columns)
            writer.writerow([record["path"], *place, *cells, record.get("error")])


def _cells(record: Record, columns: Columns) -> list[Any]:
    """Return what is predicted of an image as cells: of any number of labels two, with all of them."""
    found = [record[name] for name in columns.predicted]
    if columns.kind == "classes":
        return [cell for pair in zip(*found, strict=True) for cell in pair]
    if columns.kind == "labels":
        return [SEPARATOR.join(map(str, each)) for each in found]
    return found


# --- NumPy ------------------------------------------------------------------------------------------------------------


def _write_npy(journal: Journal, path: Path, columns: Columns) -> None:
    """Write one array (images, …), or where an image has several, an array of structures."""
    shapes = [*columns.shapes.values()]
    descr = "<f4" if len(shapes) == 1 else np.lib.format.dtype_to_descr(columns.dtype)
    shape = (journal.count, *(shapes[0] if len(shapes) == 1 else ()))
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        file.writelines(journal.arrays(rows_at_once(columns)))


# --- Parquet ----------------------------------------------------------------------------------------------------------


class Predictions(Protocol):
    """What tables are written of: the records of images, in order, and their arrays."""

    def records(self) -> Iterator[Record]: ...

    def arrays(self, rows: int) -> Iterator[bytes]: ...


def write_parquet(predictions: Predictions, path: Path, columns: Columns) -> None:
    """Write predictions as a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    schema = _schema(columns)
    rows = rows_at_once(columns)
    arrays = predictions.arrays(rows) if columns.shapes else iter(())
    with parquet.ParquetWriter(path, schema) as writer:
        for records in _chunks(predictions.records(), rows):
            table: dict[str, Any] = {field.name: [record.get(field.name) for record in records] for field in schema}
            if columns.shapes:
                damaged = np.array(["error" in record for record in records])
                table |= feature_columns(np.frombuffer(next(arrays), columns.dtype), damaged, columns)
            writer.write_table(pyarrow.table(table, schema))


def _schema(columns: Columns) -> "pyarrow.Schema":
    import pyarrow

    fields = [pyarrow.field("path", pyarrow.string())]
    if columns.frames:
        fields += [pyarrow.field("frame", pyarrow.int64()), pyarrow.field("seconds", pyarrow.float64())]
    return pyarrow.schema([*fields, *predicted_fields(columns)])


def predicted_fields(columns: Columns) -> "list[pyarrow.Field]":
    """Return the columns of a table that are predicted, with their types."""
    import pyarrow

    types = {
        "labels": pyarrow.list_(pyarrow.string()),
        "probabilities": pyarrow.list_(pyarrow.float32()),
        "value": pyarrow.float32(),
    }
    fields = [pyarrow.field(name, types[name]) for name in columns.predicted]
    for name, shape in columns.shapes.items():
        kind = pyarrow.list_(pyarrow.float32(), prod(shape))
        fields.append(pyarrow.field(name, kind, metadata={"shape": to_json(list(shape))}))
    return [*fields, pyarrow.field("error", pyarrow.string())]


def feature_columns(rows: np.ndarray, damaged: np.ndarray, columns: Columns) -> dict[str, Any]:
    """Return an array of lists for each array of features, null for damaged images."""
    import pyarrow

    found = {}
    for name, shape in columns.shapes.items():
        values = np.ascontiguousarray(rows[name]).reshape(-1)
        mask = pyarrow.array(damaged)
        found[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), prod(shape), mask=mask)
    return found


def rows_at_once(columns: Columns) -> int:
    """Return the number of images that are converted at a time, so that they take little memory."""
    return max(1, min(ROWS, MAX_GROUP_BYTES // max(columns.row_bytes, 1)))


def _chunks(records: Iterator[Record], size: int) -> Iterable[Sequence[Record]]:
    while chunk := list(islice(records, size)):
        yield chunk


WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": write_parquet, ".npy": _write_npy}
