"""`shvit predict` against PyTorch's softmax on timm's transform, its files as other programs read them."""

import csv
import json
import os
import shutil
import socket
import tarfile
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from shvit.cli import run
from shvit.errors import InputError
from tests.conftest import LABELS

from .conftest import draw


def predict(*words: object) -> dict:
    return run(["predict", *map(str, words)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def predicted(weights, photos, tmp_path_factory) -> Path:
    """The folder's predictions as JSON Lines."""
    output = tmp_path_factory.mktemp("predicted") / "p.jsonl"
    result = predict(photos, "--checkpoint", weights, "--output", output, "--batch-size", 4)
    assert (result["images"], result["damaged"], result["output"]) == (11, 0, str(output))
    assert result["images_per_second"] > 0
    return output


def test_probabilities_are_those_of_pytorch_on_timms_transform(predicted, probabilities):
    records = lines(predicted)
    assert [record["path"] for record in records] == list(probabilities)
    assert len({record["labels"][0] for record in records}) > 1  # else any order would do
    for record in records:
        expected = probabilities[record["path"]].sort(descending=True)
        assert record["labels"] == [LABELS[index] for index in expected.indices]
        np.testing.assert_allclose(record["probabilities"], expected.values, rtol=1e-4)


def test_csv_and_parquet_say_the_same(weights, photos, tmp_path, predicted):
    records = lines(predicted)
    predict(photos, "--checkpoint", weights, "--output", tmp_path / "p.csv", "--batch-size", 4, "--top", 2)
    predict(photos, "--checkpoint", weights, "--output", tmp_path / "p.parquet", "--batch-size", 4)
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    table = pandas.read_parquet(tmp_path / "p.parquet")
    assert list(rows[0]) == ["path", "label_1", "probability_1", "label_2", "probability_2", "error"]
    assert list(table) == ["path", "labels", "probabilities", "error"]
    for record, row, (_, entry) in zip(records, rows, table.iterrows(), strict=True):
        assert (row["path"], entry.path) == (record["path"],) * 2
        assert [row["label_1"], row["label_2"]] == record["labels"][:2] == list(entry.labels)[:2]
        assert [float(row["probability_1"]), float(row["probability_2"])] == record["probabilities"][:2]
        assert entry.probabilities.astype("f4").tolist() == np.float32(record["probabilities"]).tolist()
        assert row["error"] == ""
        assert pandas.isna(entry.error)
    assert {path.name for path in tmp_path.iterdir()} == {"p.csv", "p.parquet"}


def test_workers_change_nothing(weights, photos, tmp_path, predicted):
    predict(photos, "--checkpoint", weights, "--output", tmp_path / "p.jsonl", "--batch-size", 4, "--workers", 2)
    assert (tmp_path / "p.jsonl").read_bytes() == predicted.read_bytes()


def test_a_few_images_are_a_table(weights, photos, capsys, probabilities):
    path = photos / "a" / "00.png"
    result = predict(path, "--checkpoint", weights, "--top", 2)
    best = probabilities[str(path)].sort(descending=True)
    assert result["predictions"][0]["labels"] == [LABELS[index] for index in best.indices[:2]]
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert f"{100 * best.values[0]:.1f} │" in printed


def test_a_run_folder_gives_its_best_weights(weights, photos, tmp_path, predicted):
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    shutil.copy(weights, run_folder / "best.safetensors")
    output = run_folder / "p.jsonl"
    predict(photos, "--checkpoint", run_folder, "--output", output, "--batch-size", 4)
    assert output.read_bytes() == predicted.read_bytes()


# --- features ---------------------------------------------------------------------------------------------------------


def test_pooled_features_are_what_the_classifier_is_given(weights, photos, tmp_path, model, transform):
    predict(photos, "--checkpoint", weights, "--features", "pooled", "--output", tmp_path / "f.npy")
    predict(photos, "--checkpoint", weights, "--features", "pooled", "--output", tmp_path / "f.parquet")
    embeddings, paths = np.load(tmp_path / "f.npy"), [each["path"] for each in lines(tmp_path / "f.jsonl")]
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(batch), pre_logits=True)
    assert embeddings.shape == (11, model.num_features)
    np.testing.assert_allclose(embeddings, expected, atol=1e-4 * expected.abs().max())
    table = pandas.read_parquet(tmp_path / "f.parquet")
    assert table.path.tolist() == paths
    assert np.array_equal(np.stack(table.embedding), embeddings)


def test_maps_are_those_that_timms_model_gives(weights, photos, tmp_path, model, transform):
    predict(photos / "a", "--checkpoint", weights, "--features", "maps", "--output", tmp_path / "f.npy")
    predict(photos / "a", "--checkpoint", weights, "--features", "maps", "--output", tmp_path / "f.parquet")
    maps, table = np.load(tmp_path / "f.npy", mmap_mode="r"), pyarrow.parquet.read_table(tmp_path / "f.parquet")
    batch = torch.stack([transform(Image.open(each["path"]).convert("RGB")) for each in lines(tmp_path / "f.jsonl")])
    with torch.inference_mode():
        expected = model.forward_intermediates(batch, intermediates_only=True)
    assert maps.dtype.names == ("stride_16", "stride_32", "stride_64")
    for name, output in zip(maps.dtype.names, expected, strict=True):
        np.testing.assert_allclose(maps[name], output, atol=1e-4 * output.abs().max())
        shape = json.loads(table.schema.field(name).metadata[b"shape"])
        assert np.array_equal(np.stack(table[name].to_pylist()).reshape(-1, *shape), maps[name])


def test_maps_of_one_stride_have_names_of_their_own(photos, tmp_path):
    """Of a vision transformer, timm's for tests."""
    vit = timm.create_model("test_vit").eval()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    options = ("--model", "test_vit", "--checkpoint", tmp_path / "vit.safetensors", "--features", "maps")
    predict(photos / "a" / "00.png", *options, "--output", tmp_path / "f.npy")
    maps = np.load(tmp_path / "f.npy")
    batch = create_transform(**resolve_data_config(model=vit))(Image.open(photos / "a" / "00.png").convert("RGB"))[None]
    with torch.inference_mode():
        expected = vit.forward_intermediates(batch, intermediates_only=True)
    assert len(expected) == len(maps.dtype.names) > 1
    for name, output in zip(maps.dtype.names, expected, strict=True):
        np.testing.assert_allclose(maps[name], output, atol=1e-4 * output.abs().max())


# --- exported files ---------------------------------------------------------------------------------------------------


def test_an_exported_file_predicts_as_its_checkpoint_does(weights, photos, tmp_path, predicted):
    """One for a batch of 1 alone, that gives probabilities."""
    artifact = tmp_path / "tiny.onnx"
    run(["export", "onnx", "--checkpoint", str(weights), "--softmax", "--output", str(artifact)])
    predict(photos, "--artifact", artifact, "--output", tmp_path / "p.jsonl", "--batch-size", 4)
    for record, expected in zip(lines(tmp_path / "p.jsonl"), lines(predicted), strict=True):
        assert record["labels"] == expected["labels"]
        np.testing.assert_allclose(record["probabilities"], expected["probabilities"], rtol=1e-3)
    with pytest.raises(InputError, match="gives probabilities; for features give its --checkpoint"):
        predict(photos, "--artifact", artifact, "--features", "maps", "--output", tmp_path / "f.npy")


def test_a_file_that_takes_pixels_knows_its_classes(mine, photos):
    (record,) = predict(photos / "a" / "00.png", "--artifact", mine)["predictions"]
    assert sorted(record["labels"]) == sorted(LABELS)
    assert sum(record["probabilities"]) == pytest.approx(1, abs=1e-5)


def test_an_exported_file_of_feature_maps(weights, photos, tmp_path):
    artifact = tmp_path / "tiny.onnx"
    run(["export", "onnx", "--checkpoint", str(weights), "--features", "--output", str(artifact)])
    with pytest.raises(InputError, match="gives feature maps; add --features maps"):
        predict(photos, "--artifact", artifact, "--output", tmp_path / "p.jsonl")
    for options, output in ((("--artifact", artifact), "a.npy"), (("--checkpoint", weights), "c.npy")):
        predict(photos / "a", *options, "--features", "maps", "--output", tmp_path / output)
    one, other = np.load(tmp_path / "a.npy"), np.load(tmp_path / "c.npy")
    np.testing.assert_allclose(one["stride_64"], other["stride_64"], atol=1e-3 * np.abs(other["stride_64"]).max())


# --- images that cannot be read, and their names ----------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path) -> Path:
    folder = tmp_path / "images"
    draw(folder / "0.png", 0)
    (folder / "1.jpg").write_bytes(b"no image")
    draw(folder / "2.png", 2)
    return folder


def test_damaged_images_are_named_and_counted(weights, damaged, tmp_path, capsys):
    for suffix in ("jsonl", "csv", "parquet"):
        result = predict(damaged, "--checkpoint", weights, "--output", tmp_path / f"p.{suffix}")
        assert (result["images"], result["damaged"]) == (3, 1)
        assert f"{damaged / '1.jpg'}: not a readable image" in capsys.readouterr().err
    _, bad, last = lines(tmp_path / "p.jsonl")
    assert bad.keys() == {"path", "error"}
    assert bad["path"] == str(damaged / "1.jpg")
    assert bad["error"].startswith("not a readable image")
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["label_1"] for row in rows] == [lines(tmp_path / "p.jsonl")[0]["labels"][0], "", last["labels"][0]]
    assert rows[1]["error"] == bad["error"]
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert [row["labels"] is None for row in table] == [row["error"] is not None for row in table]
    assert table[1]["error"] == bad["error"]


def test_features_of_a_damaged_image_are_missing(weights, damaged, tmp_path):
    for suffix in ("npy", "parquet"):
        predict(damaged, "--checkpoint", weights, "--features", "pooled", "--output", tmp_path / f"f.{suffix}")
    assert np.isnan(np.load(tmp_path / "f.npy")).all(axis=1).tolist() == [False, True, False]
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pylist()
    assert [row["embedding"] is None for row in table] == [False, True, False]


def test_nothing_is_written_where_no_image_can_be_read(weights, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("1.jpg", "2.jpg"):
        (folder / name).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"none of the 2 images can be read; the first: .*1\.jpg: not a readable"):
        predict(folder, "--checkpoint", weights, "--output", tmp_path / "p.csv")
    assert [*tmp_path.iterdir()] == [folder]
    draw(folder / "1.png", 0)
    assert predict(folder, "--checkpoint", weights, "--output", tmp_path / "p.csv")["damaged"] == 2


HOSTILE = ("new\nline.png", "\x1b[2J\x1b]0;title\x07.png", 'quote",;.png', "=1+1.png", "\udcff\udcfe.png", "日本.png")


def test_hostile_file_names_are_right_everywhere(weights, tmp_path, capsys):
    folder = tmp_path / "names"
    for seed, name in enumerate(HOSTILE):
        draw(folder / "x.png", seed).rename(folder / name)
    expected = {os.fsencode(folder / name).decode(errors="backslashreplace") for name in HOSTILE}
    for suffix in ("jsonl", "csv", "parquet"):
        predict(folder, "--checkpoint", weights, "--output", tmp_path / f"p.{suffix}")
    assert {record["path"] for record in lines(tmp_path / "p.jsonl")} == expected
    with (tmp_path / "p.csv").open(newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == expected
    assert set(pyarrow.parquet.read_table(tmp_path / "p.parquet")["path"].to_pylist()) == expected
    capsys.readouterr()
    predict(folder, "--checkpoint", weights)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "new line.png" in printed


# --- the sheet --------------------------------------------------------------------------------------------------------


def test_a_contact_sheet_shows_each_image(weights, tmp_path):
    for name, color in (("r", (200, 0, 0)), ("g", (0, 200, 0)), ("b", (0, 0, 200))):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), color).save(tmp_path / "images" / f"{name}$.png")
    result = predict(tmp_path / "images", "--checkpoint", weights, "--draw", tmp_path / "sheet.png")
    assert result["draw"] == str(tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3)
    for color in ((200, 0, 0), (0, 200, 0), (0, 0, 200)):
        assert (pixels == color).all(axis=1).sum() > 5000


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "no input": ([], "which images"),
    "nothing": (["nowhere.jpg"], r"nowhere\.jpg: no such file or folder"),
    "pattern": (["*.none"], r"\*\.none: nothing matches"),
    "address": (["https://example.org/x.jpg"], "is an address or a command"),
    "empty folder": (["empty"], "empty: no images in it"),
    "no image": (["notes"], r"notes: no images in it \(files skipped: 1 \.txt\)"),
    "archive": (["x.tar.gz"], "is a compressed archive"),
    "broken tar": (["broken.tar"], r"broken\.tar: not a readable tar"),
    "broken video": (["broken.mp4"], r"broken\.mp4: not a readable video"),
    "top": (["a.png", "--top", "4"], "--top 4: the model has 3 classes; choose 1 to 3"),
    "no top": (["a.png", "--top", "0"], "--top 0 is out of range"),
    "every": (["a.png", "--every", "3"], "--every does not apply: no input is a video"),
    "batch": (["a.png", "--batch-size", "0"], "--batch-size 0 is out of range"),
    "many": (["many"], r"51 images are too many for a table; give --output"),
    "suffix": (["a.png", "--output", "p.txt"], r"written as \.jsonl, \.csv, \.parquet"),
    "array": (["a.png", "--output", "p.npy"], r"written as \.jsonl, \.csv, \.parquet"),
    "features": (["a.png", "--features", "pooled", "--output", "p.csv"], r"features are written as \.parquet, \.npy"),
    "features alone": (["a.png", "--features", "pooled"], "give --output"),
    "features and top": (["a.png", "--features", "maps", "--top", "1", "--output", "f.npy"], "features have no class"),
    "somebody's": (["a.png", "--output", "theirs.csv"], r"theirs\.csv: is there already, and is not what"),
    "sheet": (["a.png", "--draw", "sheet.jpg"], "ends with .png"),
    "sheet inside": (["many", "--output", "p.csv", "--draw", "many/sheet.png"], "--draw many/sheet.png: is inside"),
    "model alone": (["a.png", "--model", "tiny_vit"], "--pretrained"),
    "weights": (["a.png", "--checkpoint", "none.pth"], r"none\.pth: no such file"),
    "empty run": (["a.png", "--checkpoint", "empty"], r"empty: is a folder without best_ema\.safetensors"),
    "artifact": (["a.png", "--artifact", "none.onnx"], r"none\.onnx: no such file"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    draw(folder / "a.png", 0)
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "x.txt").write_text("no image")
    for name in ("x.tar.gz", "broken.tar", "broken.mp4"):
        (folder / name).write_bytes(b"broken" * 200)
    (folder / "theirs.csv").write_text("name,age\n")
    for index in range(51):
        draw(folder / "many" / f"{index}.png", 0, (2, 2))
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_input_is_one_line(case, place, weights, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    words, message = REFUSED[case]
    given = {"--checkpoint", "--artifact", "--model"} & {*words}
    with pytest.raises(InputError, match=message) as failed:
        predict(*words, *(() if given else ("--checkpoint", weights)))
    assert "\n" not in str(failed.value)
    assert sorted(place.rglob("*")) == before


def test_without_a_network_one_line_says_what_to_do(photos, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr("shvit.weights.download.PAUSE_S", 0.0)
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"cannot be fetched .* offline, give weights .* --checkpoint") as failed:
        predict(photos / "a" / "00.png")
    assert "\n" not in str(failed.value)


def test_tar_and_folder_are_predicted_alike(weights, photos, tmp_path, predicted):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, "photos")
    predict(tmp_path / "photos.tar", "--checkpoint", weights, "--output", tmp_path / "p.jsonl", "--batch-size", 4)
    found, expected = lines(tmp_path / "p.jsonl"), lines(predicted)
    assert [record["path"] for record in found] == [
        each["path"].replace(str(photos), f"{tmp_path / 'photos.tar'}/photos") for each in expected
    ]
    assert [record["probabilities"] for record in found] == [record["probabilities"] for record in expected]
