"""Which values a model is given for which files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from shvit.errors import InputError
from shvit.train.data.image_folders import list_images
from shvit.train.data.pixels.formats import PixelFormat


def file(array: np.ndarray, kind: str = "npy") -> io.BytesIO:
    stream = io.BytesIO()
    if kind == "npy":
        np.save(stream, array)
    else:
        Image.fromarray(array).save(stream, kind)
    stream.seek(0)
    return stream


def noise(kind: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, shape).astype(kind)


def test_integers_are_divided_by_their_largest_value_and_floats_are_taken_as_they_are():
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (1.0, 2.0, 3.0, 4.0, 5.0)
    for kind, largest, dtype in (
        ("uint8", 255, torch.uint8), ("uint16", 65535, torch.float32), ("float32", 1, torch.float32)
    ):  # fmt: skip
        array = noise(kind, 5, 4, 6)
        pixels = PixelFormat(5, kind)
        found = pixels.open(file(array), "x")
        assert found.dtype == dtype
        expected = (array.astype("float64") / largest - np.reshape(mean, (5, 1, 1))) / np.reshape(std, (5, 1, 1))
        np.testing.assert_allclose(pixels.normalize(found[None], mean, std)[0], expected, atol=1e-5)


def test_a_file_of_another_type_is_refused_in_one_line():
    with pytest.raises(InputError, match="x: holds uint8, and the model was trained on uint16, which is scaled"):
        PixelFormat(5, "uint16").open(file(noise("uint8", 5, 4, 6)), "x")
    with pytest.raises(InputError, match="holds uint16, and the model was trained on uint8"):
        PixelFormat(1).open(file(noise("uint16", 4, 6)), "x")
    with pytest.raises(InputError, match="image: holds float32"):
        PixelFormat(4).convert(noise("float32", 5, 6, 4), "image")


def test_one_channel_of_8_bits_is_an_image_whatever_its_file():
    array = noise("uint8", 12, 20)
    from_npy, from_png = PixelFormat(1).open(file(array), "x"), PixelFormat(1).open(file(array, "png"), "x")
    assert from_npy.mode == from_png.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(from_npy.convert("L")), array)
    assert np.array_equal(np.asarray(from_npy), np.asarray(from_png))


def test_an_npy_file_is_no_rgb_image():
    with pytest.raises(InputError, match="not a readable image"):
        PixelFormat().open(file(noise("uint8", 12, 20, 3)), "x")


NAMES = ("a/x.npy", "a/x.png", "a/x.tif", "a/x.jpg", "b/x.npy", "b/x.TIFF", "b/x.gif", "b/notes.txt")


@pytest.mark.parametrize(
    ("in_chans", "listed"),
    [
        (3, {"a/x.png", "a/x.tif", "a/x.jpg", "b/x.TIFF"}),
        (1, {"a/x.npy", "a/x.png", "a/x.tif", "a/x.jpg", "b/x.npy", "b/x.TIFF"}),
        (2, {"a/x.npy", "a/x.png", "a/x.tif", "b/x.npy", "b/x.TIFF"}),
        (4, {"a/x.npy", "a/x.png", "a/x.tif", "b/x.npy", "b/x.TIFF"}),
        (5, {"a/x.npy", "a/x.tif", "b/x.npy", "b/x.TIFF"}),
    ],
)
def test_a_folder_lists_what_may_have_the_channels(tmp_path, in_chans, listed):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listing = list_images(tmp_path, in_chans)
    assert set(listing.names) == listed
    assert sum(listing.skipped.values()) == len(NAMES) - len(listed)
