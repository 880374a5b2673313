"""What a run learns of its images: types, mean and standard deviation, against NumPy; and what the recipe says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from shvit.errors import InputError
from shvit.train.data.datasets import Images
from shvit.train.data.image_folders import Files
from shvit.train.data.pixels import statistics
from shvit.train.data.pixels.formats import PixelFormat
from shvit.train.data.pixels.preprocessing import resolve_preprocessing
from shvit.train.recipe import Data, Recipe
from shvit.weights.run_info import RunInfo

PX = 16


def folder_of(tmp_path: Path, arrays: list[np.ndarray], suffix: str = "npy") -> Images:
    paths = [tmp_path / f"{index}.{suffix}" for index in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        if suffix == "npy":
            np.save(path, array)
        elif suffix == "tif":
            tifffile.imwrite(path, array, photometric="minisblack", planarconfig="separate")
        else:
            Image.fromarray(array).save(path)
    return Images(Files([(path, 0) for path in paths]), ["a", "b"])


def noise(kind: str, count: int = 6, chans: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    scale = {"uint8": 255, "uint16": 65535, "float32": 9000}[kind]
    return [(scale * rng.random((chans, PX, PX)) ** 2).astype(kind) for _ in range(count)]


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_mean_and_std_are_those_of_all_pixels(tmp_path, kind, suffix):
    arrays = noise(kind)
    lines: list[str] = []
    images = folder_of(tmp_path, arrays, suffix)
    found = resolve_preprocessing(Recipe(img_size=PX, in_chans=5), images, log=lines.append)
    stacked = np.stack(arrays).astype("float64") / {"uint8": 255, "uint16": 65535, "float32": 1}[kind]
    assert found.pixels == PixelFormat(5, kind)
    assert found.mean == pytest.approx(stacked.mean((0, 2, 3)), rel=1e-6)
    assert found.std == pytest.approx(stacked.std((0, 2, 3)), rel=1e-6)
    assert found.input_size == (5, PX, PX)
    assert lines[0].startswith(f"5 channels of {kind}: mean {found.mean[0]:.4g} ")
    assert "6 training images" in lines[0]


def test_twelve_bits_in_sixteen_are_said(tmp_path):
    lines: list[str] = []
    arrays = [array >> 4 for array in noise("uint16")]
    resolve_preprocessing(Recipe(img_size=PX, in_chans=5), folder_of(tmp_path, arrays), log=lines.append)
    assert lines[0].endswith("no value needs more than 12 of the 16 bits, and all images must keep to that range")


def test_several_hundred_images_are_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "MAX_IMAGES", 3)
    arrays = noise("float32", 9)
    found = resolve_preprocessing(Recipe(img_size=PX, in_chans=5), folder_of(tmp_path, arrays))
    assert found.mean == pytest.approx(np.stack(arrays[::3]).astype("float64").mean((0, 2, 3)), rel=1e-6)


def test_given_constants_are_taken_and_stored_ones_before_them(tmp_path, monkeypatch):
    images = folder_of(tmp_path, noise("float32"))
    data = Data(mean=(1.0, 2.0, 3.0, 4.0, 5.0), std=(0.1,) * 5)
    recipe = Recipe(img_size=PX, in_chans=5, data=data)
    monkeypatch.setattr(statistics, "_readable", None)  # no image is read for it
    given = resolve_preprocessing(recipe, images)
    assert (given.mean, given.std) == (data.mean, data.std)
    stored = RunInfo("shvit_s1", (), PX, (0.1,) * 5, (0.2,) * 5, "bilinear", 0.7, "border", "uint16")
    kept = resolve_preprocessing(replace(recipe, data=Data()), images, stored)
    assert kept.stored == {"mean": (0.1,) * 5, "std": (0.2,) * 5, "interpolation": "bilinear", "crop_pct": 0.7,
                           "crop_mode": "border", "pixel_type": "uint16"}  # fmt: skip


def test_gray_images_of_8_bits_have_timms_constants_and_others_their_own(tmp_path):
    recipe = Recipe(img_size=PX, in_chans=1)
    (tmp_path / "png").mkdir()
    gray = resolve_preprocessing(recipe, folder_of(tmp_path / "png", [a[0] for a in noise("uint8")], "png"))
    assert gray.pixels == PixelFormat(1)
    assert gray.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    deep = resolve_preprocessing(recipe, folder_of(tmp_path, [a[0] for a in noise("uint16")], "png"))
    assert deep.pixels == PixelFormat(1, "uint16")
    assert deep.mean == pytest.approx((np.mean([a[0] for a in noise("uint16")]) / 65535,))


def test_unusable_sets_are_refused_in_one_line(tmp_path):
    recipe = Recipe(img_size=PX, in_chans=5)
    with pytest.raises(InputError, match=r"are of uint8 \(.*0.npy\) and uint16 \(.*1.npy\), each of which is scaled"):
        resolve_preprocessing(recipe, folder_of(tmp_path, [noise("uint8")[0], noise("uint16")[0]]))
    flat = [array * np.array([1, 1, 0, 1, 1], "f4")[:, None, None] for array in noise("float32")]
    with pytest.raises(InputError, match="channel 2, counted from 0, has the same value in all of 6 training images"):
        resolve_preprocessing(recipe, folder_of(tmp_path, flat))
    with pytest.raises(InputError, match=r"none of 2 training images can be read with --in-chans 5; .*0\.npy"):
        resolve_preprocessing(recipe, folder_of(tmp_path, noise("uint8", 2, 4)))


@pytest.mark.parametrize(
    ("data", "mode", "pct"),
    [
        (Data(), "center", 0.875),
        (Data(crop_mode="squash"), "squash", 1.0),
        (Data(crop_mode="border"), "border", 1.0),
        (Data(crop_mode="border", crop_pct=0.9), "border", 0.9),
        (Data(crop_pct=0.95), "center", 0.95),
        (Data(crop_mode="center"), "center", 0.875),
    ],
)
def test_whole_images_are_whole_unless_the_recipe_says_otherwise(data, mode, pct):
    found = resolve_preprocessing(Recipe(data=data))
    assert (found.crop_mode, found.crop_pct) == (mode, pct)


@pytest.mark.parametrize("mode", ["squash", "border"])
@pytest.mark.parametrize("size", [(90, 30), (30, 90)], ids=str)
def test_a_defect_at_the_border_is_seen(mode, size):
    """A bright corner is lost to the usual crop, and not with squash and border."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[:6, :6] = 255
    image = Image.fromarray(pixels)

    def brightest(data: Data) -> float:
        found = replace(resolve_preprocessing(Recipe(img_size=32, data=data)), mean=(0.0,) * 3, std=(1.0,) * 3)
        return float(torch.as_tensor(found.create_fit()(image)).max())

    assert brightest(Data()) < 0.1
    assert brightest(Data(crop_mode=mode)) > 0.9
