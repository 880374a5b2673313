"""A tiny classifier and images for it."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

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


@pytest.fixture(scope="session")
def model(weights):
    """As timm makes and loads it."""
    made = timm.create_model("tiny_vit")
    made.load_state_dict(load_file(weights))
    return made.eval()


@pytest.fixture(scope="session")
def transform(model):
    config = {**resolve_data_config(model=model), "input_size": (3, PX, PX)}
    return create_transform(**config)


@pytest.fixture(scope="session")
def probabilities(model, transform, photos):
    """Of each image of the folder, by its path."""

    def of(path: Path) -> torch.Tensor:
        with torch.inference_mode():
            return model(transform(Image.open(path).convert("RGB"))[None]).softmax(dim=1)[0]

    return {str(path): of(path) for path in sorted(photos.rglob("*.png"))}
