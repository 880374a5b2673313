"""Artifacts, checkpoints and images of detectors from strangers."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from shvit.cli import run
from shvit.detection.detector import create_detector, fixed_pipeline, own_pipeline, preparation
from shvit.detection.onnx import KEY, DetectorSpec, load_onnx
from shvit.detection.parsing.config import load_config
from shvit.detection.training import check_resumable
from shvit.errors import InputError
from tests.conftest import create_tiny
from tests.detection.detection_data import write_coco, write_config

F32 = np.float32
SPEC = {
    "config": "c",
    "detector": "RetinaNet",
    "img_size": [64, 64],
    "classes": ["red", "blue"],
    "outputs": ["boxes", "scores", "labels"],
    "mask_threshold": 0.5,
    "padding": [1, 2, 3],
}
BOX, SCORE, LABEL = np.array([[1, 2, 30, 40]], F32), np.array([0.9], F32), np.array([1])
value_info = helper.make_tensor_value_info


def write(path: Path, nodes, constants, spec=SPEC, outputs=None) -> Path:
    kinds = {"boxes": TensorProto.FLOAT, "scores": TensorProto.FLOAT, "labels": TensorProto.INT64}
    outputs = outputs or [value_info(name, kind, None) for name, kind in kinds.items()]
    inputs = [value_info("pixels", TensorProto.UINT8, (1, 64, 64, 3)), value_info("size", TensorProto.INT64, (2,))]
    tensors = [numpy_helper.from_array(np.array(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.metadata_props.add(key=KEY, value=spec if isinstance(spec, str) else json.dumps(spec))
    path.write_bytes(model.SerializeToString())
    return path


def same(*names: str):
    return [helper.make_node("Identity", [name[0]], [name]) for name in names]


def constant(path: Path, boxes=BOX, scores=SCORE, labels=LABEL, **options) -> Path:
    return write(path, same("boxes", "scores", "labels"), {"b": boxes, "s": scores, "l": labels}, **options)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a.png"
    Image.new("RGB", (80, 50)).save(path)
    load_config("retinanet_shvit-s1_fpn_1x_coco")
    return preparation(fixed_pipeline((64, 64)))(path)


# --- artifacts --------------------------------------------------------------------------------------------------------


def test_a_sound_artifact_is_run(tmp_path, image):
    found = load_onnx(constant(tmp_path / "a.onnx")).detect(image)
    assert len(found) == 1
    zero = load_onnx(constant(tmp_path / "a.onnx", np.zeros((0, 4), F32), np.zeros(0, F32), np.zeros(0, np.int64)))
    assert len(zero.detect(image)) == 0


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"boxes": np.full((1, 4), np.nan, F32)}, "cannot be"),
        ({"boxes": np.full((1, 4), np.inf, F32)}, "cannot be"),
        ({"boxes": np.array([[30, 40, 1, 2]], F32)}, "cannot be"),
        ({"scores": np.array([np.nan], F32)}, "cannot be"),
        ({"scores": np.array([2.5], F32)}, "cannot be"),
        ({"scores": np.array([-1], F32)}, "cannot be"),
        ({"labels": np.array([9])}, "a label that none of its 2 classes has"),
        ({"labels": np.array([-1])}, "a label that none of its 2 classes has"),
        ({"boxes": np.zeros((2, 5), F32)}, "gives other outputs than it says"),
        ({"boxes": np.zeros((1, 1, 4), F32)}, "gives other outputs than it says"),
        ({"scores": np.array(0.9, F32)}, "gives other outputs than it says"),
        ({"boxes": np.zeros((20_000, 4), F32), "scores": np.zeros(20_000, F32), "labels": np.zeros(20_000, np.int64)},
         "gives other outputs than it says"),
    ],
)  # fmt: skip
def test_wrong_outputs_are_one_line(tmp_path, image, outputs, message):
    path = constant(tmp_path / "a.onnx", **outputs)
    with pytest.raises(InputError, match=rf"a\.onnx: .*{message}") as caught:
        load_onnx(path).detect(image)
    assert "\n" not in str(caught.value)


def test_what_onnx_runtime_raises_is_one_line(tmp_path, image):
    constants = {"s": SCORE, "l": LABEL}
    fails = [helper.make_node("Cast", ["size"], ["f"], to=TensorProto.FLOAT),
             helper.make_node("Reshape", ["f", "size"], ["boxes"]), *same("scores", "labels")]  # fmt: skip
    with pytest.raises(InputError, match=r"a\.onnx: ONNX Runtime cannot run it"):
        load_onnx(write(tmp_path / "a.onnx", fails, constants)).detect(image)
    huge = [helper.make_node("Mul", ["size", "m"], ["z"]), helper.make_node("ConstantOfShape", ["z"], ["boxes"]),
            *same("scores", "labels")]  # fmt: skip
    many = constants | {"m": np.array([10**9, 10**9])}
    with pytest.raises(InputError, match=r"a\.onnx: ONNX Runtime cannot run it"):
        load_onnx(write(tmp_path / "a.onnx", huge, many)).detect(image)


def test_masks_are_bounded_before_they_are_drawn(tmp_path, image):
    spec = SPEC | {"outputs": [*SPEC["outputs"], "masks"]}
    number = 9000
    constants = {"b": np.tile(BOX, (number, 1)), "s": np.full(number, 0.5, F32), "l": np.zeros(number, np.int64)}
    constants["m"] = np.full((number, 1, 1), 0.5, F32)
    types = {name: TensorProto.INT64 if name == "labels" else TensorProto.FLOAT for name in spec["outputs"]}
    outputs = [value_info(name, kind, None) for name, kind in types.items()]
    nodes = same("boxes", "scores", "labels", "masks")
    detector = load_onnx(write(tmp_path / "a.onnx", nodes, constants, spec, outputs))
    large = copy.deepcopy(image)
    large["data_samples"].set_metainfo({"ori_shape": (8000, 8000)})
    with pytest.raises(InputError, match="finds 9,000 objects, whose masks take 576,000,000,000 bytes"):
        detector.detect(large)
    constants["m"] = np.full((number, 1, 1), np.nan, F32)
    with pytest.raises(InputError, match="masks that cannot be"):
        load_onnx(write(tmp_path / "a.onnx", nodes, constants, spec, outputs)).detect(image)


@pytest.mark.parametrize(
    "spec",
    [
        "[1]", "", "{", "[" * 40_000, '{"config": 1, "config": 2}', "null", "5",
        SPEC | {"img_size": ["64", "64"]}, SPEC | {"img_size": [64]}, SPEC | {"img_size": [0, 64]},
        SPEC | {"img_size": [1e9, 64]}, SPEC | {"img_size": [10**30, 64]}, SPEC | {"img_size": 64},
        SPEC | {"padding": ["a", "b", "c"]}, SPEC | {"padding": [1, 2]}, SPEC | {"padding": [-1, 2, 300]},
        SPEC | {"mask_threshold": "0.5"}, SPEC | {"mask_threshold": 2}, SPEC | {"mask_threshold": None},
        SPEC | {"classes": []}, SPEC | {"classes": "red"}, SPEC | {"classes": [1, 2]}, SPEC | {"more": 1},
        SPEC | {"outputs": ["boxes"]}, SPEC | {"outputs": ["boxes", "scores", "labels", "x"]},
        SPEC | {"config": {}}, {key: value for key, value in SPEC.items() if key != "img_size"},
        json.dumps(SPEC).replace("0.5", "NaN"), json.dumps(SPEC).replace("0.5", "1e999"),
        json.dumps(SPEC).replace("64", "9" * 5000),
    ],
    ids=lambda spec: str(spec)[-60:],
)  # fmt: skip
def test_descriptions_that_cannot_be_are_one_line(tmp_path, spec):
    with pytest.raises(InputError, match=r"a\.onnx: the file's description of its detector") as caught:
        load_onnx(constant(tmp_path / "a.onnx", spec=spec))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_description_is_read_back():
    assert DetectorSpec.from_json(json.dumps(SPEC)).img_size == (64, 64)


def test_other_interfaces_and_files_are_one_line(tmp_path):
    sequence = [
        helper.make_tensor_sequence_value_info("boxes", TensorProto.FLOAT, None),
        value_info("scores", TensorProto.FLOAT, None),
        value_info("labels", TensorProto.INT64, None),
    ]
    nodes = [helper.make_node("SequenceConstruct", ["b", "b"], ["boxes"]), *same("scores", "labels")]
    constants = {"b": BOX, "s": SCORE, "l": LABEL}
    with pytest.raises(InputError, match="does not give boxes"):
        load_onnx(write(tmp_path / "a.onnx", nodes, constants, outputs=sequence))
    with pytest.raises(InputError, match="does not take pixels"):
        load_onnx(constant(tmp_path / "a.onnx", spec=SPEC | {"img_size": [4096, 4096]}))
    model = onnx.load(str(constant(tmp_path / "a.onnx")))
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="../secret.bin")
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="has weights in another file"):
        load_onnx(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08" * 9)
    with pytest.raises(InputError):
        load_onnx(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").unlink()
    os.mkfifo(tmp_path / "a.onnx")
    with pytest.raises(InputError, match="is a FIFO"):
        load_onnx(tmp_path / "a.onnx")


# --- images -----------------------------------------------------------------------------------------------------------


def test_damaged_and_thin_images_are_skipped_and_counted(tmp_path, capsys):
    config = write_config(tmp_path / "c.py", "retinanet", write_coco(tmp_path / "coco", images=2))
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (80, 60)).save(folder / "sound.png")
    Image.new("RGB", (5000, 1)).save(folder / "long.png")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    given = ["--artifact", str(constant(tmp_path / "a.onnx")), "--images", str(folder)]
    result = run(["detect", "predict", str(config), *given, "--output", str(tmp_path / "drawn")])
    assert set(result["found"]) == {"sound.png.png"}
    assert set(result["skipped"]) == {"long.png", "cut.jpg", "script.png"}
    assert all("\n" not in reason for reason in result["skipped"].values())
    assert capsys.readouterr().err.count("skipped ") == 3
    (folder / "sound.png").unlink()
    with pytest.raises(InputError, match="none of 3 images can be used"):
        run(["detect", "predict", str(config), *given, "--output", str(tmp_path / "drawn")])


def test_mmdetections_own_reader_is_ours_in_prediction(tmp_path):
    (tmp_path / "c.py").write_text('_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"\n')
    prepare = preparation(own_pipeline(load_config(str(tmp_path / "c.py"))))
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="is a FIFO"):
        prepare(tmp_path / "a.png")
    with pytest.raises(InputError, match="no such image"):
        prepare(tmp_path / "b.png")


def test_an_image_that_fails_in_training_is_named(tmp_path):
    """One that is only just not too thin for the check, in MMDetection's own code."""
    coco = write_coco(tmp_path / "coco", images=2)
    Image.new("RGB", (900, 1)).save(coco / "images" / "1.png")
    content = json.loads((coco / "annotations.json").read_text())
    content["images"][1].update(width=900, height=1)
    for each in content["annotations"]:
        if each["image_id"] == 1:
            each.update(bbox=[0, 0, 90, 1], area=90, segmentation=[[0, 0, 90, 0, 90, 1]])
    (coco / "annotations.json").write_text(json.dumps(content))
    config = write_config(tmp_path / "c.py", "retinanet", coco)
    options = ["train_dataloader.dataset.filter_cfg=None"]
    with pytest.raises(InputError, match=r"1\.png: cannot be prepared") as caught:
        run(["detect", "train", str(config), "--output", str(tmp_path / "run"), "--options", *options])
    assert "\n" not in str(caught.value)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return create_detector(load_config(str(write_config(folder / "c.py", "retinanet", write_coco(folder, images=1)))))


def checkpoint(model, **fields):
    content = {"state_dict": model.state_dict(), "meta": {"epoch": 1, "iter": 2}, "optimizer": {}, "message_hub": {}}
    return {name: value for name, value in (content | fields).items() if value is not None}


def named(folder: Path, text: str | bytes) -> Path:
    last = folder / "last_checkpoint"
    last.write_bytes(text.encode() if isinstance(text, str) else text)
    return last


def test_a_run_goes_on_from_a_sound_checkpoint(tmp_path, model):
    torch.save(checkpoint(model), tmp_path / "epoch_1.pth")
    check_resumable(named(tmp_path, str(tmp_path / "epoch_1.pth")), model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        ("", "does not name a checkpoint"),
        ("a\nb", "does not name a checkpoint"),
        ("a\0b", "does not name a checkpoint"),
        ("\x1b[2J", "does not name a checkpoint"),
        ("{here}/" + "x" * 300, "cannot be read"),
        ("{here}/epoch_9.pth", "which is not there"),
        ("{here}/../secret.pth", "which is not in the run folder"),
        ("/etc/passwd", "which is not in the run folder"),
        ("http://127.0.0.1/x.pth", "which is not in the run folder"),
        ("{here}", "is a folder"),
        ("{here}/torn.pth", "not a readable checkpoint"),
        ("{here}/text.pth", "not a readable checkpoint|refused"),
        ("{here}/empty.pth", "not a readable checkpoint|refused"),
        ("{here}/weights.pth", "is no checkpoint of a run"),
        ("{here}/tensor.pth", "is no checkpoint of a run"),
        ("{here}/other.pth", "is of another detector"),
        ("{here}/counts.pth", "does not tell how far the run is"),
        ("{here}/fifo.pth", "is a FIFO"),
        ("x" * 70_000, "larger than"),
    ],
)  # fmt: skip
def test_what_last_checkpoint_names_is_held_against_the_run(tmp_path, monkeypatch, model, text, message):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "torn.pth").write_bytes(b"PK\3\4" + b"x" * 500)
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").write_bytes(b"")
    os.mkfifo(folder / "fifo.pth")
    torch.save(model.state_dict(), folder / "weights.pth")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    torch.save(checkpoint(model, state_dict=create_tiny().state_dict()), folder / "other.pth")
    torch.save(checkpoint(model, meta={"epoch": "1", "iter": -5}), folder / "counts.pth")
    last = named(folder, text.replace("{here}", str(folder)) if isinstance(text, str) else text)
    with pytest.raises(InputError, match=message) as caught:
        check_resumable(last, model)
    assert str(caught.value).isprintable()


def test_the_command_looks_before_it_goes_on(tmp_path):
    config = write_config(tmp_path / "c.py", "retinanet", write_coco(tmp_path / "coco", images=1))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "torn.pth").write_bytes(b"PK\3\4" + b"x" * 500)
    named(tmp_path / "run", str(tmp_path / "run" / "torn.pth"))
    with pytest.raises(InputError, match=r"torn\.pth: not a readable checkpoint"):
        run(["detect", "train", str(config), "--output", str(tmp_path / "run")])


def test_an_optimizer_of_other_parameters_is_one_line(tmp_path, model):
    coco = write_coco(tmp_path / "coco", images=1)
    config = write_config(tmp_path / "c.py", "retinanet", coco)
    (tmp_path / "run").mkdir()
    torch.save(checkpoint(model, optimizer={"state": {}, "param_groups": []}), tmp_path / "run" / "epoch_1.pth")
    named(tmp_path / "run", str(tmp_path / "run" / "epoch_1.pth"))
    with pytest.raises(InputError, match="a checkpoint cannot be loaded") as caught:
        run(["detect", "train", str(config), "--output", str(tmp_path / "run")])
    assert "\n" not in str(caught.value)
