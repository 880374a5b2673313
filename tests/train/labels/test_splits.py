"""Tables of labels matched to the files of a folder or a tar, and split without leaks."""

import tarfile

import numpy as np
import pytest
from PIL import Image

from shvit.errors import InputError
from shvit.train.data.datasets import identity
from shvit.train.labels.splits import open_labeled, open_labeled_splits
from shvit.train.recipe import Data


@pytest.fixture
def folder(tmp_path):
    """Forty images in two folders, of which three are beside them with names of several kinds."""
    for index in range(40):
        path = tmp_path / "images" / ("a" if index % 2 else "b") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (6 * index, 0, 0)).save(path)
    return tmp_path


def write(folder, lines, name="labels.csv"):
    path = folder / name
    path.write_text("file,labels,split\n" + "\n".join(lines) + "\n")
    return path


def test_a_column_of_splits_is_the_split(folder):
    path = write(folder, ["images/b/0.png,x|y,train", "images/a/1.png,,train", "images/b/2.png,y,VALID",
                          "images/a/3.png,x,test", "images/b/4.png,z,train"])  # fmt: skip
    splits = open_labeled_splits(Data(labels=path), "multi_label")
    assert splits.train.classes == splits.val.classes == ["x", "y", "z"]
    assert (len(splits.train), len(splits.val)) == (3, 1)
    image, target = splits.train[1]
    assert image.getpixel((0, 0)) == (6, 0, 0)
    assert target.tolist() == [0, 0, 0]
    notes = " / ".join(splits.notes)
    assert "1 images of other splits are left out" in notes
    assert "without a validation image: x, z" in notes
    assert "35 images are not in labels.csv, and are left out" in notes
    test = open_labeled(path, None, "multi_label", "test")
    assert ([each.tolist() for _, each in test], test.part) == ([[1, 0, 0]], "its test images")
    with pytest.raises(InputError, match="no image is of the split dev, only of test, train, val"):
        open_labeled(path, None, "multi_label", "dev")


def test_without_splits_a_tenth_is_kept_and_groups_stay_together(folder):
    path = folder / "labels.csv"
    path.write_text("file,age\n" + "".join(
        f"{'a' if index % 2 else 'b'}/{index}.png,{index}\n" for index in range(40)))  # fmt: skip
    data = Data(root=folder / "images", labels=path, group=r"(\d)\.png")  # by the last digit: ten groups
    splits = open_labeled_splits(data, "regression")
    digits = [{int(target[0]) % 10 for _, target in part} for part in (splits.train, splits.val)]
    assert not digits[0] & digits[1]
    assert len(splits.train) + len(splits.val) == 40
    again = open_labeled_splits(data, "regression")
    assert identity(again.train) == identity(splits.train)
    path.write_text(path.read_text().replace("3.png,3\n", "3.png,4\n"))
    changed = open_labeled_splits(data, "regression")
    assert (identity(changed.train), identity(changed.val)) != (identity(splits.train), identity(splits.val))


def test_two_tables_share_the_classes_of_the_first(folder):
    first = write(folder, ["images/b/0.png,x|y|z,", "images/a/1.png,z,"])
    first.write_text(first.read_text().replace(",split", "").replace(",\n", "\n"))
    second = folder / "val.csv"
    second.write_text("file,labels\nimages/b/2.png,z\nimages/a/3.png,y\n")
    splits = open_labeled_splits(Data(labels=first, val_labels=second), "multi_label")
    assert splits.val.classes == ["x", "y", "z"]
    assert [target.tolist() for _, target in splits.val] == [[0, 0, 1], [0, 1, 0]]
    second.write_text("file,labels\nimages/b/2.png,w\n")
    with pytest.raises(InputError, match=r"has classes that .*labels\.csv does not have: w"):
        open_labeled_splits(Data(labels=first, val_labels=second), "multi_label")
    (folder / "other").mkdir()
    (folder / "other" / "val.csv").write_text("file,labels\n0.png,z\n")
    first.write_text("file,labels\n0.png,z\n")
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    Image.new("RGB", (8, 8)).save(folder / "other" / "0.png")  # of one name in two folders
    both = open_labeled_splits(Data(labels=first, val_labels=folder / "other" / "val.csv"), "multi_label")
    assert (len(both.train), len(both.val)) == (1, 1)
    first.write_text("file,labels\nimages/b/0.png,x|y|z\n")
    second.write_text("file,labels\nimages/b/0.png,z\n")
    with pytest.raises(InputError, match=r"1 images are in both .*, such as .*images/b/0\.png"):
        open_labeled_splits(Data(labels=first, val_labels=second), "multi_label")


def test_a_tar_is_a_folder(folder):
    path = folder / "labels.csv"
    path.write_text("file,label\n" + "".join(f"a/{index}.png,{index % 3}\n" for index in range(1, 40, 2)))
    with tarfile.open(folder / "images.tar", "w") as archive:
        archive.add(folder / "images" / "a", "a")
    in_tar = open_labeled(path, folder / "images.tar", "classification")
    in_folder = open_labeled(path, folder / "images", "classification")
    pairs = zip(in_tar, in_folder, strict=True)
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in pairs)
    assert identity(in_tar) == identity(in_folder)


def test_names_may_lack_their_suffix_and_have_backslashes(folder):
    path = folder / "labels.csv"
    path.write_text(f"id,label\nimages/b/0,x\nimages\\a\\1.png,y\n./images/b/../b/2.png,x\n{folder}/images/b/4.png,y\n")
    images = open_labeled(path, None, "classification")
    assert [image.getpixel((0, 0))[0] // 6 for image, _ in images] == [0, 1, 2, 4]


def test_a_label_in_each_row_is_a_list(folder):
    path = folder / "labels.csv"
    path.write_text("file,label\nimages/b/0.png,x\nimages/a/1.png,y\nimages/b/0.png,y\n")
    images = open_labeled(path, None, "multi_label")
    assert [target.tolist() for _, target in images] == [[1, 1], [0, 1]]
    with pytest.raises(InputError, match=r"line 4: images/b/0\.png has another label in line 2; .*--task multi_label"):
        open_labeled(path, None, "classification")
    path.write_text("file,label\nimages/b/0.png,x\nimages/a/1.png,y\nimages/b/0.png,x\n")
    assert len(open_labeled(path, None, "classification")) == 2


def test_an_image_in_two_splits_is_refused(folder):
    path = write(folder, ["images/b/0.png,x,train", "images/a/1.png,y,val", "images/b/0.png,y,val"])
    with pytest.raises(InputError, match=r"line 4: images/b/0\.png is in the split val here, and in train before"):
        open_labeled_splits(Data(labels=path), "multi_label")


def test_exports_of_roboflow_have_a_table_in_each_split(tmp_path):
    """Columns of 0 and 1 behind blanks, and files beside the table, of one name in both folders."""
    for split, rows in (("train", "0.jpg, 1, 0\n1.jpg, 1, 1\n"), ("valid", "0.jpg, 0, 1\n")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "_classes.csv").write_text(f"filename, cat, guide dog\n{rows}")
        for name in ("0.jpg", "1.jpg"):
            Image.new("RGB", (8, 8)).save(tmp_path / split / name)
    tables = [tmp_path / split / "_classes.csv" for split in ("train", "valid")]
    splits = open_labeled_splits(Data(labels=tables[0], val_labels=tables[1]), "multi_label")
    assert splits.train.classes == ["cat", "guide dog"]
    assert [target.tolist() for _, target in splits.train] == [[1, 0], [1, 1]]
    assert [target.tolist() for _, target in splits.val] == [[0, 1]]
    assert "valid: 1 images are not in _classes.csv" in " ".join(splits.notes)
    tables[1].write_text("filename,cat\n0.jpg,1\n")
    ((_, target),) = open_labeled_splits(Data(labels=tables[0], val_labels=tables[1]), "multi_label").val
    assert target[0] == 1
    assert np.isnan(target[1])  # nothing says whether a dog is there


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "images/a/nowhere.png",
            r"1 of its 2 images are not in the folder .*such as 'images/a/nowhere\.png'",
        ),
        ("../outside.png", r"line 3: '\.\./outside\.png' is not below"),
        ("/etc/passwd", "line 3: '/etc/passwd' is not below"),
        ("", "line 3 has no file name"),
    ],
)
def test_files_that_are_not_there_are_refused(folder, name, message):
    path = folder / "labels.csv"
    path.write_text(f"file,label\nimages/b/0.png,x\n{name},y\n")
    with pytest.raises(InputError, match=message):
        open_labeled(path, None, "classification")


def test_ambiguous_names_are_refused(folder):
    Image.new("RGB", (8, 8)).save(folder / "images" / "b" / "0.jpg")
    path = folder / "labels.csv"
    path.write_text("file,label\nimages/b/0,x\nimages/a/1.png,y\n")
    with pytest.raises(InputError, match=r"images/b/0 may be images/b/0\.jpg, images/b/0\.png; write the whole name"):
        open_labeled(path, None, "classification")
