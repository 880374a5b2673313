"""Artifacts against onnx.checker, ONNX Runtime, coremltools and PyTorch."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.loader import adapt_to_chs
from timm.models import register_model
from torch import nn

from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.deployment import deploy
from shvit.documents import to_json
from shvit.errors import CheckFailed, InputError
from shvit.export.backends.registry import load_artifact
from shvit.export.formats.onnx import load_onnx, operators
from shvit.export.images import read_pixels, sample_images
from shvit.export.spec import Spec, open_model, randomize_norms
from tests.conftest import TINY, settle

CLASSES = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained-looking tiny SHViT with three classes as a checkpoint, and its ONNX and Core ML files at 64 px."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(3)
    model = timm.create_model("tiny_vit", num_classes=CLASSES)
    randomize_norms(model)
    spec = Spec.of("tiny_vit", model, 64)
    settle(model, spec.normalize(read_pixels(sample_images(None), spec)))
    write_checkpoint(model.state_dict(), folder / "s1.safetensors")
    source = ["--model", "tiny_vit", "--checkpoint", f"{folder}/s1.safetensors", "--img-size", "64"]
    half = ["--precision", "fp16"]
    results = {
        "onnx": run(["export", "onnx", *source, "--output", f"{folder}/s1.onnx", "--dynamic-batch"]),
        "coreml": run(["export", "coreml", *source, "--output", f"{folder}/s1.mlpackage"]),
        "onnx fp16": run(["export", "onnx", *source, *half, "--output", f"{folder}/half.onnx", "--dynamic-batch"]),
        "coreml fp16": run(["export", "coreml", *source, *half, "--output", f"{folder}/half.mlpackage"]),
    }
    return folder, model.eval(), results


def test_onnx_file_is_valid_and_says_what_it_wants(made):
    folder, model, _ = made
    proto = onnx.load(folder / "s1.onnx")
    onnx.checker.check_model(proto, full_check=True)
    used = {name for node in proto.graph.node for name in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} <= used
    assert not any(
        "Identity" in name or "BatchNormalization" in name for name in operators(load_onnx(folder / "s1.onnx"))
    )
    spec = load_artifact(folder / "s1.onnx").spec
    assert spec == Spec.of("tiny_vit", model, 64)
    assert spec.num_classes == CLASSES
    assert spec.mean == IMAGENET_DEFAULT_MEAN


def test_onnx_file_gives_the_models_answers_at_any_batch(made):
    folder, model, _ = made
    session = onnxruntime.InferenceSession(folder / "s1.onnx", providers=["CPUExecutionProvider"])
    for batch_size in (1, 3):
        batch = torch.randn(batch_size, 3, 64, 64)
        with torch.no_grad():
            expected = model(batch)
        np.testing.assert_allclose(session.run(None, {"image": batch.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


def test_onnx_file_names_nothing_of_the_machine_it_was_made_on(made):
    folder, _, _ = made
    text = (folder / "s1.onnx").read_bytes()
    assert b".py" not in text
    assert b"site-packages" not in text


def test_certificate_stands_beside_the_file_and_holds_its_hash(made):
    folder, _, results = made
    import hashlib

    certificate = json.loads((folder / "s1.onnx.certificate.json").read_text())
    assert certificate == json.loads(to_json(results["onnx"]["certificate"]))
    assert certificate["artifact_sha256"] == hashlib.sha256((folder / "s1.onnx").read_bytes()).hexdigest()
    assert certificate["checkpoint_sha256"] == hashlib.sha256((folder / "s1.safetensors").read_bytes()).hexdigest()
    assert certificate["passed"]
    assert certificate["images"] >= 20
    assert certificate["top1_agreement"] == 100
    assert certificate["snr_db"] > 90


def test_coreml_package_reads_back_with_image_input_and_all_weights(made):
    import coremltools as ct

    folder, model, results = made
    package = ct.models.MLModel(str(folder / "s1.mlpackage"), skip_model_load=True)
    proto = package.get_spec()
    source = proto.description.input[0]
    assert (source.name, source.type.imageType.width, source.type.imageType.height) == ("image", 64, 64)
    assert source.type.imageType.colorSpace == ct.proto.FeatureTypes_pb2.ImageFeatureType.RGB
    assert list(proto.description.output[0].type.multiArrayType.shape) == [1, CLASSES]
    assert results["coreml"]["certificate"]["operators"]["conv"] == sum(
        isinstance(module, torch.nn.Conv2d) for module in deploy(model, 64).modules()
    )
    assert Spec.from_json(package.user_defined_metadata["shvit.spec"]).img_size == (64, 64)
    certificate = json.loads((folder / "s1.mlpackage.certificate.json").read_text())
    assert certificate == json.loads(to_json(results["coreml"]["certificate"]))
    assert certificate["runtime"] == "mil"
    assert certificate["snr_db"] > 75


@pytest.mark.parametrize("kind", ["onnx", "coreml"])
def test_half_precision_halves_the_weights_and_keeps_the_answers(made, kind):
    folder, model, results = made
    whole, half = results[kind]["certificate"], results[f"{kind} fp16"]["certificate"]
    assert half["passed"]
    assert 34 < half["snr_db"] < 70 < whole["snr_db"]
    assert whole["artifact_bytes"] - half["artifact_bytes"] > 1.7 * sum(p.numel() for p in model.parameters())
    suffix = ".onnx" if kind == "onnx" else ".mlpackage"
    assert load_artifact(folder / f"half{suffix}").spec.precision == "fp16"


def test_half_precision_onnx_computes_in_half_and_runs_at_any_batch(made):
    folder, model, _ = made
    proto = onnx.load(folder / "half.onnx")
    large = {tensor.data_type for tensor in proto.graph.initializer if np.prod(tensor.dims) > 100}
    assert large == {onnx.TensorProto.FLOAT16}
    session = onnxruntime.InferenceSession(folder / "half.onnx", providers=["CPUExecutionProvider"])
    batch = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"image": batch.numpy()})[0], model(batch), atol=0.02)


def copy_package(folder: Path, tmp_path: Path) -> Path:
    """s1.mlpackage without its certificate, to be damaged."""
    return Path(shutil.copytree(folder / "s1.mlpackage", tmp_path / "s1.mlpackage"))


def edit(package: Path, change) -> None:
    """Changes a package's program."""
    from coremltools.proto import Model_pb2

    path = next(package.rglob("*.mlmodel"))
    proto = Model_pb2.Model.FromString(path.read_bytes())
    change(proto)
    path.write_bytes(proto.SerializeToString())


def swap_colors(proto) -> None:
    proto.description.input[0].type.imageType.colorSpace = 30  # BGR


def scale_again(proto) -> None:
    """The first constant that a value is multiplied or normalized by."""
    main = proto.mlProgram.functions["main"]
    for op in main.block_specializations[main.opset].operations:
        values = op.attributes["val"].immediateValue.tensor.floats.values if op.type == "const" else ()
        if len(values) == 1 and 0 < values[0] < 0.01:
            values[0] *= 1.1
            return
    raise AssertionError("no such constant")


def one_weight(package: Path) -> None:
    """A weight among the first convolution's loses its sign."""
    path = next(package.rglob("weight.bin"))
    content = bytearray(path.read_bytes())
    weights = np.frombuffer(content, dtype=np.float32)[64:200]  # behind the file's own header
    weights[np.where(np.abs(weights) < 1, np.abs(weights), 0).argmax()] *= -1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def accepted(made, tmp_path_factory):
    """Whether s1.mlpackage is accepted without its certificate."""
    folder, _, _ = made
    package = copy_package(folder, tmp_path_factory.mktemp("accepted"))
    return run(["verify", str(package), "--model", "tiny_vit", "--checkpoint", f"{folder}/s1.safetensors"])["passed"]


@pytest.mark.parametrize("damage", [swap_colors, scale_again, one_weight])
def test_coreml_package_that_was_damaged_is_found_out(made, accepted, tmp_path, damage):
    folder, _, _ = made
    assert accepted
    package = copy_package(folder, tmp_path)
    options = ["verify", str(package), "--model", "tiny_vit", "--checkpoint", f"{folder}/s1.safetensors"]
    damage(package) if damage is one_weight else edit(package, damage)
    with pytest.raises(CheckFailed, match="exceeds its tolerance"):
        run(options)


def test_file_that_says_another_normalization_is_found_out(made, tmp_path):
    folder, _, _ = made
    proto = onnx.load(folder / "s1.onnx")
    (said,) = [prop for prop in proto.metadata_props if prop.key == "shvit.spec"]
    said.value = json.dumps({**json.loads(said.value), "mean": [0.5, 0.5, 0.5]})
    onnx.save(proto, tmp_path / "s1.onnx")
    with pytest.raises(CheckFailed, match="exceeds its tolerance"):
        run(["verify", f"{tmp_path}/s1.onnx", "--model", "tiny_vit", "--checkpoint", f"{folder}/s1.safetensors"])


def test_file_that_says_other_outputs_than_it_has_is_refused(made, tmp_path):
    folder, _, _ = made
    proto = onnx.load(folder / "s1.onnx")
    (said,) = [prop for prop in proto.metadata_props if prop.key == "shvit.spec"]
    for outputs in (["stride_16"], [3], "logits", []):
        said.value = json.dumps({**json.loads(said.value), "outputs": outputs})
        onnx.save(proto, tmp_path / "s1.onnx")
        with pytest.raises(InputError, match=r"says that it gives|its description of its input") as error:
            load_artifact(tmp_path / "s1.onnx")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["s1.onnx", "s1.mlpackage"])
def test_changed_byte_is_noticed_by_the_certificate(made, tmp_path, name):
    folder, _, _ = made
    (shutil.copytree if name.endswith("package") else shutil.copy)(folder / name, tmp_path / name)
    shutil.copy(folder / f"{name}.certificate.json", tmp_path)
    options = ["verify", f"{tmp_path}/{name}", "--model", "tiny_vit", "--checkpoint", f"{folder}/s1.safetensors"]
    assert run(options)["passed"]
    file = tmp_path / name if name == "s1.onnx" else next((tmp_path / name).rglob("weight.bin"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckFailed, match="has changed since it was certified"):
        run(options)
    (tmp_path / f"{name}.certificate.json").write_text(
        json.dumps({"format_version": 1, "artifact": "b", "artifact_sha256": "0"})
    )
    with pytest.raises(InputError, match="is the certificate of another file, b"):
        run(options)
    (tmp_path / f"{name}.certificate.json").write_text("{")
    with pytest.raises(InputError, match="not a readable certificate"):
        run(options)


def test_accuracy_of_a_package_is_that_of_its_model(made, tmp_path):
    folder, _, _ = made
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (tmp_path / str(label)).mkdir()
        for index in range(2):
            Image.fromarray(rng.integers(0, 255, (80, 70, 3), np.uint8)).save(tmp_path / str(label) / f"{index}.png")
    source = ["--model", "tiny_vit", "--checkpoint", f"{folder}/s1.safetensors", "--img-size", "64"]
    figures = [
        run(["eval", "--data", str(tmp_path), *options])
        for options in (source, ["--artifact", f"{folder}/s1.mlpackage"], ["--artifact", f"{folder}/s1.onnx"])
    ]
    assert figures[1]["per_class"] == figures[0]["per_class"] == figures[2]["per_class"]
    assert figures[1]["loss"] == pytest.approx(figures[0]["loss"], abs=1e-4)


def test_verify_accepts_the_right_weights_and_refuses_others(made, tmp_path):
    folder, model, _ = made
    options = ["verify", f"{folder}/s1.onnx", "--model", "tiny_vit"]
    assert run([*options, "--checkpoint", f"{folder}/s1.safetensors"])["passed"]
    state = model.state_dict()
    state["stages.2.blocks.0.ffn.m.pw2.bn.bias"] = state["stages.2.blocks.0.ffn.m.pw2.bn.bias"] + 0.05
    write_checkpoint(state, tmp_path / "other.safetensors")
    other = ["--checkpoint", f"{tmp_path}/other.safetensors"]
    with pytest.raises(CheckFailed, match="was made from another checkpoint"):
        run([*options, *other])
    shutil.copy(folder / "s1.onnx", tmp_path)  # without its certificate the outputs are what tells
    with pytest.raises(CheckFailed, match="exceeds its tolerance") as failure:
        run(["verify", f"{tmp_path}/s1.onnx", *other, "--model", "tiny_vit"])
    assert failure.value.result["passed"] is False


def test_export_leaves_nothing_behind_when_the_check_fails(made, tmp_path, monkeypatch):
    from shvit.export.backends import onnx as exporter

    folder, _, _ = made

    def broken(model, path, *rest, **options):
        write(model, path, *rest, **options)
        proto = onnx.load(path)
        weight = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("head.weight"))
        values = np.float32(1.01) * onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(proto, path)

    write = exporter.write_onnx
    monkeypatch.setattr(exporter, "write_onnx", broken)
    (tmp_path / "out").mkdir()
    options = ["export", "onnx", "--model", "tiny_vit", "--checkpoint", f"{folder}/s1.safetensors"]
    with pytest.raises(CheckFailed, match="exceeds its tolerance"):
        run([*options, "--img-size", "64", "--dynamic-batch", "--output", f"{tmp_path}/out/s1.onnx"])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("kind", "suffix"), [("onnx", ".onnx"), ("coreml", ".mlpackage")])
@pytest.mark.parametrize("blocked", ["the artifact", "its certificate"])
def test_output_of_the_wrong_kind_is_refused_before_any_work(tmp_path, monkeypatch, kind, suffix, blocked):
    monkeypatch.setattr("shvit.export.source.open_weights", None)
    output = tmp_path / f"s1{suffix}"
    target = output if blocked == "the artifact" else output.with_name(f"s1{suffix}.certificate.json")
    target.write_text("") if target.suffix == ".mlpackage" else target.mkdir()
    with pytest.raises(InputError, match=r"is a (file|folder); choose another name") as error:
        run(["export", kind, "--model", "shvit_s1", "--output", str(output)])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("kind", "suffix", "extra"), [("onnx", ".onnx", ["--dynamic-batch"]), ("coreml", ".mlpackage", [])]
)
def test_no_certificate_stays_without_its_artifact(made, tmp_path, monkeypatch, kind, suffix, extra):
    folder, _, _ = made
    rename = Path.replace

    def refuse(path, target):
        if target.suffix == suffix:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    options = ["export", kind, "--model", "tiny_vit", "--checkpoint", f"{folder}/s1.safetensors", "--img-size", "64"]
    with pytest.raises(InputError, match="cannot be written: Device or resource busy"):
        run([*options, *extra, "--output", f"{tmp_path}/s1{suffix}"])
    assert list(tmp_path.iterdir()) == []


def test_peers_of_timm_go_through_the_same_code(tmp_path):
    source = ["--model", "test_efficientnet", "--img-size", "64"]
    result = run(["export", "onnx", *source, "--output", f"{tmp_path}/m.onnx"])
    assert result["certificate"]["passed"]
    assert "BatchNormalization" not in operators(load_onnx(tmp_path / "m.onnx"))


@register_model
def tiny_gray(pretrained: bool = False, **kwargs) -> nn.Module:
    """A tiny SHViT of one channel and two classes."""
    return timm.create_model("shvit_s1", **{**TINY, "depth": (1, 1, 1), "num_classes": 2, "in_chans": 1, **kwargs})


def test_model_of_one_channel_sees_gray_levels(tmp_path):
    import coremltools as ct

    model = timm.create_model("tiny_gray").eval()
    randomize_norms(model)
    spec = Spec.of("tiny_gray", model, 64)
    settle(model, spec.normalize(read_pixels(sample_images(None), spec)))
    write_checkpoint(model.state_dict(), tmp_path / "gray.pth")
    source = ["--model", "tiny_gray", "--checkpoint", f"{tmp_path}/gray.pth", "--img-size", "64"]
    assert run(["export", "onnx", *source, "--output", f"{tmp_path}/gray.onnx"])["certificate"]["passed"]
    run(["export", "coreml", *source, "--output", f"{tmp_path}/gray.mlpackage"])
    package = ct.models.MLModel(f"{tmp_path}/gray.mlpackage", skip_model_load=True)
    color_space = package.get_spec().description.input[0].type.imageType.colorSpace
    assert color_space == ct.proto.FeatureTypes_pb2.ImageFeatureType.GRAYSCALE

    spec = load_artifact(tmp_path / "gray.onnx").spec
    assert spec.shape == (1, 64, 64)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    gray = np.asarray(image.convert("L").resize((73, 73), Image.Resampling.BICUBIC), dtype=np.float64)[4:68, 4:68]
    mean, std = (adapt_to_chs(value, 1) for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    np.testing.assert_allclose(spec.transform()(image)[0], (gray / 255 - mean) / std, atol=1e-5)

    for name, value in (("black", 0), ("white", 255)):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (80, 80), (value,) * 3).save(tmp_path / "data" / name / "a.png")
    figures = [
        run(["eval", "--data", f"{tmp_path}/data", *options])
        for options in (source, ["--artifact", f"{tmp_path}/gray.onnx"])
    ]
    assert figures[0]["n"] == 2
    assert figures[0]["top1"] == figures[1]["top1"]


def test_model_of_more_channels_than_images_have_is_refused(tmp_path):
    write_checkpoint(timm.create_model("shvit_s1", in_chans=4).state_dict(), tmp_path / "four.pth")
    with pytest.raises(InputError, match="takes 4 channels, and nothing tells their mean and standard deviation"):
        open_model("shvit_s1", tmp_path / "four.pth")


def test_verify_takes_the_users_images_and_names_a_corrupt_one(made, tmp_path):
    folder, _, _ = made
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (80, 100, 3), dtype=np.uint8)).save(tmp_path / name)
    options = ["verify", f"{folder}/s1.onnx", "--model", "tiny_vit", "--checkpoint", f"{folder}/s1.safetensors"]
    assert run([*options, "--images", str(tmp_path)])["images"] == 2
    (tmp_path / "c.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:300])
    with pytest.raises(InputError, match=r"c\.jpg"):
        run([*options, "--images", str(tmp_path)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export", "onnx", "--model", "shvit_s5", "--output", "x.onnx"], "unknown model 'shvit_s5'"),
        (["export", "onnx", "--model", "shvit_s1", "--output", "x.mlpackage"], "must end in .onnx"),
        (
            ["export", "onnx", "--model", "shvit_s1", "--output", "x.onnx", "--img-size", "99999"],
            "not an image size; give 1 to",
        ),
        (["export", "onnx", "--model", "shvit_s1", "--output", "x.onnx", "--checkpoint", "no.pth"], "no such file"),
        (["verify", "no.onnx", "--model", "shvit_s1"], "no such file"),
        (["verify", "x.mnn", "--model", "shvit_s1"], "unknown artifact '.mnn'"),
        (["verify", "x.mlpackage", "--model", "shvit_s1"], "not a Core ML package"),
        (["eval", "--data", "."], "give --checkpoint, --artifact, or --model and"),
        (["eval", "--data", ".", "--checkpoint", "no.pth", "--batch-size", "0"], "--batch-size 0"),
        (["bench", "--runtimes", "abacus"], "unknown runtime 'abacus'"),
        (["bench", "--threads", "0"], "must be 1 or more"),
    ],
)
def test_unusable_input_is_one_clear_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        run(argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_foreign_and_broken_onnx_files_are_refused(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not onnx at all")
    with pytest.raises(InputError, match=r"broken\.onnx"):
        run(["verify", f"{tmp_path}/broken.onnx", "--model", "shvit_s1"])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["image"], ["logits"])],
        "foreign",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
    )
    foreign = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match="not written by `shvit export`"):
        run(["verify", f"{tmp_path}/foreign.onnx", "--model", "shvit_s1"])
