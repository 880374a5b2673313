"""Models of five channels and of gray ones: every format with a certificate, evaluation, predictions, and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image

from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.errors import InputError
from shvit.export.backends.registry import BACKENDS, load_artifact
from shvit.export.images import read_pixels, sample_images
from shvit.export.predict.predictor import Predictor
from shvit.export.spec import Spec, open_model
from shvit.export.verify import Reference, preprocessing_faults
from shvit.weights.run_info import RunInfo
from tests.channels import CHANS, CLASSES, draw_bands
from tests.conftest import SMALL, create_tiny, settle

PX = 64
MEAN, STD = (0.0114,) * 4 + (0.0267,), (0.0066,) * 4 + (0.0167,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights of a tiny model of five channels of 12 bits in 16, and images in the same folder."""
    root = tmp_path_factory.mktemp("five")
    draw_bands(root / "data", counts=(4, 8))
    info = RunInfo("tiny_vit", CLASSES, PX, MEAN, STD, "bicubic", 1.0, "border", "uint16")
    model = create_tiny(num_classes=3, in_chans=CHANS)
    spec = Spec.of("tiny_vit", model, info=info)
    settle(model, spec.normalize(read_pixels(sample_images(root / "data", pixels=spec.pixels), spec)))
    write_checkpoint(model.state_dict(), root / "five.safetensors", info.metadata)
    return root


@pytest.fixture(scope="module")
def words(folder):
    return ["--checkpoint", f"{folder}/five.safetensors", "--images", f"{folder}/data"]


def pixels_by_hand(folder: Path) -> torch.Tensor:
    """One image of 40×44 as it is enlarged to 64 px: by torch's own interpolation, with a border of the mean."""
    import tifffile

    array = tifffile.imread(folder / "data" / "valid" / "wet" / "0.tif").astype("float32") / 65535
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(array)[None], (58, 64), mode="bicubic", antialias=True, align_corners=False
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return torch.nn.functional.pad((resized - mean) / std, (0, 0, 3, 3))


LONG = ("litert", "executorch")  # to convert


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in BACKENDS]
)
def test_every_format_holds_with_a_certificate(folder, words, tmp_path, name):
    output = tmp_path / f"m{BACKENDS[name].ending}"
    options = ["--tensor-input"] if name == "coreml" else []
    certificate = run(["export", name, *words, *options, "--output", str(output)])["certificate"]
    assert certificate["passed"]
    assert certificate["snr_db"] > 60
    assert (certificate["spec"]["in_chans"], certificate["spec"]["pixel_type"]) == (CHANS, "uint16")
    assert certificate["gray_levels"] < 0.1
    assert run(["verify", str(output), "--images", f"{folder}/data"])["passed"]
    checkpoint = run(["eval", "--checkpoint", f"{folder}/five.safetensors", "--data", f"{folder}/data"])
    artifact = run(["eval", "--artifact", str(output), "--data", f"{folder}/data"])
    assert checkpoint["n"] == artifact["n"] == 24
    assert artifact["top1"] == checkpoint["top1"]
    assert artifact["loss"] == pytest.approx(checkpoint["loss"], rel=1e-3)


def test_a_file_takes_what_the_run_was_given(folder, words, tmp_path):
    """ONNX Runtime on an image that was prepared without any of this code."""
    run(["export", "onnx", *words, "--output", f"{tmp_path}/m.onnx"])
    batch = pixels_by_hand(folder)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    logits = torch.from_numpy(session.run(None, {"image": batch.numpy()})[0])
    artifact = load_artifact(tmp_path / "m.onnx")
    file = sample_images(folder / "data" / "valid", pixels=artifact.spec.pixels)
    chosen = [each for each in file if each.path.parts[-2:] == ("wet", "0.tif")]
    torch.testing.assert_close(artifact(read_pixels(chosen, artifact.spec)), logits, atol=2e-3, rtol=1e-3)
    result = run(["predict", str(chosen[0].path), "--checkpoint", f"{folder}/five.safetensors"])
    found = dict(zip(result["predictions"][0]["labels"], result["predictions"][0]["probabilities"], strict=True))
    assert [found[name] for name in CLASSES] == pytest.approx(logits.softmax(1)[0].tolist(), abs=2e-3)


def test_int8_learns_its_ranges_from_such_images(folder, words, tmp_path):
    options = ["--precision", "int8", "--output", f"{tmp_path}/m.onnx"]
    with pytest.raises(InputError, match="0 images are too few to learn the ranges of int8 from; give --calibration"):
        run(["export", "onnx", *words, *options])
    draw_bands(tmp_path / "more", counts=(16, 16))
    certificate = run(["export", "onnx", *words, *options, "--calibration", f"{tmp_path}/more"])["certificate"]
    assert certificate["passed"] is not False


@pytest.mark.parametrize(
    "change", [{"pixel_type": "float32"}, {"mean": (0.0124,) * 4 + (0.0267,)}, {"crop_mode": "center"}]
)
def test_another_preprocessing_is_a_fault(folder, change):
    model, spec = open_model("tiny_vit", folder / "five.safetensors")
    reference = Reference(model, spec, sample_images(folder / "data", pixels=spec.pixels), "data")
    assert preprocessing_faults(spec, reference, {}) == (0.0, [])
    levels, faults = preprocessing_faults(replace(spec, **change), reference, {})
    assert faults[0].startswith(f"preprocessing: {next(iter(change))} is ")
    assert levels > 1


# --- predictions ------------------------------------------------------------------------------------------------------


def test_folders_and_arrays_are_predicted_alike(folder, tmp_path):
    import tifffile

    words = ["--checkpoint", f"{folder}/five.safetensors"]
    arrays = []
    for index in range(4):
        array = tifffile.imread(folder / "data" / "valid" / "wet" / f"{index}.tif")
        (tmp_path / "in").mkdir(exist_ok=True)
        np.save(tmp_path / "in" / f"{index}.npy", array.transpose(1, 2, 0))
        arrays.append(array)
    (tmp_path / "in" / "preview.png").touch()
    drawn = ["--draw", f"{tmp_path}/sheet.png"]
    predicted = run(["predict", str(tmp_path / "in"), *words, *drawn])["predictions"]
    tiffs = run(["predict", *(str(folder / "data/valid/wet" / f"{i}.tif") for i in range(4)), *words])["predictions"]
    assert [each["probabilities"] for each in predicted] == [each["probabilities"] for each in tiffs]
    assert len(predicted) == 4
    batch = Predictor(checkpoint=folder / "five.safetensors")({"image": [*arrays, arrays[0].astype("float32")]})
    assert batch["probabilities"][:4] == [each["probabilities"] for each in tiffs]
    assert batch["error"][4].startswith("holds float32, and the model was trained on uint16, which is scaled otherwise")
    assert Image.open(tmp_path / "sheet.png").size[0] > 100


def test_other_images_are_errors_of_their_lines(folder, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "rgb.png")
    np.save(tmp_path / "a.npy", np.zeros((40, 44, 4), "uint16"))
    good = folder / "data/valid/wet/0.tif"
    inputs = [str(tmp_path / "rgb.png"), str(tmp_path / "a.npy"), str(good)]
    result = run(["predict", *inputs, "--checkpoint", f"{folder}/five.safetensors"])
    errors = [each.get("error") for each in result["predictions"]]
    assert errors[0].startswith("has 3 channels (RGB), and the model takes 5")
    assert errors[1].startswith("an array of shape (40, 44, 4) for a model of 5 channels")
    assert errors[2] is None


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "onnx"], "the model takes 5 channels of uint16, and the bundled images are in RGB; give --images"),
        (["export", "onnx", "--images", "DATA", "--raw-pixels"], "tiny_vit takes 5 channels of uint16, and an input of "
         "pixels has 1 or 3 channels of 8 bits; leave out --raw-pixels"),
        (["export", "ncnn", "--images", "DATA", "--raw-pixels"], "leave out --raw-pixels"),
        (["export", "executorch", "--images", "DATA", "--raw-pixels"], "leave out --raw-pixels"),
        (["export", "coreml", "--images", "DATA"], "give --tensor-input"),
    ],
)  # fmt: skip
def test_inputs_of_pixels_are_refused_in_one_line(folder, tmp_path, command, message):
    ending = BACKENDS[command[1]].ending
    given = [word.replace("DATA", f"{folder}/data") for word in command]
    with pytest.raises(InputError, match=message) as error:
        run([*given, "--checkpoint", f"{folder}/five.safetensors", "--output", f"{tmp_path}/m{ending}"])
    assert "\n" not in str(error.value)


def test_browsers_are_not_served_such_models(folder, words, tmp_path):
    run(["export", "onnx", *words, "--output", f"{tmp_path}/m.onnx"])
    with pytest.raises(InputError, match=r"m.onnx takes 5 channels of uint16, and a browser's images have 1 or 3"):
        run(["site", "--models", f"{tmp_path}/m.onnx", "--output", f"{tmp_path}/site"])


def test_a_model_without_a_run_has_no_constants():
    with pytest.raises(InputError, match="takes 5 channels, and nothing tells their mean and standard deviation; give"):
        Spec.of("tiny_vit", create_tiny(in_chans=5))


def test_specs_that_contradict_themselves_are_refused(folder):
    _, spec = open_model("tiny_vit", folder / "five.safetensors")
    assert Spec.from_json(spec.to_json()) == spec
    for change, message in (
        ({"uint8_input": True}, "takes 5 channels of uint16, which are not the pixels of an image"),
        ({"in_chans": 17}, "in_chans"),
        ({"in_chans": 4}, "must have a number for each of 4 channels"),
        ({"pixel_type": "int64"}, "pixel_type"),
    ):
        with pytest.raises(InputError, match=message):
            Spec.from_json(json.dumps({**json.loads(spec.to_json()), **change}))
    old = json.loads(Spec.of("tiny_vit", create_tiny()).to_json())
    del old["pixel_type"]
    assert Spec.from_json(json.dumps(old)).pixel_type == "uint8"


# --- gray -------------------------------------------------------------------------------------------------------------


def test_gray_models_of_8_bits_take_images_and_of_16_bits_do_not_lose_them(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(6):
        Image.fromarray(rng.integers(0, 65535, (70, 70), dtype="uint16")).save(tmp_path / "images" / f"{index}.png")
    for kind in ("uint8", "uint16"):
        path = tmp_path / f"{kind}.safetensors"
        info = RunInfo(SMALL, ("a", "b"), PX, (0.5,), (0.3,), "bilinear", 1.0, "center", kind)
        torch.manual_seed(0)
        write_checkpoint(timm.create_model(SMALL, num_classes=2, in_chans=1).state_dict(), path, info.metadata)
        words = ["--checkpoint", str(path), "--images", f"{tmp_path}/images"]
        _, spec = open_model(None, path)
        pixels = read_pixels(sample_images(tmp_path / "images", pixels=spec.pixels), spec)
        assert pixels.dtype == (torch.uint8 if kind == "uint8" else torch.float32)
        assert pixels.shape == (6, 1, PX, PX)
        run(["export", "onnx", *words, "--output", f"{tmp_path}/{kind}.onnx"])
    run(["export", "onnx", *words[:1], f"{tmp_path}/uint8.safetensors", *words[2:], "--raw-pixels", "--output",
         f"{tmp_path}/raw.onnx"])  # fmt: skip
    with pytest.raises(InputError, match="takes 1 channel of uint16, and an input of pixels has"):
        run(["export", "onnx", *words, "--raw-pixels", "--output", f"{tmp_path}/raw16.onnx"])
