"""Tensors of any channels against timm's transform of Pillow's images."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from shvit.errors import InputError
from shvit.train.data.pixels.fit import create_fit
from shvit.train.data.pixels.formats import PixelFormat

RNG = np.random.default_rng(0)
FITS = [("center", 0.875), ("squash", 1), ("squash", 0.9), ("border", 1), ("border", 0.8)]
SHAPES = [(37, 90), (64, 48), (20, 20)]


def options(mode: str, pct: float, interpolation: str = "bicubic", chans: int = 6) -> dict:
    mean, std = (0.4, 0.5, 0.6, 0.1, 0.2, 0.3)[:chans], (0.2, 0.3, 0.1, 0.4, 0.5, 0.6)[:chans]
    return {"input_size": (chans, 32, 32), "mean": mean, "std": std, "interpolation": interpolation, "crop_pct": pct,
            "crop_mode": mode}  # fmt: skip


def smooth(shape: tuple[int, int]) -> np.ndarray:
    """An image of (H, W, 6), resized from few random values."""
    halves = [Image.fromarray(RNG.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize(shape[::-1]) for _ in range(2)]
    return np.concatenate([np.asarray(half) for half in halves], axis=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("mode", "pct"), [("center", 0.875), ("squash", 1), ("squash", 0.9), ("border", 1), ("border", 0.8)]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_tensors_are_fitted_as_timm_fits_images(shape, mode, pct, interpolation):
    """Six channels are two images; every channel of the border has its own mean."""
    array = smooth(shape)
    config = options(mode, pct, interpolation)
    image = torch.from_numpy(array.transpose(2, 0, 1).copy())
    found = create_fit(PixelFormat(6), normalize=False, **config)(image)
    halves = [{**config, "input_size": (3, 32, 32), "mean": config["mean"][i : i + 3]} for i in (0, 3)]
    transforms = [create_transform(normalize=False, **{**half, "std": (1.0,) * 3}) for half in halves]
    expected = torch.cat([transforms[i](Image.fromarray(array[..., 3 * i : 3 * i + 3])) for i in (0, 1)])
    assert found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= (3 if interpolation == "bicubic" else 1)
    floats = create_fit(PixelFormat(6, "float32"), normalize=False, **config)(image.float() / 255)
    assert (255 * floats.clamp(0, 1) - expected).abs().max() <= 3.6
    normalized = create_fit(PixelFormat(6), **config)(image)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(normalized, (found / 255 - mean) / std)


def test_what_tensors_cannot_be_resized_with_is_refused():
    with pytest.raises(InputError, match="images of 6 channels of float32 cannot be resized with lanczos; choose from"):
        create_fit(PixelFormat(6, "float32"), **options("center", 0.9, "lanczos"))
    create_fit(PixelFormat(3), **options("center", 0.9, "lanczos", 3))
