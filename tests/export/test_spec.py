"""A spec's preprocessing against timm's, and what a spec in a file may hold."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.export.spec import Spec
from shvit.weights.run_info import RunInfo
from tests.conftest import create_tiny

CONFIG = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}


def image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [(48, 96), (96, 48), (48, 48)])
def test_preprocessing_is_timms(crop_mode, crop_pct, size):
    """From what a run says of itself, by way of JSON; of images wider, taller and smaller than the size."""
    run = RunInfo("tiny_vit", (), size, crop_pct=crop_pct, crop_mode=crop_mode, **CONFIG)
    spec = Spec.from_json(Spec.of("tiny_vit", create_tiny(), info=run).to_json())
    assert spec.shape == (3, *size)
    expected = create_transform((3, *size), crop_pct=crop_pct, crop_mode=crop_mode, **CONFIG)
    for width, height in ((200, 100), (100, 200), (321, 123), (40, 30), (96, 48)):
        given = image(width, height)
        torch.testing.assert_close(spec.transform()(given), expected(given), rtol=0, atol=0)
        pixels = spec.transform(normalize=False)(given)
        assert pixels.dtype == torch.uint8
        torch.testing.assert_close(spec.normalize(pixels[None])[0], expected(given))


def test_sizes_are_given_as_numbers_and_pairs():
    spec = Spec.of("tiny_vit", create_tiny(), 64)
    assert spec.img_size == (64, 64)
    wide = replace(spec, img_size=(64, 96), other_sizes=(32, [64, 32]))
    assert wide.sizes == ((64, 96), (32, 32), (64, 32))
    assert wide.blank(2).shape == (2, 3, 64, 96)
    assert wide.feed(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)).shape == (1, 3, 64, 96)
    assert replace(wide, uint8_input=True).feed(torch.zeros(1, 3, 64, 96, dtype=torch.uint8)).shape == (1, 64, 96, 3)
    assert deploy(create_tiny(), wide.img_size)(wide.blank()).shape == (1, 10)


def test_json_has_one_number_for_a_square_as_older_files_have_it():
    spec = Spec.of("tiny_vit", create_tiny(), 64)
    assert json.loads(spec.to_json())["img_size"] == 64
    wide = replace(spec, img_size=(64, 96), other_sizes=(32, (64, 32)))
    content = json.loads(wide.to_json())
    assert (content["img_size"], content["other_sizes"]) == ([64, 96], [32, [64, 32]])
    assert Spec.from_json(wide.to_json()) == wide
    assert Spec.from_json(json.dumps({**content, "img_size": "64x96"})) == wide


@pytest.mark.parametrize(
    "size", [[1, 2, 3], ["a", 1], [], [64], 0, [0, 64], [64, -1], [4097, 1], 10**30, [10**30, 1], None, True, 1.5, {},
             "64x", "x" * 10_000, [[64, 96]], [1] * 10_000],
)  # fmt: skip
@pytest.mark.parametrize("field", ["img_size", "other_sizes"])
def test_spec_of_no_size_is_refused_in_one_line(size, field):
    content = json.loads(Spec.of("tiny_vit", create_tiny(), 64).to_json())
    content[field] = size if field == "img_size" else [size]
    with pytest.raises(InputError, match=rf"^m\.onnx: its description of its input: {field}") as error:
        Spec.from_json(json.dumps(content), "m.onnx")
    assert "give 1 to 4096 px" in str(error.value)
    assert len(str(error.value)) < 400
    assert str(error.value).isprintable()


@pytest.mark.parametrize("size", [(4096, 32), (32, 4096)])
def test_longer_side_limits_what_images_are_resized_to(size):
    run = RunInfo("tiny_vit", (), size, crop_pct=0.4)
    with pytest.raises(InputError, match=r"would resize images to more than 8192 px; choose a smaller --img-size"):
        Spec.of("tiny_vit", create_tiny(), info=run)
    content = json.loads(Spec.of("tiny_vit", create_tiny(), size).to_json())
    with pytest.raises(InputError, match=r"4096 px at crop_pct 0\.4 would resize images to more than 8192 px"):
        Spec.from_json(json.dumps({**content, "crop_pct": 0.4}))


def test_model_of_one_size_takes_no_other():
    model = timm.create_model("test_vit", img_size=(32, 48))
    run = RunInfo("test_vit", (), (32, 48))
    assert Spec.of("test_vit", model, info=run).img_size == (32, 48)
    with pytest.raises(InputError, match="test_vit takes 32x48 px only; leave out --img-size 48x32"):
        Spec.of("test_vit", model, (48, 32), run)
