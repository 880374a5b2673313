"""Third-party artifacts: what they say of themselves, what their runtimes raise, and what they would have read."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from shvit import cli
from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.export import guards
from shvit.export.backends.openvino import write_openvino
from shvit.export.backends.registry import load_artifact
from shvit.export.bench.cases import Settings, create_file_case
from shvit.export.spec import Spec
from tests.conftest import create_tiny

from .artifacts import SPEC, class_folders, constant, external, write_onnx

PIXELS = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)


def run(path: Path) -> torch.Tensor:
    return load_artifact(path, 1)(PIXELS)


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        run(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))
    return str(error.value)


def test_a_sound_file_runs(tmp_path):
    assert run(write_onnx(tmp_path / "m.onnx")).shape == (2, 2)
    assert run(write_onnx(tmp_path / "m.onnx", shape=("batch", 3, None, None))).shape == (2, 2)


# --- what it says of itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "x"}, "has the inputs x, and should have one, image"),
        ({"shape": (1, 3, 32, 32)}, "image is 1×3×32×32"),
        ({"shape": (1, 3, 64)}, "image is 1×3×64"),
        ({"shape": (1, 1, 64, 64), "weight": np.ones((1, 2), np.float32)}, "image is 1×1×64×64"),
        ({"weight": np.ones((3, 1), np.float32)}, "logits is 1×1, and should be .*×2"),
        ({"weight": np.ones((3, 7), np.float32)}, "logits is 1×7"),
        ({"outputs": ("flat",)}, "says that it gives logits, and gives flat"),
        ({"dtype": TensorProto.DOUBLE, "weight": np.ones((3, 2))}, "cannot open it"),
        ({"weight": np.full((3, 2), np.nan, np.float32)}, "NaN or infinite"),
        ({"weight": np.full((3, 2), 3e38, np.float32)}, "NaN or infinite"),
    ],
    ids=str,
)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path, changes, said):
    assert re.search(said, refused(write_onnx(tmp_path / "m.onnx", **changes)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"img_size": "64x"}, "img_size is '64x'"),
        ({"img_size": 64.0}, "img_size is 64.0"),
        ({"img_size": True}, "img_size is True"),
        ({"img_size": float("inf")}, "Infinity is not a number"),
        ({"img_size": 0}, "img_size is 0"),
        ({"img_size": 10**30}, "img_size"),
        ({"img_size": [1, 2, 3]}, "img_size is "),
        ({"img_size": ["a", 1]}, "img_size is "),
        ({"img_size": [64, 10**30]}, "img_size is "),
        ({"img_size": [64, 4096], "crop_pct": 0.05}, "resize images to more than 8192 px"),
        ({"img_size": 4096, "crop_pct": 0.05}, "resize images to more than 8192 px"),
        ({"other_sizes": [32] * 64}, "other_sizes is .* at most 63 items"),
        ({"excluded_layers": [1, 2]}, "excluded_layers.0 is 1"),
        ({"excluded_layers": ["\x1b[2J"]}, r"excluded_layers.0 is .*; it cannot be a name"),
        ({"outputs": ["logits", "logits"]}, "cannot be names of outputs"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"num_classes": 0}, "has no classes"),
        ({"mean": [0.1, 0.1, float("nan")]}, "NaN is not a number"),
        ({"std": [0.1, 0.0, 0.1]}, "std.1 is 0.0; input should be greater than 0"),
        ({"in_chans": 1000}, "in_chans is 1000; input should be less than or equal to 16"),
        ({"crop_pct": 1e-300}, "crop_pct"),
        ({"evil": 1}, "unknown field 'evil'|evil"),
    ],
    ids=str,
)
def test_a_spec_is_read_strictly(tmp_path, changes, said):
    assert re.search(said, refused(write_onnx(tmp_path / "m.onnx", {**SPEC, **changes})))


@pytest.mark.parametrize("text", ["[" * 40_000, "{}", "null", '{"model": 1e999}', "", '{"a": 1, "a": 2}'])
def test_a_spec_that_is_none_is_refused(tmp_path, text):
    refused(write_onnx(tmp_path / "m.onnx", text))


@pytest.mark.parametrize("key", ["shvit.labels", "shvit.ranges"])
@pytest.mark.parametrize("text", ["[" * 40_000, "5", '["\\u001b[2J"]', '{"a": [NaN, 1]}', '{"a": [1]}'])
def test_labels_and_ranges_that_are_none_are_refused(tmp_path, key, text):
    path = write_onnx(tmp_path / "m.onnx", metadata={key: text})
    with pytest.raises(InputError):
        load_artifact(path).scale_faults()


def test_sizes_are_bounded_before_memory_is_taken():
    spec = Spec.from_json(json.dumps({**SPEC, "img_size": 4096}))
    assert guards.rows_that_fit(32, spec) == 2
    assert guards.rows_that_fit(32, Spec.from_json(json.dumps(SPEC))) == 32
    assert 1 <= guards.images_that_fit(512, spec) < 50
    assert guards.images_that_fit(512, Spec.from_json(json.dumps({**SPEC, "img_size": 1024}))) == 512


# --- what it would do -------------------------------------------------------------------------------------------------


def _value(name: str, dtype: int, shape):
    return helper.make_tensor_value_info(name, dtype, shape)


BODY = helper.make_graph(
    [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["x"], ["y"])],
    "body",
    [_value("i", TensorProto.INT64, []), _value("go", TensorProto.BOOL, []), _value("x", TensorProto.FLOAT, None)],
    [_value("on", TensorProto.BOOL, []), _value("y", TensorProto.FLOAT, None)],
)
BOMBS = {
    "constant": [helper.make_node("ConstantOfShape", ["huge"], ["bomb"])],
    "expand": [helper.make_node("Expand", ["pooled", "huge4"], ["bomb"])],
    "tile": [helper.make_node("Tile", ["pooled", "huge4"], ["bomb"])],
    "resize": [helper.make_node("Resize", ["pooled", "", "scales"], ["bomb"])],
    "loop": [helper.make_node("Loop", ["trips", "yes", "pooled"], ["bomb"], body=BODY)],
    "pad": [helper.make_node("Pad", ["pooled", "pads"], ["bomb"])],
}
NUMBERS = [
    constant("huge", [10**6, 10**6]),
    constant("huge4", [1, 1, 10**6, 10**6]),
    constant("scales", [1, 1, 1e5, 1e5], np.float32),
    constant("trips", 10**12),
    constant("yes", True, bool),
    constant("pads", [0, 0, 0, 0, 0, 0, 10**5, 10**5]),
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_not_run(tmp_path, bomb):
    nodes = [*BOMBS[bomb], helper.make_node("ReduceMean", ["bomb"], ["small"], keepdims=0)]
    nodes.append(helper.make_node("Add", ["pooled", "small"], ["sum"]))
    path = write_onnx(tmp_path / "m.onnx", nodes=nodes, feature="sum", initializers=NUMBERS)
    assert re.search("numbers, more than|holds a loop", refused(path))


def test_what_a_runtime_raises_while_it_runs_is_one_line(tmp_path):
    """The index is known only when the model runs, and is out of bounds."""
    nodes = [
        helper.make_node("ReduceSum", ["image"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["index"], to=TensorProto.INT64),
        helper.make_node("Add", ["index", "far"], ["out"]),
        helper.make_node("Gather", ["pooled", "out"], ["gathered"], axis=1),
        helper.make_node("Add", ["pooled", "gathered"], ["sum"]),
    ]
    path = write_onnx(tmp_path / "m.onnx", nodes=nodes, feature="sum", initializers=[constant("far", [10**6])])
    assert "does not run on what it says that it takes" in refused(path)


def test_an_output_that_is_no_tensor_is_refused(tmp_path):
    path = write_onnx(
        tmp_path / "m.onnx", nodes=[helper.make_node("SequenceConstruct", ["pooled"], ["list"])], outputs=("logits",)
    )
    assert run(path).shape == (2, 2)
    spec = {**SPEC, "outputs": ["list"]}
    nodes = [helper.make_node("SequenceConstruct", ["pooled"], ["list"])]
    refused(write_onnx(tmp_path / "m.onnx", spec, nodes=nodes, outputs=("list",)))


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret.bin", "a/../../secret.bin", "", "link.bin", "w.bin"])
def test_weights_in_other_files_are_not_read(tmp_path, location):
    folder = tmp_path / "given"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (folder / "w.bin").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = write_onnx(folder / "m.onnx", weight=np.zeros((0,), np.float32))
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(external(location))
    path.write_bytes(model.SerializeToString())
    assert "weights in" in refused(path)
    if location != "w.bin":  # which a third party's model may have, when it is timed
        with pytest.raises(InputError, match="weights in"):
            create_file_case(path, 1, Settings(1), [], tuned=False)


def test_numbers_that_are_not_there_are_told(tmp_path):
    path = write_onnx(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.initializer[0].dims[:] = [3, 10**6]
    path.write_bytes(model.SerializeToString())
    refused(path)


@pytest.mark.parametrize("command", ["eval", "verify"])
@pytest.mark.parametrize("changes", [{"name": "x"}, {"shape": (1, 3, 64)}, {"weight": np.ones((3, 1), np.float32)}])
def test_commands_refuse_in_one_line(tmp_path, command, changes):
    path = str(write_onnx(tmp_path / "m.onnx", **changes))
    words = ["eval", "--artifact", path, "--data", str(class_folders(tmp_path / "d"))]
    with pytest.raises(InputError):
        cli.run(words if command == "eval" else ["verify", path, "--model", "tiny_vit"])


def test_nan_is_no_accuracy(tmp_path):
    path = write_onnx(tmp_path / "m.onnx", weight=np.full((3, 2), np.nan, np.float32))
    with pytest.raises(InputError, match="NaN or infinite outputs"):
        cli.run(["eval", "--artifact", str(path), "--data", str(class_folders(tmp_path / "d"))])


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ir(tmp_path_factory):
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("ir")
    source = write_onnx(folder / "m.onnx")
    write_openvino(source, folder / "m.xml", Spec.from_json(json.dumps(SPEC)))
    return folder


@pytest.mark.parametrize(
    "attack", ["none", "bin missing", "bin empty", "bin fifo", "offset", "extension", "size", "name", "deep", "doctype"]
)
def test_an_ir_is_checked(ir, tmp_path, attack):
    text, path, weights = (ir / "m.xml").read_text(), tmp_path / "m.xml", tmp_path / "m.bin"
    shutil.copy(ir / "m.bin", weights)
    if attack.startswith("bin"):
        weights.unlink()
    if attack == "bin empty":
        weights.write_bytes(b"")
    if attack == "bin fifo":
        os.mkfifo(weights)
    text = {
        "offset": re.sub(r'offset="\d+"', 'offset="18446744073709551600"', text),
        "extension": text.replace('version="opset1"', 'version="extension"'),
        "size": text.replace("1,3,64,64", "1,3,32,32"),
        "name": text.replace('"image"', '"picture"'),
        "deep": "<a>" * 50_000,
        "doctype": text.replace("<net ", '<!DOCTYPE l [<!ENTITY a "bb">]><net ', 1).replace('"shvit_s1', '"&a;'),
    }.get(attack, text)
    path.write_text(text)
    if attack in ("none", "doctype"):  # an entity is never expanded
        assert run(path).shape == (2, 2)
        return
    with pytest.raises(InputError) as error:
        run(path)
    assert "\n" not in str(error.value)


# --- Core ML ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    pytest.importorskip("coremltools")
    from shvit.export.backends.coreml import write_coreml

    path = tmp_path_factory.mktemp("package") / "m.mlpackage"
    model = create_tiny(num_classes=2, depth=(1, 1, 1))
    write_coreml(deploy(model, 64), path, Spec.of("tiny_vit", model, 64))
    return path


def _proto(path: Path, change) -> None:
    from coremltools.proto import Model_pb2

    file = next(path.rglob("*.mlmodel"))
    proto = Model_pb2.Model()
    proto.ParseFromString(file.read_bytes())
    change(proto)
    file.write_bytes(proto.SerializeToString())


def _declare_large(proto) -> None:
    main = proto.mlProgram.functions["main"]
    op = next(each for each in main.block_specializations[main.opset].operations if each.type == "conv")
    for dim in op.outputs[0].type.tensorType.dimensions:
        dim.constant.size = 10**6


def _rename_main(proto) -> None:
    functions = proto.mlProgram.functions
    functions["evil"].CopyFrom(functions["main"])
    del functions["main"]


def _blobs(proto):
    main = proto.mlProgram.functions["main"]
    for op in main.block_specializations[main.opset].operations:
        for value in op.attributes.values():
            if value.WhichOneof("value") == "blobFileValue":
                yield value.blobFileValue


def _hidden_weights(path: Path) -> None:
    weights = next(path.rglob("weight.bin"))
    weights.rename(weights.with_name("._w.bin"))
    _proto(path, lambda proto: [setattr(each, "fileName", "@model_path/weights/._w.bin") for each in _blobs(proto)])


def _manifest(path: Path, old: str, new: str) -> None:
    text = (path / "Manifest.json").read_text()
    (path / "Manifest.json").write_text(text.replace(old, new))


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _lead_out(blob) -> None:
    blob.fileName = "@model_path/../../../secret.bin"


def _bomb(path: Path) -> None:
    """What coremltools would compute when it loads the program, whatever size is declared."""

    def change(proto) -> None:
        main = proto.mlProgram.functions["main"]
        operations = main.block_specializations[main.opset].operations
        shape = next(each for each in operations if each.type == "const")
        made = operations.add(type="fill")
        made.inputs["shape"].arguments.add(name=shape.outputs[0].name)
        made.outputs.add(name="bomb")
        shape.attributes["val"].immediateValue.tensor.ints.values[:] = [10**6, 10**6]

    _proto(path, change)


PACKAGES = {
    "bomb": _bomb,
    "declared bomb": lambda path: _proto(path, _declare_large),
    "main": lambda path: _proto(path, _rename_main),
    "no input": lambda path: _proto(path, lambda proto: proto.description.ClearField("input")),
    "other name": lambda path: _proto(path, lambda proto: setattr(proto.description.input[0], "name", "x")),
    "offset": lambda path: _proto(path, lambda proto: [setattr(each, "offset", 1 << 40) for each in _blobs(proto)]),
    "hidden weights": _hidden_weights,
    "short": lambda path: next(path.rglob("weight.bin")).write_bytes(b"\0" * 100),
    "header": lambda path: next(path.rglob("weight.bin")).write_bytes(struct.pack("<II", 2**31, 2) + bytes(500)),
    "weight fifo": lambda path: _fifo(next(path.rglob("weight.bin"))),
    "model fifo": lambda path: _fifo(next(path.rglob("*.mlmodel"))),
    "manifest fifo": lambda path: _fifo(path / "Manifest.json"),
    "manifest deep": lambda path: (path / "Manifest.json").write_text("[" * 100_000),
    "manifest ..": lambda path: _manifest(path, "com.apple.CoreML/model.mlmodel", "../../x.mlmodel"),
    "manifest absolute": lambda path: _manifest(path, "com.apple.CoreML/model.mlmodel", "/etc/passwd"),
    "manifest hidden": lambda path: _manifest(path, "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/.m.mlmodel"),
    "weights elsewhere": lambda path: _proto(path, lambda proto: [_lead_out(each) for each in _blobs(proto)]),
}


@pytest.mark.parametrize("attack", PACKAGES)
def test_a_package_is_checked(package, tmp_path, attack):
    path = tmp_path / "m.mlpackage"
    shutil.copytree(package, path)
    PACKAGES[attack](path)
    if attack == "weights elsewhere":
        shutil.copyfile(next(path.rglob("weight.bin")), tmp_path / "secret.bin")
    with pytest.raises(InputError) as error:
        run(path)
    assert "\n" not in str(error.value)
    if attack in ("hidden weights", "weights elsewhere"):  # refused before coremltools looks for them
        assert "which is no file of a package" in str(error.value)


def test_a_package_of_links_is_opened(package, tmp_path):
    """As the cache of the Hugging Face hub holds one."""
    path = tmp_path / "m.mlpackage"
    shutil.copytree(package, path)
    (path / "Data").rename(tmp_path / "real")
    (path / "Data").symlink_to(tmp_path / "real")
    run(path)
