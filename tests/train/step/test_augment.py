"""Training transforms that follow how evaluation fits images, and those of other images than RGB."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from shvit.errors import InputError
from shvit.train.data.pixels.formats import RGB, PixelFormat
from shvit.train.data.pixels.preprocessing import Preprocessing, resolve_preprocessing
from shvit.train.recipe import Augment, Data, Recipe
from shvit.train.step.augment import create_train_transform
from shvit.train.step.batch import collate
from shvit.train.step.seeds import seed_cpu_generators
from tests.conftest import PLAIN

RNG = np.random.default_rng(0)
WHOLE = replace(PLAIN, scale=(1.0, 1.0), hflip=0.0)


def wide(size: tuple[int, int] = (30, 120)) -> Image.Image:
    small = Image.fromarray(RNG.integers(0, 255, (6, 9, 3), dtype=np.uint8))
    return small.resize(size[::-1], Image.Resampling.BICUBIC)


def preprocessing(mode: str | None, pixels: PixelFormat = RGB, **data: float) -> Preprocessing:
    usual = resolve_preprocessing(Recipe(img_size=32, data=Data(crop_mode=mode, **data)))
    constants = {"mean": (0.5,) * pixels.in_chans, "std": (1.0,) * pixels.in_chans}
    return replace(usual, pixels=pixels, input_size=(pixels.in_chans, 32, 32), **constants)


@pytest.mark.parametrize("mode", ["squash", "border"])
@pytest.mark.parametrize("size", [(30, 120), (120, 30), (40, 40)], ids=str)
def test_whole_training_images_are_those_of_evaluation(mode, size):
    image, config = wide(size), preprocessing(mode)
    expected = create_transform(normalize=False, **config.config)(image)
    for _ in range(3):
        assert torch.equal(torch.as_tensor(create_train_transform(WHOLE, config, mode)(image)), expected)
    array = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype("f4").repeat(2, 0)) / 255
    six = preprocessing(mode, PixelFormat(6, "float32"))
    fitted = create_train_transform(WHOLE, six, mode)(array)
    assert (255 * fitted[::2] - expected).abs().max() < 30  # bicubic overshoots where bytes end
    assert fitted.shape == (6, 32, 32)


def test_without_that_choice_a_scale_of_one_is_timms_crop_which_cuts():
    image = wide()
    whole = create_transform(normalize=False, **preprocessing("squash").config)(image)
    assert not torch.equal(torch.as_tensor(create_train_transform(WHOLE, preprocessing(None), None)(image)), whole)


def test_squashed_crops_have_the_images_aspect_and_others_do_not(monkeypatch):
    """Of a ramp four times as wide as high, a crop's slopes tell the part of each side that it shows."""
    ramp = np.zeros((100, 400, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 100)[:, None], np.linspace(0, 255, 400)[None]
    augment = replace(PLAIN, scale=(0.25, 0.25), ratio=(1.0, 1.0), hflip=0.0, interpolation="bilinear")

    def shown(mode: str | None) -> list[float]:
        crop = torch.as_tensor(create_train_transform(augment, preprocessing(mode), mode)(Image.fromarray(ramp)))
        return [float(crop[c].float().amax() - crop[c].float().amin()) / 255 for c in (0, 1)]

    assert shown("squash") == pytest.approx([0.5, 0.5], abs=0.04)
    assert shown("border") == pytest.approx([1.0, 0.25], abs=0.04)
    assert shown(None) == pytest.approx([1.0, 0.25], abs=0.04)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_other_images_are_cropped_and_flipped_as_timm_does_and_nothing_changes_their_values(kind):
    """Against timm's transform of two images in RGB, which draws the same crop and flips."""
    image = wide((60, 50))
    pixels = PixelFormat(6, kind)
    scale = 1 if kind == "uint8" else 255
    array = torch.from_numpy(np.concatenate([np.asarray(image)] * 2, axis=2).transpose(2, 0, 1).copy())
    array = array if kind == "uint8" else array.float() / scale
    augment = Augment(interpolation="bilinear", vflip=0.5, repeats=1)  # with RandAugment, which is left out
    transform = create_train_transform(augment, preprocessing(None, pixels))
    timms = create_transform((3, 32, 32), is_training=True, use_prefetcher=True, vflip=0.5, color_jitter=None,
                             interpolation="bilinear")  # fmt: skip
    for seed in range(8):
        seed_cpu_generators(seed)
        found = transform(array)
        seed_cpu_generators(seed)
        expected = torch.as_tensor(timms(image)).float().repeat(2, 1, 1)
        assert found.dtype == pixels.dtype
        assert (scale * found.float() - expected).abs().max() <= 1.5
        seed_cpu_generators(seed)
        assert torch.equal(transform(array), found)


def test_gray_training_images_are_gray():
    transform = create_train_transform(Augment(), preprocessing(None, PixelFormat(1)))
    found = torch.as_tensor(transform(wide()))
    assert found.shape == (1, 32, 32)
    assert found.dtype == torch.uint8


def test_batches_keep_floats():
    images = [torch.randn(5, 4, 4) * 1000 for _ in range(3)]
    batch = collate([(image, index, ()) for index, image in enumerate(images)])
    assert torch.equal(batch.images, torch.stack(images))
    assert batch.targets.tolist() == [0, 1, 2]
    eights = collate([(np.full((5, 4, 4), 7, np.uint8), 1, ())])
    assert eights.images.dtype == torch.uint8


def test_an_interpolation_that_tensors_lack_is_refused():
    with pytest.raises(InputError, match="cannot be resized with lanczos"):
        create_train_transform(replace(PLAIN, interpolation="lanczos"), preprocessing(None, PixelFormat(5, "uint16")))


@pytest.mark.parametrize("mode", [None, "squash"])
def test_crops_for_a_wide_size_keep_the_proportions_of_the_image(mode):
    """A crop of ratio 1 is distorted by nothing, and with squash as much as the whole image."""
    augment = replace(PLAIN, scale=(0.05, 0.05), ratio=(1.0, 1.0), hflip=0.0)
    preprocessing = resolve_preprocessing(Recipe(img_size=(32, 96)))
    crop = create_train_transform(augment, preprocessing, mode).transforms[0]
    _, _, height, width = crop.get_params(Image.new("RGB", (400, 200)), crop.scale, crop.ratio)
    wanted = 3 if mode is None else 2
    assert width / height == pytest.approx(wanted, rel=0.05)
