"""Small files that stand for a lot: lists within lists, names of many folders, links to links, tags of YAML."""

import io
import tarfile

import pytest

from shvit.documents import load_yaml
from shvit.errors import InputError
from shvit.export.backends.registry import refuse_changed
from shvit.files import atomic_write
from shvit.train.data.image_folders import list_images
from shvit.train.data.shards import Shards, class_index
from shvit.train.data.streams import check_named
from shvit.train.recipe import Data
from shvit.train.run.metrics import check_log
from shvit.train.run.run_folder import _check_expansion

from .conftest import png


def write_tar(path, names, content=b"x", mode="w"):
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


VALUES = ["!!bool foo", "!!int ''", "!!int '-'", "!!float ''", "!!timestamp abc", "!!omap [1]", "!!binary [1]"]


@pytest.mark.parametrize("value", VALUES)
def test_tagged_value_of_the_wrong_form_is_one_line(value, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"recipe: {value}\n")
    with pytest.raises(InputError, match="not readable as YAML"):
        load_yaml(path)


def test_yaml_of_many_small_values_is_refused_before_it_is_built(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("- \n" * 1_000_000)
    with pytest.raises(InputError, match="more than 200,000 values"):
        load_yaml(path)


def test_state_whose_lists_double_is_refused():
    doubled, cycle, shared = [], [], [1, 2]
    for _ in range(60):
        doubled = [doubled, doubled]
    cycle.append(cycle)
    for state in ({"log": doubled}, {"optimizer": {"state": doubled}}, {"log": cycle}):
        with pytest.raises(ValueError, match=r"it holds|without bound"):
            _check_expansion(state)
    _check_expansion({"a": shared, "b": shared, "c": [shared, "text", None]})


def test_name_of_many_folders_is_refused(tmp_path):
    name = "a/" * 20_000 + "b"
    write_tar(tmp_path / "images.tar", [f"{name}.jpg"])
    with pytest.raises(InputError, match="20000 folders"):
        list_images(tmp_path / "images.tar")
    write_tar(tmp_path / "shard.tar", [name])
    (lost,) = Shards(tmp_path, "shard.tar")
    assert "20000 folders" in lost.message


def test_links_that_double_end(tmp_path):
    for number in range(31):
        (tmp_path / f"{number}").mkdir()
        for name in "ab" if number < 30 else "":
            (tmp_path / f"{number}" / name).symlink_to(tmp_path / f"{number + 1}")
    with pytest.raises(InputError, match="links lead to"):
        list_images(tmp_path / "0")


def test_folder_that_several_classes_link_to_is_read(tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "x.png").write_bytes(png(9))
    for number in range(20):
        (tmp_path / f"class-{number}").symlink_to("original")
    assert len(list_images(tmp_path).names) == 21


def test_other_files_of_a_sample_are_not_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("shvit.train.data.shards.MAX_MEMBER", 100)
    monkeypatch.setattr("shvit.train.data.tars.MAX_MEMBER", 100)
    write_tar(tmp_path / "a.tar", ["s.npy", "s.jpg", "s.cls", "s.mp4"], b"1" * 50)
    assert [each.name for each in Shards(tmp_path, "a.tar") if hasattr(each, "name")] == []  # a class of 50 digits
    write_tar(tmp_path / "b.tar", ["s.jpg", "s.png", "s.cls"], b"1" * 50)
    (lost,) = Shards(tmp_path, "b.tar")
    assert "150 bytes" in lost.message


def test_class_index_is_a_small_whole_number():
    assert [class_index(each) for each in (3, "3", b" 3\n", 3.0, -1)] == [3, 3, 3, 3, -1]
    for wrong in (1.5, "1.5", 10**30, b"9" * 30, None, [1], float("inf"), float("nan")):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            class_index(wrong)


@pytest.mark.parametrize("name", ["hfds/pandas", "hfids/Pandas", "hfds/generator"])
def test_builder_of_datasets_is_no_dataset(name):
    with pytest.raises(InputError, match="not a dataset"):
        check_named(Data(name=name), "train")
    check_named(Data(name="hfds/beans"), "train")


def test_folder_that_is_no_artifact_is_not_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr("shvit.export.backends.registry.sha256", None)
    with pytest.raises(InputError, match="unknown artifact"):
        refuse_changed(tmp_path)


def test_file_with_a_long_name_is_written(tmp_path):
    path = tmp_path / ("é" * 120 + ".json")
    for _ in range(2):
        with atomic_write(path) as partial:
            partial.write_text("{}")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_log_with_numbers_beyond_float32_is_refused():
    names = ("lr", "train_loss", "grad_norm", "val_loss", "ema_loss", "top1", "ema_top1")
    entry = {"epoch": 1, **dict.fromkeys(names, 1.0)}
    assert check_log([{**entry, "train_loss": 3e38, "grad_norm": None}], "x")
    with pytest.raises(InputError, match="train_loss"):
        check_log([{**entry, "train_loss": 1.7e308}], "x")
