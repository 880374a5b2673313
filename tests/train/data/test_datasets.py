"""Which images are trained on, which are kept for validation, and unusable ones."""

import hashlib
import tarfile
from itertools import groupby

import numpy as np
import pytest
import timm
from PIL import Image

from shvit.errors import InputError
from shvit.train.data import images
from shvit.train.data.datasets import elpv, open_dataset, open_splits
from shvit.train.data.eval_dataset import TrainedOn, open_eval_dataset
from shvit.train.data.eval_loader import eval_loader
from shvit.train.data.images import open_image
from shvit.train.recipe import Data


def image(path, seed=0, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def flat(tmp_path):
    """Two class folders of 60 images each."""
    for name in ("cat", "dog"):
        for index in range(60):
            image(tmp_path / name / f"{name}{index}.png", index)
    return tmp_path


def test_validation_images_are_about_a_tenth_and_never_trained_on(flat):
    training, validation = ({path for path, _ in open_dataset(flat, split).samples} for split in ("train", "val"))
    assert not training & validation
    assert len(training | validation) == 120
    assert 4 <= len(validation) <= 24


def test_split_depends_on_the_file_name_alone(flat, tmp_path_factory):
    before = {path.name for path, _ in open_dataset(flat, "val").samples}
    moved = tmp_path_factory.mktemp("elsewhere") / "images"
    flat.rename(moved)
    image(moved / "cat" / "another.png")
    after = {path.name for path, _ in open_dataset(moved, "val").samples}
    assert after - {"another.png"} == before
    assert before == {
        f"{name}{index}.png"
        for name in ("cat", "dog")
        for index in range(60)
        if int(hashlib.sha256(f"{name}{index}.png".encode()).hexdigest()[:2], 16) <= 25
    }


@pytest.mark.parametrize("name", ["val", "validation"])
def test_train_and_val_folders_are_taken_as_they_are(tmp_path, name):
    for split, count in (("train", 3), (name, 2)):
        for kind in ("a", "b"):
            for index in range(count):
                image(tmp_path / split / kind / f"{index}.jpg")
    assert len(open_dataset(tmp_path, "train")) == 6
    assert len(open_dataset(tmp_path, "val")) == 4
    assert len(open_eval_dataset(tmp_path)) == 4
    assert open_dataset(tmp_path, "val").classes == ["a", "b"]
    assert len(open_eval_dataset(tmp_path / "train")) == 6


def test_elpv_holds_out_whole_modules_of_both_types():
    training, validation = elpv("train"), elpv("val")
    assert (len(training), len(validation)) == (2252, 372)
    assert not set(training.samples) & set(validation.samples)
    cells = sorted(training.samples + validation.samples)
    assert len(cells) == 2624
    outside = set(validation.samples)
    blocks = [len(list(block)) for inside, block in groupby(cells, key=lambda cell: cell in outside) if inside]
    assert sorted(blocks) == [60, 60, 60, 60, 60, 72]
    assert [sum(target == kind for _, target in validation.samples) for kind in (0, 1)] == [132, 240]


def test_eval_loader_gives_every_image_once_in_order(flat):
    dataset = open_dataset(flat, "train")
    transform = timm.data.create_transform((3, 32, 32))
    batches = list(eval_loader(dataset, transform, batch_size=7))
    assert sum(len(targets) for _, targets in batches) == len(dataset)
    assert [int(t) for _, targets in batches for t in targets] == [target for _, target in dataset.samples]
    assert batches[0][0].shape == (7, 3, 32, 32)


def test_damaged_image_is_named(flat):
    path = flat / "cat" / "cat3.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"cat3\.png: not a readable image"):
        open_image(path)
    (flat / "cat" / "cat4.png").write_text("no image")
    with pytest.raises(InputError, match=r"cat4\.png"):
        open_image(flat / "cat" / "cat4.png")


def test_enormous_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    image(tmp_path / "big.png", size=(300, 200))
    monkeypatch.setattr(images, "MAX_PIXELS", 50_000)
    with pytest.raises(InputError, match=r"big\.png: 300×200 pixels"):
        open_image(tmp_path / "big.png")


def test_every_mode_of_file_becomes_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "I;16", "LA"):
        Image.new(mode, (8, 8)).save(tmp_path / "x.png")
        assert open_image(tmp_path / "x.png").mode == "RGB"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "no class folders"),
        (["train/a/1.png"], "neither val/ nor validation/"),
        (["val/a/1.png"], "no train/"),
        (["train/a/1.png", "train/c/1.png", "val/a/1.png", "val/b/1.png"], "in only one of train/ and val/: b"),
        (["a/1.png", "a/2.png"], "only one class, a"),
        (["a/1.png", "b/notes.txt"], "b: an empty class"),
        (["a/1.png", "b/2.png"], "too few to keep some for validation"),
    ],
)
def test_unusable_folders_are_one_clear_line(tmp_path, paths, message):
    for name in paths:
        if name.endswith(".txt"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text("")
        else:
            image(tmp_path / name)
    with pytest.raises(InputError) as error:
        open_dataset(tmp_path, "val")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        open_dataset(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("name", ["folder", "tar"])
def test_a_run_is_evaluated_on_what_it_kept_for_validation(flat, name, tmp_path_factory):
    root = flat
    if name == "tar":
        root = tmp_path_factory.mktemp("tars") / "all.tar"
        with tarfile.open(root, "w") as archive:
            archive.add(flat, "")
    splits = open_splits(Data(root=root))
    run = TrainedOn(splits.identity(), None, root)
    kept = open_eval_dataset(root, trained_on=run)
    assert (kept.samples, kept.part) == (splits.val.samples, "the part that this run kept for validation")
    assert len(open_eval_dataset(root)) == 120
    moved = TrainedOn(splits.identity(), None, tmp_path_factory.mktemp("nothing"))
    assert open_eval_dataset(root, trained_on=moved).samples == splits.val.samples
    told = TrainedOn.from_weights({**splits.identity(), "group": None})  # a checkpoint that left its run folder
    assert open_eval_dataset(root, trained_on=told).samples == splits.val.samples
    assert TrainedOn.from_weights({"count": 3}) is TrainedOn.from_weights(None) is None
    others = TrainedOn({"train": {"count": 1}, "val": {"count": 1}}, None, moved.root)
    unknown = open_eval_dataset(root, trained_on=others)
    assert len(unknown) == 120
    assert unknown.part == "all images; which of them this run was trained on, if any, is not known"
    grown = TrainedOn(others.images, None, root)  # images were added since
    assert len(open_eval_dataset(root, trained_on=grown)) == len(splits.val)


def test_a_run_that_was_split_otherwise_is_not_said_to_have_kept_what_it_trained_on(flat):
    images = open_splits(Data(root=flat)).identity()
    images["val"]["names_sha256"] = "of other names"
    everything = open_eval_dataset(flat, trained_on=TrainedOn(images, None, flat))
    assert len(everything) == 120
    assert "most of which this run was trained on" in everything.part


def test_evaluating_on_training_images_is_said(tmp_path):
    for split in ("train", "val"):
        for kind in ("a", "b"):
            image(tmp_path / split / kind / f"{split}.png")
    run = TrainedOn(open_splits(Data(root=tmp_path)).identity(), None, tmp_path)
    assert open_eval_dataset(tmp_path / "train", trained_on=run).part == "images that this run was trained on"
    assert open_eval_dataset(tmp_path, trained_on=run).part == "its val"
    assert open_eval_dataset(tmp_path / "val", trained_on=run).part == "all images"
