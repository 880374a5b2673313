"""The Python functions of `shvit.export`, against the commands and the model itself."""

from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import shvit.export
from shvit.certificate import read_certificate
from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.errors import CheckFailed, InputError
from shvit.export import benchmark, export_model, load_artifact, verify_artifact
from shvit.export.images import read_pixels, sample_images
from shvit.export.spec import Spec, randomize_norms
from tests.conftest import settle

CLASSES = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny SHViT, its checkpoint, and its ONNX file, exported from the checkpoint by its name."""
    folder = tmp_path_factory.mktemp("api")
    torch.manual_seed(3)
    model = timm.create_model("tiny_vit", num_classes=CLASSES)
    randomize_norms(model)
    spec = Spec.of("tiny_vit", model, 64)
    settle(model, spec.normalize(read_pixels(sample_images(None), spec)))
    write_checkpoint(model.state_dict(), folder / "tiny.safetensors")
    certificate = export_model(
        "onnx", "tiny_vit", folder / "m.onnx", checkpoint=folder / "tiny.safetensors", img_size=64, raw_pixels=True
    )
    return folder, model.eval(), certificate


def test_export_is_that_of_the_command(made, tmp_path):
    folder, _, certificate = made
    options = ["--model", "tiny_vit", "--checkpoint", f"{folder}/tiny.safetensors", "--img-size", "64"]
    command = run(["export", "onnx", *options, "--raw-pixels", "--output", f"{tmp_path}/m.onnx"])["certificate"]
    assert certificate.passed
    assert asdict(certificate) == command
    assert read_certificate(folder / "m.onnx").artifact_sha256 == certificate.artifact_sha256


def test_loaded_artifact_takes_images_arrays_and_tensors(made):
    folder, model, _ = made
    artifact = load_artifact(str(folder / "m.onnx"))
    images = [Image.open(file.path) for file in sample_images(None, limit=3)]
    transform = artifact.spec.transform()
    with torch.no_grad():
        expected = model(torch.stack([transform(image.convert("RGB")) for image in images]))
    pixels = read_pixels(sample_images(None, limit=3), artifact.spec)
    for given in (images, pixels, pixels.numpy()):
        torch.testing.assert_close(artifact(given), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(artifact(images[0]), expected[:1], rtol=1e-3, atol=1e-3)


def test_verification_names_what_is_wrong_and_returns_what_exceeds_its_tolerance(made, tmp_path):
    folder, model, certificate = made
    again = verify_artifact(folder / "m.onnx")
    assert (again.passed, again.snr_db) == (True, certificate.snr_db)
    state = {name: value * 1.01 if name == "head.l.weight" else value for name, value in model.state_dict().items()}
    write_checkpoint(state, tmp_path / "other.safetensors")
    with pytest.raises(CheckFailed, match="was made from another checkpoint"):
        verify_artifact(folder / "m.onnx", checkpoint=tmp_path / "other.safetensors")
    (tmp_path / "m.onnx").write_bytes((folder / "m.onnx").read_bytes())
    other = verify_artifact(tmp_path / "m.onnx", model="tiny_vit", checkpoint=tmp_path / "other.safetensors")
    assert other.passed is False


def test_model_in_memory_is_exported_with_the_weights_that_it_has(made, tmp_path):
    _, model, certificate = made
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = export_model("onnx", model, tmp_path / "m.onnx", img_size=64, raw_pixels=True)
    assert result.passed
    assert (result.random_weights, result.checkpoint_sha256, result.spec.outputs) == (False, None, ("logits",))
    assert result.compared_layers == certificate.compared_layers
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "tflite"}, "unknown format 'tflite'; choose from onnx, openvino, coreml, litert, ncnn, executorch"),
        ({"precision": "bf16"}, "ONNX has no precision 'bf16'; choose from fp32, fp16, int8"),
        ({"output": "m.xml"}, "must end in .onnx"),
        ({"classifier": True}, "classifier"),
        ({"model": "no_such_model"}, "no_such_model"),
        ({"outputs": "features", "labels": "labels.txt"}, "--labels does not apply"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, changes, message):
    options = {"format": "onnx", "model": "tiny_vit", "output": "m.onnx", **changes}
    with pytest.raises(InputError, match=message) as error:
        export_model(**{**options, "output": tmp_path / options["output"]})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_benchmark_times_a_file(made, quick_machine):
    folder, *_ = made
    measured = benchmark([folder / "m.onnx"], [], rounds=1)
    (result,) = measured.results
    assert (result.model, result.runtime, result.img_size) == ("m.onnx", "onnxruntime", (64, 64))
    assert 0 < result.latency_ms_p50 < 1000


def test_public_names_are_those_of_the_documentation():
    for name in shvit.export.__all__:
        assert np.all([callable(getattr(shvit.export, name)), getattr(shvit.export, name).__doc__])
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = shvit.export.no_such_name
