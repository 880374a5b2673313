"""Tables of labels in every form in which programs write them, against pandas and the csv module's own writing."""

import io

import pandas
import pyarrow
import pytest
from pyarrow import parquet

from shvit.errors import InputError
from shvit.train.labels import table as tables
from shvit.train.labels.table import read_table

FRAME = pandas.DataFrame({"file": ["a.jpg", "b, c.jpg", 'd "e".jpg'], "label": ["café", "x;y", ""]})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_is_read_as_pandas_wrote_it(tmp_path, encoding, separator, newline):
    path = tmp_path / "labels.csv"
    path.write_bytes(FRAME.to_csv(index=False, sep=separator, lineterminator=newline).encode(encoding))
    table = read_table(path)
    assert table.columns == FRAME.to_dict("list")
    assert [table.where(row) for row in range(3)] == [f"{path}: line {line}" for line in (2, 3, 4)]


def test_row_numbers_and_blank_lines_are_no_labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(FRAME.to_csv() + "\n , ,\n\n")
    assert list(read_table(path).columns) == ["file", "label"]
    assert len(read_table(path)) == 3


def test_parquet_is_read_with_its_types(tmp_path):
    path = tmp_path / "labels.parquet"
    columns = {"file": ["a", "b"], "labels": [["x", "y"], []], "age": [1.5, 2.0]}
    pixels = [{"bytes": b"pixels", "path": "a"}] * 2  # as in the files of the Hugging Face hub
    pandas.DataFrame({**columns, "image": pixels}, index=[7, 9]).to_parquet(path)
    table = read_table(path)
    assert table.columns == columns
    assert table.where(1) == f"{path}: row 2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.jpg,x,y\n", "line 2 has 3 cells and the first line names 2 columns; put quotes around cells"),
        ("file,file\na,b\n", "two columns are called 'file'"),
        ("file,label\n", "has no rows"),
        ("", "has no rows"),
        ('file,label\na.jpg,"x\n', "line 2 is not readable"),
        ("file,label\na.jpg,\0\n", "has NUL characters"),
    ],
)
def test_damaged_text_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_table(path)
    assert "\n" not in str(error.value)


def test_what_is_no_table_is_refused(tmp_path, monkeypatch):
    (tmp_path / "latin.csv").write_bytes("file,label\na.jpg,café\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_table(tmp_path / "latin.csv")
    (tmp_path / "labels.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"labels are read from \.csv, \.tsv, \.txt, \.parquet"):
        read_table(tmp_path / "labels.xlsx")
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "nowhere.csv")
    content = io.BytesIO()
    parquet.write_table(pyarrow.table({"file": ["a"] * 1000}), content)
    (tmp_path / "cut.parquet").write_bytes(content.getvalue()[:-20])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_table(tmp_path / "cut.parquet")
    (tmp_path / "whole.parquet").write_bytes(content.getvalue())
    monkeypatch.setattr(tables, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="GB of values, more than"):
        read_table(tmp_path / "whole.parquet")
    monkeypatch.setattr(tables, "MAX_CELLS", 10)
    with pytest.raises(InputError, match="more than the 10 cells allowed"):
        read_table(tmp_path / "whole.parquet")


@pytest.mark.parametrize("values", [["x" * 200_000] * 50, [["x" * 200_000]] * 50])
def test_a_long_value_that_is_stored_once_for_all_rows_is_refused(tmp_path, values):
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table({"file": ["a"] * 50, "label": values}), path)
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match="a cell of 200,000 bytes"):
        read_table(path)
