"""`shvit.export.Predictor` against PyTorch's softmax on timm's transform, in the engines that call it."""

import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from datasets.fingerprint import Hasher
from PIL import Image

from shvit.errors import InputError
from shvit.export import Predictor
from shvit.export.predict import predictor as module
from tests.conftest import LABELS

from .conftest import draw


@pytest.fixture
def paths(probabilities) -> list[str]:
    """Three images, of more than one class."""
    first = {int(each.argmax()): path for path, each in probabilities.items()}
    assert len(first) > 1
    return [*first.values(), *probabilities][:3]


@pytest.fixture
def expected(paths, probabilities) -> list[list[str]]:
    """The classes of each image, the most probable first."""
    return [[LABELS[index] for index in probabilities[path].argsort(descending=True)] for path in paths]


FORMS = {
    "bytes": lambda path: Path(path).read_bytes(),
    "of datasets": lambda path: {"bytes": Path(path).read_bytes(), "path": "elsewhere.png"},
    "of datasets, by path": lambda path: {"bytes": None, "path": path},
    "Pillow": Image.open,
    "array": lambda path: np.asarray(Image.open(path)),
    "path": Path,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_is_predicted_alike(form, weights, paths, probabilities, expected):
    batch = {"image": [FORMS[form](path) for path in paths], "id": np.arange(3)}
    result = Predictor(checkpoint=weights)(batch)
    assert list(result) == ["id", "labels", "probabilities", "error"]
    assert result["labels"] == expected
    for path, likely in zip(paths, result["probabilities"], strict=True):
        np.testing.assert_allclose(likely, probabilities[path].sort(descending=True).values, rtol=1e-4)
    assert result["error"] == [None] * 3


@pytest.mark.parametrize("column", ["image", "bytes", "content", "path"])
def test_columns_have_the_names_that_engines_give_them(column, weights, paths, expected):
    values = paths if column == "path" else [Path(path).read_bytes() for path in paths]
    frame = pandas.DataFrame({column: values, "id": [7, 8, 9]}, index=[3, 1, 2])
    result = Predictor(checkpoint=weights, top=1)(frame)
    kept = ["path", "id"] if column == "path" else ["id"]
    assert list(result) == [*kept, "labels", "probabilities", "error"]
    assert result["labels"].tolist() == [labels[:1] for labels in expected]
    assert result["id"].tolist() == [7, 8, 9]
    assert list(frame) == [column, "id"]  # as it was


def test_a_stack_of_arrays_and_gray_images(weights, paths, expected):
    stack = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert Predictor(checkpoint=weights)({"image": stack})["labels"] == expected
    gray = stack[..., :1]
    same = Predictor(checkpoint=weights)({"image": np.repeat(gray, 3, axis=3)})
    for form in (gray, gray[..., 0]):
        assert Predictor(checkpoint=weights)({"image": form}) == same


DAMAGED = (
    (b"no image", "not a readable image"),
    (float("nan"), "there is none"),
    (None, "there is none"),
    (np.zeros((4, 4, 3), np.float32), "an array of float32 (4, 4, 3)"),
    (np.zeros((4, 4, 2), np.uint8), "an array of uint8 (4, 4, 2)"),
    (np.zeros((0, 4, 3), np.uint8), "pixels, and 1 to"),
    ([[1, 2]], "is of type list"),
    ("/nowhere.png", "no such file"),
    ("https://example.org/x.png", "is an address"),
)


def test_damaged_images_are_marked(weights, paths, expected):
    values = [Path(paths[0]).read_bytes(), *(value for value, _ in DAMAGED), Path(paths[1]).read_bytes()]
    result = Predictor(checkpoint=weights)({"image": values})
    for error, (_, message) in zip(result["error"][1:-1], DAMAGED, strict=True):
        assert message in error
        assert "\n" not in error
    assert [result["error"][0], result["error"][-1]] == [None, None]
    assert result["labels"] == [expected[0], *[None] * len(DAMAGED), expected[1]]
    assert [each is None for each in result["probabilities"]] == [each is None for each in result["labels"]]


def test_features_are_what_the_classifier_is_given(weights, paths, model, transform):
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(path)) for path in paths])
        pooled = model.forward_head(model.forward_features(batch), pre_logits=True)
        maps = model.forward_intermediates(batch, intermediates_only=True)
    predictor = Predictor(checkpoint=weights, features="pooled")
    result = predictor({"path": [*paths, "/nowhere.png"]})
    assert list(result) == ["path", "embedding", "error"]
    np.testing.assert_allclose(result["embedding"][:3], pooled, atol=1e-4 * pooled.abs().max())
    assert np.isnan(result["embedding"][3]).all()
    frame = Predictor(checkpoint=weights, features="maps")(pandas.DataFrame({"path": [*paths, "/nowhere.png"]}))
    for name, output in zip(("stride_16", "stride_32", "stride_64"), maps, strict=True):
        found = np.stack(frame[name][:3]).reshape(output.shape)
        np.testing.assert_allclose(found, output, atol=1e-4 * output.abs().max())
        assert frame[name][3] is None


def test_types_of_an_arrow_table_do_not_depend_on_what_is_damaged(weights, paths, expected):
    content = [Path(path).read_bytes() for path in paths]
    for options in ({"top": 1}, {"features": "maps"}):
        predictor = Predictor(checkpoint=weights, **options)
        values = [(paths, content), (["x"], [b"no image"]), ([], [])]
        good, bad, none = (predictor(pyarrow.table({"path": pyarrow.array(names, pyarrow.string()),
                                                    "bytes": pyarrow.array(each, pyarrow.binary())}))
                           for names, each in values)  # fmt: skip
        assert good.schema == bad.schema == none.schema
        assert good.column_names[::3] == (["path", "error"] if options == {"top": 1} else ["path", "stride_64"])
        assert [good["error"].null_count, bad["error"].null_count, bad[1].null_count, len(none)] == [3, 0, 1, 0]
        if "top" in options:
            assert good["labels"].to_pylist() == [labels[:1] for labels in expected]
        else:
            arrays = predictor({"path": paths})
            assert good["stride_32"].to_pylist() == arrays["stride_32"].reshape(3, -1).tolist()


def test_an_exported_file_and_no_images(mine):
    result = Predictor(artifact=mine)({"image": []})
    assert result == {"labels": [], "probabilities": [], "error": []}
    assert Predictor(artifact=mine, top=2)({"image": np.zeros((1, 9, 9, 3), np.uint8)})["error"] == [None]


# --- processes --------------------------------------------------------------------------------------------------------


def test_it_is_pickled_as_its_arguments_and_opened_once(weights, paths, expected, tmp_path, monkeypatch):
    copy = tmp_path / "tiny.safetensors"
    shutil.copy(weights, copy)
    monkeypatch.chdir(tmp_path)
    opened = module.opened_model.cache_info().misses
    pickled = pickle.dumps(Predictor(checkpoint="tiny.safetensors"))
    assert len(pickled) < 1000
    monkeypatch.chdir("/")
    assert module.opened_model.cache_info().misses == opened
    for _ in range(2):
        assert pickle.loads(pickled)({"path": paths})["labels"] == expected
    assert module.opened_model.cache_info().misses == opened + 1


def test_another_file_of_that_name_is_refused(weights, mine, paths, tmp_path):
    copy = tmp_path / "tiny.safetensors"
    shutil.copy(weights, copy)
    predictor = pickle.loads(pickle.dumps(Predictor(checkpoint=copy)))
    shutil.copy(mine.with_suffix(".safetensors"), copy)
    with pytest.raises(InputError, match=r"tiny\.safetensors: is another file here") as failed:
        predictor({"path": paths})
    assert "\n" not in str(failed.value)
    assert predictor != Predictor(checkpoint=copy, model="tiny_vit")


def test_a_function_for_spark(weights, paths, expected):
    """Spark pickles the method, and calls it with an iterator of DataFrames in each of its processes."""
    function = pickle.loads(pickle.dumps(Predictor(checkpoint=weights, top=1).map_in_pandas))
    content = [Path(path).read_bytes() for path in paths]
    frames = iter([pandas.DataFrame({"path": paths[:2], "content": content[:2]}), pandas.DataFrame({"content": []}),
                   pandas.DataFrame({"path": paths[2:], "content": content[2:]})])  # fmt: skip
    results = list(function(frames))
    assert [len(each) for each in results] == [2, 0, 1]
    assert [label for each in results for (label,) in each["labels"]] == [labels[0] for labels in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "none.pth"}, r"none\.pth: no such file"),
        ({"artifact": "none.onnx"}, r"none\.onnx: no such file"),
        ({"artifact": "none.txt"}, r"none\.txt"),
        ({"model": "tiny_vit"}, "--pretrained"),
        ({"artifact": "a.onnx", "ema": True}, "--ema does not apply: a.onnx holds its model"),
        ({"features": "all"}, "--features all: choose from pooled, maps"),
        ({"features": "maps", "top": 1}, "--top does not apply: features have no classes"),
        ({"top": 0}, "--top 0 is out of range"),
    ],
)
def test_unusable_arguments_are_one_line_at_once(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as failed:
        Predictor(**arguments)
    assert "\n" not in str(failed.value)


def test_unusable_batches_are_one_line(weights):
    with pytest.raises(InputError, match=r"has the columns img, id, and none of images; name it one of image, bytes"):
        Predictor(checkpoint=weights)({"img": [], "id": []})
    with pytest.raises(InputError, match="--top 4: the model has 3 classes"):
        Predictor(checkpoint=weights, top=4)({"image": []})


# --- engines ----------------------------------------------------------------------------------------------------------


def test_datasets_of_hugging_face(weights, paths, expected, tmp_path, monkeypatch):
    """Types are those of the first rows, in which no image is damaged, unless they are given."""
    draw(tmp_path / "bad.png", 0).write_bytes(b"no image")
    listed = [*paths[:2], str(tmp_path / "bad.png"), paths[2]]
    dataset = datasets.Dataset.from_dict({"image": listed, "id": [1, 2, 3, 4]})
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    predictor = Predictor(checkpoint=weights)
    options = {"batched": True, "batch_size": 2, "writer_batch_size": 2}
    result = dataset.map(predictor, features=predictor.output_features(dataset.features), **options)
    assert result.column_names == ["image", "id", "labels", "probabilities", "error"]
    assert result["labels"][:] == [*expected[:2], None, expected[2]]
    assert "not a readable image" in result["error"][2]
    good = dataset.select([0, 1, 3]).cast_column("image", datasets.Image())  # which gives Pillow's images
    assert good.map(predictor, **options)["labels"][:] == expected
    embedded = good.map(each := Predictor(checkpoint=weights, features="maps"),
                        features=each.output_features(good.features), **options)  # fmt: skip
    assert np.shape(embedded.with_format("numpy")["stride_64"][:]) == (3, 32, 1, 1)


def test_a_cached_dataset_is_that_of_the_same_predictor(weights, mine):
    """Which `datasets` tells by a hash of the function's pickle."""
    first, second = (Hasher.hash(Predictor(checkpoint=weights)) for _ in range(2))
    others = {"checkpoint": weights, "top": 1}, {"artifact": mine}
    assert first == second
    assert len({first, *(Hasher.hash(Predictor(**each)) for each in others)}) == 3
