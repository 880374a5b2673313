"""Folders as people have them: what is listed, what is a split, what is a class, and what is kept together."""

import os
import shutil
import sys
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from torchvision.datasets import ImageFolder

from shvit.errors import InputError
from shvit.export.images import sample_images, spread
from shvit.train.data.datasets import Splits, duplicates_note, identity, open_dataset, open_splits
from shvit.train.data.eval_dataset import open_eval_dataset
from shvit.train.data.groups import group_keys
from shvit.train.data.image_folders import list_images
from shvit.train.recipe import Data
from shvit.train.run.summary import print_splits

PIXELS = np.random.default_rng(0)


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    return path


def fill(root: Path, *folders: str, count: int = 2, name: str = "{}.png") -> Path:
    for folder in folders:
        for index in range(count):
            image(root / folder / name.format(index))
    return root


def archive(root: Path, path: Path, arcname: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(root, arcname)
    return path


# --- listing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def littered(tmp_path):
    """Two classes, and what systems and tools leave beside and among their images."""
    root = fill(tmp_path / "data", "cat", "dog", "dog/more")
    fill(root, "__MACOSX/cat", "cat/.ipynb_checkpoints", "dog/@eaDir/0.png", ".hidden", "cat/#recycle", ".git/x")
    for name in ("cat/._0.png", "dog/Thumbs.db", "cat/.DS_Store", "dog/desktop.ini"):
        (root / name).write_bytes(b"x")
    for name in ("cat/a.txt", "cat/b.TXT", "dog/c.mp4", "dog/fake.gif", "dog/README"):
        (root / name).write_bytes(b"x")
    Image.new("P", (8, 8)).save(root / "cat" / "real.gif")
    Image.new("RGB", (8, 8)).save(root / "cat" / "real.jfif", format="JPEG")
    return root


@pytest.mark.parametrize("packed", [False, True])
def test_what_systems_leave_is_no_image_and_the_rest_is_counted(littered, packed, tmp_path):
    listing = list_images(archive(littered, tmp_path / "x.tar") if packed else littered)
    assert listing.names == ["cat/0.png", "cat/1.png", "cat/real.gif", "cat/real.jfif", "dog/0.png", "dog/1.png",
                             "dog/more/0.png", "dog/more/1.png"]  # fmt: skip
    assert listing.classes == ["cat", "dog"]
    assert listing.skipped == Counter({".txt": 2, ".mp4": 1, ".gif": 1, "without a suffix": 1})


def test_a_hidden_folder_above_does_not_hide_the_images(tmp_path):
    assert len(list_images(fill(tmp_path / ".cache" / "data", "a", "b")).names) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    fill(tmp_path, "store")
    root = fill(tmp_path / "data", "dog")
    (root / "cat").mkdir()
    for name in ("cat", "dog"):
        (root / name / "batch1").symlink_to(tmp_path / "store")
    (root / "dog" / "self").symlink_to(root / "dog")
    (root / "dog" / "up").symlink_to(tmp_path)
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "store")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    listing = list_images(root)
    assert listing.names == [f"{name}/batch1/{i}.png" for name in ("cat",) for i in range(2)] + [
        "dog/0.png", "dog/1.png", "dog/batch1/0.png", "dog/batch1/1.png"]  # fmt: skip
    assert listing.skipped == Counter({"broken links": 1})
    (root / "elsewhere").symlink_to(tmp_path / "store")  # a class that is itself a link
    assert list_images(root).classes == ["cat", "dog", "elsewhere"]


# --- order of classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arcname", ["", "train", "./deep/train"])
def test_classes_have_one_order_in_folders_and_tars_which_is_torchvisions(arcname, tmp_path):
    root = fill(tmp_path / "train", *(f"class{k}" for k in range(1, 13)), *("B", "a", "é", "ß"))
    expected = ImageFolder(root)
    for data in (root, archive(root, tmp_path / "train.tar", arcname)):
        dataset = open_eval_dataset(data)
        assert dataset.classes == expected.classes == sorted(expected.classes)
        found = [(dataset.classes[target], path.name) for path, target in dataset.samples]
        assert found == [(expected.classes[target], Path(path).name) for path, target in expected.samples]


def test_train_tar_beside_a_val_folder(tmp_path):
    names = [f"{k}" for k in range(1, 13)]
    archive(fill(tmp_path / "t" / "train", *names), tmp_path / "train.tar", "train")
    fill(tmp_path / "val", *names)
    splits = open_splits(Data(root=tmp_path))
    assert splits.train.classes == splits.val.classes == sorted(names)
    assert splits.train.class_counts == splits.val.class_counts == [2] * 12


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("train", "val", "others"),
    [
        ("Training", "Testing", ()),
        ("Train", "Val", ("Test",)),
        ("train", "valid", ("test",)),
        ("TRAIN", "VALIDATION", ("__MACOSX",)),
        ("training", "test", ("docs",)),
    ],
)
def test_splits_have_many_names(train, val, others, packed, tmp_path):
    root = fill(tmp_path / "data", f"{train}/cat", f"{train}/dog", count=3)
    fill(root, f"{val}/cat", f"{val}/dog", *(f"{other}/cat" for other in others))
    splits = open_splits(Data(root=archive(root, tmp_path / "x.tar") if packed else root))
    assert (splits.train.classes, len(splits.train), len(splits.val)) == (["cat", "dog"], 6, 4)
    said = " ".join(splits.notes)
    assert ("used for validation" in said) == (val in ("Testing", "test"))
    assert all((f"not used: {other}" in said) == (other != "__MACOSX") for other in others)
    assert len(open_eval_dataset(root)) == 4


def test_a_class_called_train_is_a_class(tmp_path):
    splits = open_splits(Data(root=fill(tmp_path, "bus", "car", "train", count=40)))
    assert splits.train.classes == ["bus", "car", "train"]


def test_a_class_without_validation_images_is_said(tmp_path):
    root = fill(tmp_path, "train/a", "train/b", "val/a")
    assert "without a validation image: b" in open_splits(Data(root=root)).notes
    (root / "val" / "b").mkdir()
    assert open_splits(Data(root=root)).val.class_counts == [2, 0]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["dataset/cat", "dataset/dog"], r"would be one class; give --data\.root .*/dataset, which holds c"),
        (["x/y/cat", "x/y/dog"], r"give --data\.root .*/x/y, which holds cat, dog"),
        (["data/Training/cat", "data/Testing/cat"], r"give --data\.root .*/data, which holds Testing, Training"),
        (["cat"], "holds only one class, cat; put images of other classes"),
        (["train/cat", "val/cat"], "train holds only one class, cat"),
        (["train/all/cat", "train/all/dog", "val/all/cat", "val/all/dog"], "give --data.root .*/train/all"),
        (["seg_train/cat", "seg_train/dog", "seg_test/cat", "seg_test/dog"], "look like splits, not like classes"),
        (["a/seg_train/cat", "a/seg_train/dog", "b/seg_train/cat", "b/seg_train/dog", "b/x"], None),
        (["seg_train/seg_train/cat", "seg_train/seg_train/dog", "seg_test/seg_test/cat", "seg_test/seg_test/dog",
          "seg_pred/seg_pred"], "look like splits"),
        (["fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"], "look like splits"),
        (["train/1", "test2"], "holds train but neither val"),
        (["train/cat", "train/dog", "dev/cat", "dev/dog"],
         "if dev is the other split, rename it to val, or --data.root"),
        (["train/cat", "train/dog", "eval_set/cat", "more/dog"], "if eval_set is the other split, rename it to val"),
        (["trn/cat", "trn/dog", "val/cat", "val/dog"], "if trn is the other split, rename it to train"),
        (["cat/train", "cat/val", "dog/train", "dog/val"], "cat/train and cat/val are splits inside a class; put "
         "the classes into the splits, such as train/cat and val/cat"),
        (["cat/Train/2019", "cat/test", "dog"], "cat/Train and cat/test are splits inside a class"),
        (["cat/train", "cat/plane", "dog"], None),
        (["cat/2019", "cat/2020", "dog/2019", "dog/2020"], None),
    ],
)  # fmt: skip
def test_folders_at_another_level_are_refused_and_the_right_one_named(folders, message, tmp_path):
    fill(tmp_path, *folders, count=30)
    if message is None:
        open_splits(Data(root=tmp_path))
        return
    with pytest.raises(InputError, match=message) as error:
        open_splits(Data(root=tmp_path))
    assert "\n" not in str(error.value)


def test_folders_of_the_same_names_in_every_class_are_said(tmp_path):
    root = fill(tmp_path, "cat/2019", "cat/2020", "dog/2019", "dog/2020", count=20)
    assert "every class folder holds folders of the same names (2019, 2020)" in " ".join(
        open_splits(Data(root=root)).notes
    )


def test_flat_splits_are_not_two_classes(tmp_path):
    with pytest.raises(InputError, match="train: no class folders in it"):
        open_splits(Data(root=fill(tmp_path, "train", "val", count=30)))


# --- groups -----------------------------------------------------------------------------------------------------------


def test_copies_have_the_key_of_their_original():
    names = ["IMG_1_jpg.rf.0a1b.jpg", "IMG_1_jpg.rf.ffff.jpg", "IMG_1.jpg", "cat_aug_1.png", "more/cat-aug2.png",
             "cat.jpg", "x_augmented.png", "img_august_01.jpg", "_aug_1.png", "plain.png"]  # fmt: skip
    assert group_keys(names, None) == ["IMG_1", "IMG_1", "IMG_1", "cat", "cat", "cat", "x", "img_august_01.jpg",
                                       "_aug_1.png", "plain.png"]  # fmt: skip


def test_images_of_one_file_name_in_folders_of_their_own_stand_alone(tmp_path):
    names = [f"{number:04}/image.png" for number in range(60)]
    assert group_keys(names, None) == names
    splits = open_splits(Data(root=fill(tmp_path, *(f"{c}/{n:04}" for c in "ab" for n in range(60)), count=1)))
    assert len(splits.val) > 0
    assert not any("groups" in note for note in splits.notes)


def test_copies_find_their_original_in_its_folder():
    names = [
        "1/image.png",
        "1/image_aug_1.png",
        "2/image.png",
        "2/image_aug_1.png",
        "3/image.png",  # in its own
        "raw/a.png",
        "aug/a_aug.png",
        "more/a_jpg.rf.0.jpg",
        "b.png",
        "aug/b_aug_2.png",  # in another
        "x/c.png",
        "y/c.png",
        "aug/c_aug.png",
        "x/c_aug.png",
        "x/d_aug.png",
        "y/d_aug.png",
    ]  # who knows
    assert group_keys(names, None) == ["1/image", "1/image", "2/image", "2/image", "3/image.png", "raw/a", "raw/a",
                                       "raw/a", "b", "b", "c", "c", "c", "c", "d", "d"]  # fmt: skip


def test_a_pattern_tells_the_groups():
    names = ["film1/frame_01.png", "film1/frame_02.png", "film2_003.png", "other.png"]
    assert group_keys(names, r"^(film\d+)") == ["film1", "film1", "film2", "other.png"]
    with pytest.raises(InputError, match="not a regular expression"):
        group_keys(names, "(")
    with pytest.raises(InputError, match="has no group"):
        group_keys(names, "film")


def test_no_group_is_on_both_sides(tmp_path):
    fill(tmp_path, "ripe", count=0)
    for name in ("ripe", "unripe"):
        for original in range(40):
            for version in range(3):
                image(tmp_path / name / f"IMG_{original}_jpg.rf.{7 * version + original:x}.jpg")
            image(tmp_path / name / f"film{original % 20}-{original}.png")
    splits = open_splits(Data(root=tmp_path, group=None))
    sides = [{path.name.partition(".rf.")[0] for path, _ in part.samples} for part in (splits.train, splits.val)]
    assert not sides[0] & sides[1]
    assert len(splits.val) > 0
    assert "320 images are in" in splits.notes[0]
    by_film = [open_dataset(tmp_path, side, r"^(film\d+)-") for side in ("train", "val")]
    films = [{path.name.partition("-")[0] for path, _ in part.samples if "-" in path.name} for part in by_film]
    assert not films[0] & films[1]
    assert films[1]


def test_copies_across_given_splits_are_said(tmp_path):
    for split, version in (("train", 1), ("train", 2), ("val", 3)):
        for name in ("cat", "dog"):
            image(tmp_path / split / name / f"a_jpg.rf.{version}.jpg")
            image(tmp_path / split / name / "0.jpg")
    assert "2 validation images are copies of training images, by their names" in open_splits(Data(root=tmp_path)).notes


@pytest.mark.parametrize("packed", [False, True])
def test_duplicates_by_content_are_counted(packed, tmp_path):
    root = fill(tmp_path / "data", "train/a", "train/b", "val/a", "val/b", count=5)
    assert duplicates_note(open_splits(Data(root=root))) is None
    for name in ("a", "b"):
        (root / "val" / name / "3.png").write_bytes((root / "train" / "a" / "1.png").read_bytes())
    data = Data(root=archive(root, tmp_path / "x.tar") if packed else root)
    assert duplicates_note(open_splits(data)) == "2 of 10 validation images are in training too, byte for byte"


# --- what is printed --------------------------------------------------------------------------------------------------


def test_what_was_found_is_a_table_with_notes(littered, tmp_path):
    fill(littered, "cat", count=40, name="x{}.png")
    with (tmp_path / "out.txt").open("w") as file:
        print_splits(open_splits(Data(root=littered)), Console(file=file, width=120))
    said = (tmp_path / "out.txt").read_text()
    splits = open_splits(Data(root=littered))
    assert f"cat       │ {splits.train.class_counts[0]:>8} │ {splits.val.class_counts[0]:>10}" in said
    assert "files skipped: 2 .txt" in said
    many = fill(tmp_path / "many", *(f"train/{k:02}" for k in range(40)), *(f"val/{k:02}" for k in range(40)), count=1)
    with (tmp_path / "out.txt").open("w") as file:
        print_splits(open_splits(Data(root=many)), Console(file=file, width=120))
    assert "and 10 classes with more" in (tmp_path / "out.txt").read_text()


# --- for verification -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 8, 9, 26, 511, 512, 513, 1024, 1025])
@pytest.mark.parametrize("limit", [1, 7, 8, 512])
def test_as_many_images_as_allowed_are_spread_evenly(n, limit):
    chosen = spread(range(n), limit)
    assert len(chosen) == len(set(chosen)) == min(n, limit)
    assert chosen[0] == 0
    distances = np.diff([*chosen, n])
    assert distances.max() - distances.min() <= 1


def test_images_to_verify_with_are_the_validation_part_and_labels_go_by_name(tmp_path, capsys):
    fill(tmp_path, "train/cat", "train/dog", "val/cat", "val/dog", "val/owl", ".x/cat", count=3)
    with pytest.raises(InputError, match="classes that the model does not know: owl"):
        sample_images(tmp_path, 2, classes=("dog", "cat"))
    found = sample_images(tmp_path, 3, classes=("owl", "dog", "cat"))
    assert Counter((each.path.parent.name, each.label) for each in found) == {
        ("cat", 2): 3, ("dog", 1): 3, ("owl", 0): 3}  # fmt: skip
    assert {each.path.parent.parent.name for each in found} == {"val"}
    assert "of its splits, val/ is taken" in capsys.readouterr().out
    assert {each.path.parent.parent.name for each in sample_images(tmp_path, part="train")} == {"train"}
    assert [each.label for each in sample_images(tmp_path / "train", 2)] == [0, 0, 0, 1, 1, 1]
    assert {each.label for each in sample_images(tmp_path / "train", 3)} == {-1}


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_accents_written_in_two_ways_are_one_name(packed, tmp_path):
    def splits_of(form: str) -> Splits:
        names = [unicodedata.normalize(form, name) for name in ("é", "f", "ü")]
        root = fill(tmp_path / form, *names, count=40, name=names[0] + "{}.png")
        return open_splits(Data(root=archive(root, tmp_path / f"{form}.tar") if packed else root))

    composed, apart = splits_of("NFC"), splits_of("NFD")
    assert apart.train.classes != composed.train.classes == ["f", "é", "ü"]
    assert apart.identity() == composed.identity()
    assert [target for _, target in apart.val.samples] == [target for _, target in composed.val.samples]
    assert apart.val[0][0].size == (8, 8)


def test_classes_are_matched_between_splits_however_their_accents_are_written(tmp_path):
    fill(tmp_path, "train/bar", "train/café", "val/bar", unicodedata.normalize("NFD", "val/café"))
    assert open_splits(Data(root=tmp_path)).val.class_counts == [2, 2]


@pytest.mark.parametrize("place", ["", "train/", "val/"])
def test_two_folders_of_one_name_are_refused(place, tmp_path):
    fill(tmp_path, *(f"{split}{name}" for split in {place, "train/", "val/"} - {""} for name in ("bar", "café")))
    fill(tmp_path, *(f"{place}{name}" for name in ("bar", "café", unicodedata.normalize("NFD", "café"))))
    for part in ("train", "val"):
        if not place:
            shutil.rmtree(tmp_path / part)
    with pytest.raises(InputError, match=r"the folders 'cafe\\u0301' and 'caf\\xe9' have one name"):
        open_splits(Data(root=tmp_path))


@pytest.mark.parametrize("name", ["Cat", "cat "])
def test_classes_that_differ_in_case_or_blanks_are_both_named(name, tmp_path):
    fill(tmp_path, "train/cat", "train/dog", f"val/{name}", "val/dog")
    with pytest.raises(InputError, match=f"'{name}' and 'cat' differ only in letter case or blanks"):
        open_splits(Data(root=tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
@pytest.mark.parametrize("packed", [False, True])
def test_file_names_need_not_be_utf_8(packed, tmp_path):
    root = fill(tmp_path / "all", "a", "b", count=40)
    for name in ("a", "b"):
        image(root / name / os.fsdecode(b"\xff\xe9.png"))
    splits = open_splits(Data(root=archive(root, tmp_path / "all.tar") if packed else root))
    assert sum(part["count"] for part in splits.identity().values()) == 82


def test_identity_is_of_the_names_wherever_they_are(tmp_path):
    root = fill(tmp_path / "train", "a", "b")
    first = identity(open_eval_dataset(root))
    assert first["count"] == 4
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    assert identity(open_eval_dataset(moved)) == first
    assert identity(open_eval_dataset(archive(moved, tmp_path / "x.tar"))) == first
    (moved / "a" / "0.png").rename(moved / "a" / "7.png")
    assert identity(open_eval_dataset(moved)) != first
    os.replace(moved / "a" / "7.png", moved / "b" / "7.png")  # noqa: PTH105
    assert identity(open_eval_dataset(moved))["count"] == 4
