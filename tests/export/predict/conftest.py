"""A tiny classifier and images for it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shvit.checkpoint import write_checkpoint
from shvit.weights.run_info import RunInfo
from tests.conftest import LABELS, create_tiny, images, settle

PX = 32


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Weights that know their model, classes and size."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = settle(create_tiny(num_classes=3), images(64, 3, PX, PX))
    write_checkpoint(model.state_dict(), path, RunInfo("tiny_vit", LABELS, PX).metadata)
    return path


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 48)) -> Path:
    """Colored noise, which the model does not take for the same."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, 3) * 0.7 + rng.integers(0, 77, (*size, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Eleven images in two folders."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(11):
        draw(root / ("a", "b")[index % 2] / f"{index:02}.png", index)
    return root
