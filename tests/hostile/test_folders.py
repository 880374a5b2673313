"""Folders and tars of images that hold what is no image, and outputs that would destroy or become images."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from shvit.errors import InputError
from shvit.train.data.datasets import open_dataset
from shvit.train.data.eval_dataset import open_eval_dataset
from shvit.train.data.eval_loader import eval_loader
from shvit.train.data.splits import check_outside
from shvit.train.recipe import read_recipe
from shvit.train.recipes import DEMO
from shvit.train.run.run_folder import RunFolder

from .conftest import png

pytestmark = pytest.mark.usefixtures("no_programs")


# --- folders and tars -------------------------------------------------------------------------------------------------


def test_what_is_no_file_in_a_class_folder_is_left_out(folders):
    os.mkfifo(folders / "a" / "fifo.jpg")
    (folders / "a" / "loop.jpg").symlink_to("loop.jpg")
    (folders / "a" / "ping").symlink_to("pong")
    (folders / "a" / "pong").symlink_to("ping")
    (folders / "b" / "zero.jpg").symlink_to("/dev/zero")
    dataset = open_eval_dataset(folders)
    assert len(dataset) == 48
    assert len(list(eval_loader(dataset, lambda image: torch.zeros(1), 16))) == 3


def test_file_that_became_a_fifo_is_damaged(folders):
    dataset = open_eval_dataset(folders)
    path = dataset.samples[0][0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="is a FIFO"):
        dataset[0]


def test_order_of_classes_is_that_of_their_names_in_folders_and_tars(tmp_path):
    for name in ("1", "10", "2"):
        (tmp_path / "num" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "num" / name / f"{number}.png").write_bytes(png(number))
    with tarfile.open("num.tar", "w") as archive:
        for name in ("1", "2", "10"):
            archive.add(f"num/{name}", name)
    shutil.copytree("num", "mix/train")
    shutil.copy("num.tar", "mix/val.tar")
    assert open_eval_dataset(Path("num")).classes == open_eval_dataset(Path("num.tar")).classes == ["1", "10", "2"]
    mixed = [open_dataset(Path("mix"), split) for split in ("train", "val")]
    assert [each.classes for each in mixed] == [["1", "10", "2"]] * 2
    assert [target for _, target in mixed[0].samples] == [target for _, target in mixed[1].samples]


@pytest.mark.parametrize("path", ["a" * 300, "x\0y", "fifo", "/dev/zero", "loop"])
def test_data_that_cannot_be_are_one_line(path):
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    for read in (
        lambda: open_dataset(Path(path), "train"),
        lambda: open_eval_dataset(path),
        lambda: read_recipe(Path(path)),
    ):
        with pytest.raises(InputError):
            read()


def test_expression_that_never_ends_is_stopped(folders, monkeypatch):
    monkeypatch.setattr("shvit.train.data.groups.MATCHING_S", 0.2)
    (folders / "a" / ("a" * 60 + "!.jpg")).write_bytes(png(3))
    with pytest.raises(InputError, match="takes too long"):
        open_dataset(folders, "train", r"^((a+)+)+\.jpg")
    assert len(open_dataset(folders, "train", r"^(.+)\.jpg")) > 0


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "refused"),
    [
        ("d/run", True), ("d", True), ("d/a", True), ("d/a/run", True), ("link/run", True), ("linked", True),
        ("other/../d/run", True), (".", False), ("run", False), ("other", False), ("d2", False),
    ],
)  # fmt: skip
def test_output_does_not_become_a_class(output, refused, folders, tmp_path):
    (tmp_path / "other").mkdir()
    Path("link").symlink_to(folders)
    Path("linked").symlink_to(folders / "b")
    if not refused:
        check_outside(Path(output), folders)
        return
    with pytest.raises(InputError, match="choose another"):
        check_outside(Path(output), folders)


def test_class_that_is_called_as_a_split_does_not_open_the_folder(tmp_path):
    for name in ("train", "bus"):
        (tmp_path / "v" / name).mkdir(parents=True)
        (tmp_path / "v" / name / "x.png").write_bytes(png(3))
    with pytest.raises(InputError, match="choose another"):
        check_outside(tmp_path / "v" / "run", tmp_path / "v")


def test_class_folder_that_is_a_link_is_not_written_to(folders, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folders / "c").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="choose another"):
        check_outside(tmp_path / "elsewhere" / "run", folders)


def foreign(folder: Path, what: str) -> None:
    folder.mkdir()
    if what == "images":
        (folder / "holiday.JPG").write_bytes(b"mine")
    elif what == "tensorboard":
        (folder / what).write_bytes(b"mine")
    elif what == "a folder last.pt":
        (folder / "last.pt").mkdir()
    elif what.startswith("a link "):
        (folder.parent / "mine").write_bytes(b"mine")
        (folder / what.removeprefix("a link ")).symlink_to(folder.parent / "mine")
    elif what.startswith("a FIFO "):
        os.mkfifo(folder / what.removeprefix("a FIFO "))
    else:
        (folder / what).write_bytes(b"mine")


@pytest.mark.parametrize(
    "what",
    ["images", "tensorboard", "curves.png", "best.safetensors", "best_ema.safetensors", "metrics.jsonl", "last.pt",
     "recipe.yaml", "a link last.pt", "a link curves.png", "a link .lock", "a link recipe.yaml", "a FIFO last.pt",
     "a FIFO .lock", "a FIFO recipe.yaml", "a FIFO metrics.jsonl", "a folder last.pt"],
)  # fmt: skip
def test_folder_that_is_no_runs_is_left_as_it_is(what, tmp_path):
    foreign(tmp_path / "run", what)
    before = {path: path.lstat().st_mode for path in tmp_path.rglob("*")}
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError), folder.locked():
        folder.claim(DEMO, ["a", "b"])
    after = {path: path.lstat().st_mode for path in tmp_path.rglob("*") if path.name != ".lock" or path in before}
    assert after == before
    assert all(path.read_bytes() == b"mine" for path in after if path.is_file())


def test_folder_with_notes_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm-12.out").write_text("started")
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        with folder.locked():
            folder.claim(DEMO, ["a", "b"])
