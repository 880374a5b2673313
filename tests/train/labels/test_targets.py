"""Columns of labels as people write them, for each task; and what is refused, since it could be read in two ways."""

import numpy as np
import pytest

from shvit.errors import InputError
from shvit.train.labels.columns import find_columns
from shvit.train.labels.table import read_table
from shvit.train.labels.targets import read_targets
from shvit.train.recipe import Data


def read(folder, text, task="classification", **options):
    path = folder / "labels.csv"
    path.write_text(text)
    data, table = Data(labels=path, **options), read_table(path)
    columns = find_columns(table, data)
    return columns, read_targets(table, columns, task, data)


# --- columns ----------------------------------------------------------------------------------------------------------


def test_columns_are_found_by_their_usual_names(tmp_path):
    columns, _ = read(tmp_path, "id,File Name,age,Label,Split\n1,a.jpg,3,x,train\n2,b.jpg,4,y,val\n")
    assert (columns.files, columns.labels, columns.split) == ("File Name", ("Label",), "Split")
    columns, targets = read(tmp_path, "image_id,cat,dog\na,1,0\nb,1,1\n", "multi_label")
    assert (columns.files, columns.labels, columns.split) == ("image_id", ("cat", "dog"), None)
    assert targets.values.tolist() == [[1, 0], [1, 1]]
    columns, _ = read(tmp_path, "x,y,z\na,1,p\nb,2,q\n", file_column="x", label_columns=("z",))
    assert (columns.files, columns.labels) == ("x", ("z",))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("x,label\na,b\n", {}, "no column is called file_name, filename, file and 12 more or alike, and the columns "
                               "are x, label; name that of the files with --data.file-column"),
        ("file,label,class\na,b,c\n", {}, "label and class may all be the labels"),
        ("file,color,size\na,b,c\n", {}, "its columns are file, color, size, and nothing tells which of them are"),
        ("file,split\na,train\n", {}, "has only the columns file, split; add one of labels"),
        ("file,label\na,b\n", {"file_column": "path"}, r"column path: .* has no such column, but file, label"),
        ("file,label\na,b\n", {"label_columns": ("cat",)}, "--data.label-columns cat: "),
    ],
)  # fmt: skip
def test_what_nothing_tells_is_asked_for(tmp_path, text, options, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text, **options)


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_are_sorted_and_numbers_by_value(tmp_path):
    _, targets = read(tmp_path, "file,label\na,dog\nb,cat\nc,dog\n")
    assert (targets.classes, targets.values.tolist()) == (["cat", "dog"], [1, 0, 1])
    _, targets = read(tmp_path, "file,label\na,10\nb,9\nc,0\n")
    assert (targets.classes, targets.values.tolist()) == (["0", "9", "10"], [2, 1, 0])


def test_columns_of_proportions_are_soft_labels_and_ones_are_classes(tmp_path):
    _, targets = read(tmp_path, "file,cat,dog\na,0.25,0.75\nb,1,0\n")
    assert targets.values.dtype == np.float32
    assert targets.values.tolist() == [[0.25, 0.75], [1, 0]]
    _, targets = read(tmp_path, "file,cat,dog\na,0,1\nb,1,0\n")
    assert (targets.values.dtype, targets.values.tolist()) == (np.int64, [1, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,x\nb,\n", "line 3 has no class in the column label"),
        ("file,label\na,x\nb,x\n", "the column label has only one class, x"),
        ("file,label\na,1.5\nb,2\n", "no classes; for numbers give --task regression"),
        ("file,cat,dog\na,1,1\nb,0,1\n", "line 2: the columns cat, dog are 2 in sum, .*give --task multi_label"),
        ("file,cat,dog\na,0.5,0.2\nb,0,1\n", "line 2: the columns cat, dog are 0.7 in sum, and the proportions of an "
                                            "image's classes are 1$"),
        ("file,cat,dog\na,-1,2\nb,0,1\n", "line 2 has -1 in the column cat, and a proportion is 0 or more"),
    ],
)  # fmt: skip
def test_what_is_no_class_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


# --- several labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "options"),
    [
        (("red|blue", "", "blue"), {}),
        (("red;blue", "", "blue"), {}),
        (('"red, blue"', "", "blue"), {}),
        (("red blue", "", "blue"), {"label_separator": " "}),
        (('"[""red"", ""blue""]"', "[]", '"[""blue""]"'), {}),
        (("\"['red', 'blue']\"", "[]", "['blue']"), {}),
    ],
)
def test_lists_of_labels(tmp_path, cells, options):
    text = "file,labels\n" + "".join(f"{name},{cell}\n" for name, cell in zip("abc", cells, strict=True))
    _, targets = read(tmp_path, text, "multi_label", **options)
    assert targets.classes == ["blue", "red"]
    assert targets.values.tolist() == [[1, 1], [0, 0], [1, 0]]


def test_a_name_of_two_words_is_one_label_where_a_separator_says_so(tmp_path):
    _, targets = read(tmp_path, "file,labels\na,traffic light|car\nb,car\n", "multi_label")
    assert targets.classes == ["car", "traffic light"]
    with pytest.raises(InputError, match="'traffic light' in the column labels may be one label or several"):
        read(tmp_path, "file,labels\na,traffic light\nb,car\n", "multi_label")


def test_one_column_of_ones_is_the_label_that_it_is_named_after(tmp_path):
    _, targets = read(tmp_path, "file,defect\na,1\nb,0\n", "multi_label")
    assert (targets.classes, targets.values.tolist()) == (["defect"], [[1], [0]])
    _, targets = read(tmp_path, "file,labels\na,1\nb,0\n", "multi_label")  # numbers of classes
    assert (targets.classes, targets.values.tolist()) == (["0", "1"], [[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('file,labels\na,"x|y, z"\nb,x\n', r"'\|' and ',' may both separate labels in the column labels"),
        ("file,cat,dog\na,1,0.5\n", "line 2 has 0.5 in the column dog, and a label is 0 or 1"),
        ("file,cat,dog\na,1,\n", "nothing tells which of them are labels"),
        ("file,labels\na,\nb,\n", "the column labels has no label at all"),
        ('file,labels\na,"[1"\n', r"line 2: '\[1' is not a list of labels"),
        ('file,labels\na,"[[1]]"\n', "is not a list of labels"),
    ],
)
def test_what_may_be_read_in_two_ways_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text, "multi_label")


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_are_numbers(tmp_path):
    _, targets = read(tmp_path, "file,age\na,3\nb,-4.5e2\n", "regression")
    assert (targets.classes, targets.values.tolist()) == (["age"], [[3], [-450]])
    for cell in ("old", "nan", "inf", "", "1e40"):
        with pytest.raises(InputError, match=f"line 3 has '{cell}' in the column age, and a number is needed"):
            read(tmp_path, f"file,age\na,3\nb,{cell}\n", "regression", label_columns=("age",))
    with pytest.raises(InputError, match="one value for each image, and age, size are several columns"):
        read(tmp_path, "file,age,size\na,3,2\n", "regression")
