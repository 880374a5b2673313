"""Files of every format against PyTorch, ONNX Runtime and OpenVINO."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.errors import CheckFailed, InputError
from shvit.export import pipeline as formats
from shvit.export import verdict
from shvit.export.analysis import comparison
from shvit.export.analysis.comparison import Row
from shvit.export.backends.registry import BACKENDS
from shvit.export.formats.openvino import core
from shvit.export.labels import find_labels
from shvit.export.spec import Spec, randomize_norms
from shvit.weights.imagenet import imagenet_names
from tests.conftest import settle

CLASSES = 3
LOOSE = verdict.Tolerance(snr_db=0, max_rel_error=10, top1_agreement=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Options that name a tiny SHViT with three classes, the model, and images in class folders."""
    folder = tmp_path_factory.mktemp("formats")
    torch.manual_seed(5)
    model = timm.create_model("tiny_vit", num_classes=CLASSES)
    randomize_norms(model)
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / "images" / f"class{label}").mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 255, (12, 12, 3), np.uint8)
            image = Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC)
            image.save(folder / "images" / f"class{label}" / f"{index}.png")
    settle(model, normalized(folder / "images", model))
    write_checkpoint(model.state_dict(), folder / "tiny.safetensors")
    options = ["--model", "tiny_vit", "--checkpoint", f"{folder}/tiny.safetensors", "--img-size", "64"]
    return [*options, "--images", f"{folder}/images"], model.eval(), folder / "images"


def pixels_of(folder: Path, model) -> torch.Tensor:
    transform = Spec.of("tiny_vit", model, 64).transform(normalize=False)
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))])


def normalized(folder: Path, model) -> torch.Tensor:
    transform = Spec.of("tiny_vit", model, 64).transform()
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))])


def test_raw_pixels_become_probabilities_inside_the_file(source, tmp_path):
    options, model, images = source
    extra = ["--raw-pixels", "--softmax", "--dynamic-batch", "--output", f"{tmp_path}/p.onnx"]
    certificate = run(["export", "onnx", *options, *extra])["certificate"]
    session = onnxruntime.InferenceSession(tmp_path / "p.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert session.get_outputs()[0].name == "probabilities"
    pixels = pixels_of(images, model).permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        expected = model(normalized(images, model)).softmax(1)
    np.testing.assert_allclose(session.run(None, {"image": pixels})[0], expected, atol=1e-5)
    assert certificate["spec"]["outputs"] == ("probabilities",)
    assert certificate["gray_levels"] < 0.01


@pytest.mark.parametrize(("kind", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml")])
def test_feature_maps_are_the_models_at_every_stride(source, tmp_path, kind, suffix):
    options, model, images = source
    output = tmp_path / f"f{suffix}"
    certificate = run(["export", kind, *options, "--features", "--output", str(output)])["certificate"]
    assert list(certificate["outputs"]) == [f"stride_{stride} at 64 px" for stride in (16, 32, 64)]
    assert all(each["snr_db"] > 90 for each in certificate["outputs"].values())
    batch = normalized(images, model)[:1]
    with torch.no_grad():
        expected = model.forward_intermediates(batch, intermediates_only=True)
    if kind == "onnx":
        session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
        found = session.run(["stride_16", "stride_32", "stride_64"], {"image": batch.numpy()})
    else:
        compiled = core().compile_model(output, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result = compiled(batch.numpy())
        found = [result[f"stride_{stride}"] for stride in (16, 32, 64)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert run(["verify", str(output), *options[:4], *options[6:]])["passed"]
    with pytest.raises(InputError, match="gives feature maps"):
        run(["eval", "--artifact", str(output), "--data", str(images)])


def test_openvino_ir_gives_the_models_answers_and_both_files_are_certified(source, tmp_path):
    options, model, images = source
    output = tmp_path / "m.xml"
    certificate = run(["export", "openvino", *options, "--dynamic-batch", "--output", str(output)])["certificate"]
    compiled = core().compile_model(output, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    batch = normalized(images, model)
    with torch.no_grad():
        np.testing.assert_allclose(compiled(batch.numpy())[0], model(batch), rtol=1e-4, atol=1e-4)
    assert certificate["runtime"] == "openvino"
    assert certificate["artifact_bytes"] == output.stat().st_size + (tmp_path / "m.bin").stat().st_size
    assert certificate["worst_layer_snr_db"] > 90
    arguments = ["verify", str(output), *options[:4], *options[6:]]
    assert run(arguments)["passed"]
    evaluated = run(["eval", "--artifact", str(output), "--data", str(images)])
    assert evaluated["top1"] == pytest.approx(certificate["accuracy"])

    weights = bytearray((tmp_path / "m.bin").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "m.bin").write_bytes(weights)
    with pytest.raises(CheckFailed, match="has changed since it was certified"):
        run(arguments)
    (tmp_path / "m.bin").unlink()
    with pytest.raises(InputError, match=r"m\.bin: no such file"):
        run(arguments)
    (tmp_path / "m.bin").write_bytes(b"")
    output.write_text("<net>")
    with pytest.raises(CheckFailed, match="has changed since it was certified"):
        run(arguments)
    (tmp_path / "m.xml.certificate.json").unlink()
    with pytest.raises(InputError, match="not a readable OpenVINO IR"):
        run(arguments)


def test_openvino_in_half_precisions_halves_the_weights(source, tmp_path):
    options, model, _ = source
    sizes = {}
    for precision in ("fp16", "bf16"):
        output = tmp_path / f"{precision}.xml"
        extra = ["--precision", precision, "--dynamic-batch", "--output", str(output)]
        certificate = run(["export", "openvino", *options, *extra])["certificate"]
        assert certificate["passed"]
        sizes[precision] = output.with_suffix(".bin").stat().st_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sizes["bf16"] == sizes["fp16"] < 2.1 * parameters


def test_labels_are_written_into_the_file_and_folders_of_classes_give_accuracy(source, tmp_path):
    options, model, images = source
    (tmp_path / "labels.txt").write_text("class0\nclass1\nclass2\n")
    extra = ["--labels", f"{tmp_path}/labels.txt", "--dynamic-batch", "--output", f"{tmp_path}/m.onnx"]
    certificate = run(["export", "onnx", *options, *extra])["certificate"]
    said = {prop.key: prop.value for prop in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(said["shvit.labels"]) == ["class0", "class1", "class2"]
    targets = torch.arange(CLASSES).repeat_interleave(4)
    with torch.no_grad():
        expected = 100 * (model(normalized(images, model)).argmax(1) == targets).double().mean().item()
    assert certificate["model_accuracy"] == certificate["accuracy"] == pytest.approx(expected)


def test_labels_are_imagenets_only_where_that_is_known_and_each_is_unique(tmp_path):
    names = imagenet_names()
    assert len(set(names)) == 1000
    assert names[0].startswith("tench")
    assert find_labels(None, 1000) == []
    for text, message in (
        ("a\nb\n", "has 2 lines"),
        ("a\na\nb\n", "'a' stands there twice"),
        ("a\n\nb\n", "line 2 is empty"),
    ):
        (tmp_path / "labels.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            find_labels(tmp_path / "labels.txt", 3)
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        find_labels(tmp_path / "labels.txt", 3)
    with pytest.raises(InputError, match="no such file"):
        find_labels(tmp_path / "none.txt", 3)


@pytest.mark.parametrize(("kind", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml")])
def test_int8_is_a_quarter_of_the_size_and_near_the_model(source, tmp_path, monkeypatch, kind, suffix):
    """Random weights leave more noise than trained ones, so the bound is another."""
    monkeypatch.setitem(verdict.TOLERANCES, "int8", LOOSE)
    options, *_, images = source
    extra = ["--precision", "int8", "--calibration", str(images), "--output", f"{tmp_path}/q{suffix}"]
    certificate = run(["export", kind, *options, *extra, "--dynamic-batch"])["certificate"]
    assert certificate["snr_db"] > 8
    assert certificate["spec"]["excluded_layers"] == (("patch_embed.0",) if kind == "onnx" else ())  # see tuning.py
    weights = (tmp_path / "q.onnx" if kind == "onnx" else tmp_path / "q.bin").stat().st_size
    assert weights < 0.35 * 4 * sum(p.numel() for p in timm.create_model("shvit_s1", num_classes=CLASSES).parameters())
    assert run(["verify", f"{tmp_path}/q{suffix}", *options[:4], *options[6:]])["snr_db"] == pytest.approx(
        certificate["snr_db"], abs=0.1
    )


def test_as_few_layers_as_needed_are_kept_out_of_int8(source, tmp_path, monkeypatch):
    options, *_, images = source
    extra = ["--precision", "int8", "--calibration", str(images), "--output"]
    monkeypatch.setitem(verdict.TOLERANCES, "int8", LOOSE)
    whole = run(["export", "onnx", *options, *extra, f"{tmp_path}/whole.onnx"])["certificate"]
    monkeypatch.setitem(verdict.TOLERANCES, "int8", verdict.Tolerance(whole["snr_db"] + 0.3, 10, 0))
    tried = []
    certify = formats.certify
    monkeypatch.setattr(
        formats,
        "certify",
        lambda artifact, *args: tried.append(artifact.spec.excluded_layers) or certify(artifact, *args),
    )
    mixed = run(["export", "onnx", *options, *extra, f"{tmp_path}/mixed.onnx"])["certificate"]
    kept = mixed["spec"]["excluded_layers"]
    assert len(set(tried)) == len(tried) >= 2  # no file is written and run twice
    assert 2 <= len(kept) <= 40  # the stem's first convolution is always among them
    assert 0 < mixed["excluded_macs"] < 90
    assert mixed["snr_db"] >= whole["snr_db"] + 0.3
    made_by = {name: node for node in onnx.load(tmp_path / "mixed.onnx").graph.node for name in node.output}
    layers = {node.name: node for node in made_by.values() if node.op_type in ("Conv", "Gemm")}
    assert {name for name, node in layers.items() if node.input[1] not in made_by} == set(kept)
    assert set(layers) > set(kept)

    monkeypatch.setitem(verdict.TOLERANCES, "int8", verdict.Tolerance(150, 10, 0))
    monkeypatch.setattr(formats.Source, "noise", lambda *_: dict.fromkeys(kept[:2], 1.0))
    with pytest.raises(CheckFailed, match="exceeds its tolerance"):
        run(["export", "onnx", *options, *extra, f"{tmp_path}/out/never.onnx"])
    assert list((tmp_path / "out").iterdir()) == []


def test_int8_wants_trained_weights_and_images(source, tmp_path):
    options, *_, images = source
    (tmp_path / "empty").mkdir()
    (tmp_path / "few").mkdir()
    shutil.copy(images / "class0" / "0.png", tmp_path / "few")
    command = ["export", "onnx", "--output", f"{tmp_path}/out/q.onnx", "--precision", "int8"]
    for extra, message in (
        ([*options, "--calibration", f"{tmp_path}/empty"], "no images in it"),
        ([*options, "--calibration", f"{tmp_path}/few"], "too few to learn the ranges"),
        ([*options, "--calibration", f"{tmp_path}/none"], "no such folder"),
        (["--model", "shvit_s1"], "needs trained weights"),
        ([*options, "--precision", "int4"], "int4"),
    ):
        with pytest.raises(InputError, match=message) as error:
            run([*command, *extra])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_worst_layer_is_the_one_that_was_damaged(source, tmp_path):
    options, *_ = source
    run(["export", "onnx", *options, "--dynamic-batch", "--output", f"{tmp_path}/m.onnx"])
    proto = onnx.load(tmp_path / "m.onnx")
    (head,) = [node for node in proto.graph.node if node.name == "head"]
    (weight,) = [tensor for tensor in proto.graph.initializer if tensor.name == head.input[1]]
    weight.CopyFrom(onnx.numpy_helper.from_array(1.05 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(proto, tmp_path / "damaged.onnx")
    with pytest.raises(CheckFailed, match="worst layer head") as failure:
        run(["verify", f"{tmp_path}/damaged.onnx", *options[:4], *options[6:]])
    assert failure.value.result["worst_layer"] == "head"
    assert 20 < failure.value.result["worst_layer_snr_db"] < 32


def test_all_formats_come_with_a_table_of_which_a_failed_one_has_a_row_but_no_file(source, tmp_path, monkeypatch):
    options, *_ = source
    monkeypatch.setattr(
        comparison, "ROWS", ((BACKENDS["onnx"], "fp32"), (BACKENDS["openvino"], "bf16"), (BACKENDS["coreml"], "fp16"))
    )
    monkeypatch.setitem(verdict.TOLERANCES, "bf16", verdict.Tolerance(199, 1e-9, 100))
    result = run(["export", "all", *options, "--rounds", "2", "--output", str(tmp_path)])
    assert result["passed"] == {"tiny_vit-fp32.onnx": True, "tiny_vit-bf16.xml": False, "tiny_vit-fp16.mlpackage": True}
    assert not (tmp_path / "tiny_vit-bf16.xml").exists()
    assert (tmp_path / "tiny_vit-fp32.onnx").exists()
    lines = (tmp_path / "formats.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "PyTorch fp32",
        "ONNX fp32",
        "OpenVINO bf16",
        "Core ML fp16",
    ]
    assert lines[4].split("|")[-2].strip() == "no"
    assert len({line.count("|") for line in lines}) == 1
    head, _, _, timed, *untimed = ([cell.strip() for cell in line.split("|")] for line in lines)
    milliseconds = head.index("ms")
    assert float(timed[milliseconds]) > 0
    assert {row[milliseconds] for row in untimed} == {""}  # one has no file, the other no runtime here
    latency = json.loads((tmp_path / "formats.json").read_text())["tiny_vit-fp32.onnx"]["latency"]
    assert (latency["runtime"], latency["rounds"]) == ("onnxruntime", 2)


def test_table_leaves_out_formats_that_are_not_installed(source, tmp_path, monkeypatch, capsys):
    options, *_ = source
    monkeypatch.setattr(comparison, "ROWS", ((BACKENDS["onnx"], "fp32"), (BACKENDS["openvino"], "fp32")))
    monkeypatch.setitem(sys.modules, "openvino", None)
    result = run(["export", "all", *options, "--rounds", "0", "--output", str(tmp_path)])
    assert result["passed"] == {"tiny_vit-fp32.onnx": True}
    line = "OpenVINO is left out: this needs the package openvino; install it with: pip install 'shvit[openvino]'"
    assert line in " ".join(capsys.readouterr().out.split())


def test_table_has_a_row_for_what_overflowed_and_for_what_is_undecided():
    figures = {"accuracy": None, "model_accuracy": 50.0, "top1_agreement": 99.0, "snr_db": 70.0, "excluded_macs": 0.0}
    undecided = {**figures, "passed": None, "artifact_bytes": 1e6, "spec": {"excluded_layers": []}}
    overflowed = {"passed": False, "overflow": "head", "largest_values": {}}
    rows = [Row(f"ONNX {number}", BACKENDS["onnx"], each) for number, each in enumerate((overflowed, undecided))]
    lines = comparison.markdown(rows).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["", "no", "undecided"]
    assert "50.00" in lines[0]
    emulated = replace(rows[1], certificate={**undecided, "arm64": {"snr_db": 69.5}})
    assert comparison.markdown([emulated]).splitlines()[-1].split("|")[5].strip() == "69.5"


def test_file_that_its_runtime_does_not_take_is_named_as_the_user_does(source, tmp_path, monkeypatch):
    def refuse(path, **_):
        raise InputError(f"{path}: cannot be opened")

    monkeypatch.setattr(formats, "load_artifact", refuse)
    with pytest.raises(InputError) as error:
        run(["export", "onnx", *source[0], "--output", f"{tmp_path}/mine.onnx"])
    assert str(error.value) == f"{tmp_path}/mine.onnx: cannot be opened"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "int8, whose ranges are learned, needs trained weights; give --checkpoint"),
        (["--checkpoint", "{checkpoint}", "--calibration", "{few}"], "images are too few to learn the ranges"),
    ],
)
def test_table_that_cannot_be_made_is_refused_before_anything_is_written(source, tmp_path, options, message):
    (_, model, _, checkpoint, *_), _, images = source
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(next(images.rglob("*.png")), few)
    words = [word.format(checkpoint=checkpoint, few=few) for word in options]
    with pytest.raises(InputError, match=message):
        run(["export", "all", "--model", model, *words, "--img-size", "64", "--output", str(tmp_path / "all")])
    assert not (tmp_path / "all").exists()


def test_format_that_lacks_an_operation_gets_a_row_without_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "ROWS", ((BACKENDS["ncnn"], "fp32"),))
    result = run(["export", "all", "--model", "test_vit", "--output", str(tmp_path)])
    assert result["passed"] == {"test_vit-fp32.ncnn.param": False}
    record = json.loads((tmp_path / "formats.json").read_text())["test_vit-fp32.ncnn.param"]
    assert "has operations that ncnn lacks: Tensor.reshape" in record["error"]
    last = (tmp_path / "formats.md").read_text().splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[1:-1]] == ["ncnn fp32", "", "", "", "", "", "no"]


def test_coreml_classifier_for_two_sizes_evaluates_as_its_model(source, tmp_path):
    options, _, images = source
    (tmp_path / "labels.txt").write_text("class0\nclass1\nclass2\n")
    extra = ["--classifier", "--labels", f"{tmp_path}/labels.txt", "--other-sizes", "64x96"]
    output = tmp_path / "m.mlpackage"
    certificate = run(["export", "coreml", *options, *extra, "--output", str(output)])["certificate"]
    assert list(certificate["outputs"]) == ["probabilities at 64 px", "probabilities at 64x96 px"]
    assert certificate["worst_layer_snr_db"] > 60
    assert run(["verify", str(output), *options[:4], *options[6:]])["passed"] is not False
    with pytest.raises(InputError, match="needs macOS" if sys.platform != "darwin" else "never"):
        run(["verify", str(output), *options[:4], "--runtime", "coreml"])
    of_model = run(["eval", "--data", str(images), *options[:6]])
    of_file = run(["eval", "--data", str(images), "--artifact", str(output)])
    assert of_file["per_class"] == of_model["per_class"]
    assert of_file["loss"] == pytest.approx(of_model["loss"], abs=1e-3)


def test_core_ml_itself_is_given_the_same_images(source, tmp_path, monkeypatch):
    """Core ML is part of macOS; elsewhere our evaluator predicts in its place."""
    import coremltools

    from shvit.export.backends.registry import load_artifact
    from shvit.export.mil.program import Package

    class Native:
        def __init__(self, path):
            self.package = Package(Path(path))

        def predict(self, given):
            return {name: value.numpy() for name, value in self.package(**given).items()}

    options, model, images = source
    output = tmp_path / "m.mlpackage"
    run(["export", "coreml", *options, "--output", str(output)])
    monkeypatch.setattr(sys, "platform", "darwin")
    read = coremltools.models.MLModel
    monkeypatch.setattr(
        coremltools.models, "MLModel", lambda path, **rest: read(path, **rest) if rest else Native(path)
    )
    artifact = load_artifact(output, native=True)
    pixels = pixels_of(images, model)[:2]
    assert artifact.runtime == "coreml"
    torch.testing.assert_close(artifact(pixels), load_artifact(output)(pixels))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("onnx", ["--features", "--softmax"], "--softmax does not apply"),
        ("coreml", ["--precision", "w8a8", "--other-sizes", "96"], "takes one size"),
        ("coreml", ["--other-sizes", "64"], "give each size once"),
        ("coreml", ["--other-sizes", "0"], "0 is not an image size; give 1 to 4096 px"),
        ("coreml", ["--other-sizes", "64x96", "64x96"], "give each size once"),
        ("coreml", ["--classifier"], "give --labels"),
    ],
)
def test_options_that_exclude_each_other_are_refused(source, tmp_path, kind, options, message):
    suffix = ".onnx" if kind == "onnx" else ".mlpackage"
    with pytest.raises(InputError, match=message):
        run(["export", kind, *source[0], *options, "--output", f"{tmp_path}/m{suffix}"])
    assert list(tmp_path.iterdir()) == []
