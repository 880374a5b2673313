"""What several test files share: a small SHViT, and parameters that hide no mistake."""

import functools
import gc
import subprocess
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import register_model
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

import shvit  # noqa: F401  (registers the models)
from shvit import cli
from shvit.train.data import datasets
from shvit.train.recipe import Augment, Data, Optim, Recipe
from shvit.train.recipes import RECIPES
from tests import exports

torch.set_num_threads(1)

# PyTorch parses the source of 500 operators anew for every export, one second that gives the same table each time.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
torch.onnx.export = exports.remembered(torch.onnx.export)
# Tracing and conversion make millions of objects, and the default threshold of 700 looks through all of them often.
gc.set_threshold(20_000, 20, 20)

ROOT = Path(__file__).parent.parent


def kept_files() -> set[str]:
    """The project's files as git lists them; as the sdist does, where that is what was unpacked."""
    if not (ROOT / ".git").exists():
        return set((ROOT / "shvit.egg-info" / "SOURCES.txt").read_text().splitlines())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if (ROOT / name).is_file()}


SLOW = (
    "detection/test_detection.py",
    "detection/coco/test_annotations.py",  # trains too: in a process that has not loaded every runtime yet
    "export/test_pipeline.py",
    "train/test_train.py",
    "train/test_distributed.py",
    "export/test_export.py",
    "export/backends/test_coreml.py",
    "export/bench/test_measure.py",
    "export/test_judge.py",
    "shvit/test_shvit.py",
    "export/browser/test_phone.py",
    "test_packaging.py",
    "test_readme.py",
    "export/formats/test_rounding.py",
    "shvit/test_deployment.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that two processes end at about the same time."""
    names = {item: item.path.relative_to(Path(__file__).parent).as_posix() for item in items}
    items.sort(key=lambda item: SLOW.index(names[item]) if names[item] in SLOW else len(SLOW))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a file's imports leave in memory is not looked through by the garbage collector in the next files' tests."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


TINY = {"embed_dim": (16, 24, 32), "depth": (1, 2, 1), "partial_dim": (8, 6, 8), "num_classes": 10}
"""Arguments of `timm.create_model("shvit_s1", …)` for a model of 45 thousand parameters."""


@register_model
def tiny_vit(pretrained: bool = False, **kwargs) -> nn.Module:
    """A name for it at the command line, with three classes: exported much faster than S1."""
    return timm.create_model("shvit_s1", **{**TINY, "num_classes": 3, **kwargs})


RESIDUAL_ENDS = ("pw2.bn.weight", "m.bn.weight", "proj.1.bn.weight")


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and statistic of `model` a random value, in place, and returns it.

    Fresh norms hide mistakes: their shift is 0, and SHViT's residual branches begin at 0. Signals keep their scale.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        z = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            value = torch.exp(0.3 * z)
        elif name.endswith(("running_mean", "bias")):
            value = 0.2 * z
        elif tensor.ndim == 1:  # a norm's weight
            value = (1 + 0.2 * z).clamp(min=0.3) * (0.25 if name.endswith(RESIDUAL_ENDS) else 1)
        else:
            value = z * (2 / prod(tensor.shape[1:])) ** 0.5
        tensor.copy_(value)
    return model


@torch.no_grad()
def settle(model: nn.Module, batch: torch.Tensor) -> nn.Module:
    """Gives every BatchNorm the statistics of `batch`, as training does: outputs then differ from image to image.

    With others a random model gives nearly the same for all of them, and no error of a file can be told from rounding.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over calls
    model.train()(batch)
    return model.eval()


def create_tiny(seed: int = 0, **kwargs) -> nn.Module:
    """A small SHViT with random parameters, in eval mode, made by timm as any other."""
    return randomize(timm.create_model("shvit_s1", **{**TINY, **kwargs}), seed).eval()


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normal noise of `shape`, such as (2, 3, 64, 64); always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The largest difference is at most `tolerance` of the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"


@pytest.fixture
def tiny() -> nn.Module:
    return create_tiny()


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# --- training ---------------------------------------------------------------------------------------------------------

PLAIN = Augment(auto_augment=None, color_jitter=0.0, random_erasing=0.0, mixup=0.0, cutmix=0.0, repeats=1)
SMALL = "test_resnet"
"""timm's own model for tests, with BatchNorm."""


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Red noise and blue noise, easy to tell apart."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for channel, name in ((0, "red"), (2, "blue")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (40, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def recipe(image_folder):
    return Recipe(
        model="tiny_vit",
        img_size=32,
        epochs=2,
        batch_size=8,
        ema_decay=0.9,
        data=Data(root=image_folder, workers=0),
        augment=PLAIN,
        optim=Optim(lr=2e-2, warmup_epochs=1),
    )


@pytest.fixture(scope="session")
def small(recipe):
    """The same, with everything that draws random numbers, on a small model."""
    return replace(recipe, model=SMALL, epochs=4, augment=Augment(repeats=1), optim=Optim(lr=1e-1, warmup_epochs=1))


@pytest.fixture
def quick_machine(monkeypatch):
    """What the machine can do at best is measured for a moment, on small matrices; no time measured means anything."""
    monkeypatch.setattr("shvit.export.bench.roofline.SECONDS", 0.01)
    monkeypatch.setattr("shvit.export.bench.roofline.SIDES", (128,))
    monkeypatch.setattr("shvit.export.bench.roofline.READ_MB", 16)


@pytest.fixture
def tiny_demo(monkeypatch, quick_machine):
    """The demo's recipe on a model that is trained and exported in seconds, and every twentieth of its cells."""
    cells = datasets.elpv

    def few(split):
        whole = cells(split)
        return datasets.Images(whole.source, whole.classes, whole.indices[::20])

    monkeypatch.setattr(datasets, "elpv", few)
    monkeypatch.setitem(RECIPES, "demo", replace(RECIPES["demo"], model=SMALL))


def state(folder: Path) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


def assert_same_end(first: Path, second: Path) -> None:
    """Bit for bit: weights, their average, the optimizer's moments, and what was logged of the loss."""
    one, other = state(first), state(second)
    for name in ("model", "model_ema"):
        assert all(torch.equal(one[name][key], tensor) for key, tensor in other[name].items()), name
    for key, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(moments[name], value) for name, value in other["optimizer"]["state"][key].items())
    measured = {"images_per_s", "loader_wait"}
    logs = [[{name: e[name] for name in e.keys() - measured} for e in each["log"]] for each in (one, other)]
    assert logs[0] == logs[1]


# --- exported files ---------------------------------------------------------------------------------------------------

LABELS = ("cat", "dog", "<b>owl</b>")


@pytest.fixture(scope="session")
def mine(tmp_path_factory):
    """Somebody's own exported file, which takes pixels and knows its classes."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "labels.txt").write_text("\n".join(LABELS))
    save_file(create_tiny(num_classes=3).state_dict(), folder / "mine.safetensors")
    words = ["export", "onnx", "--model", "tiny_vit", "--img-size", "64", "--raw-pixels", "--output"]
    words += [str(folder / "mine.onnx"), "--labels", str(folder / "labels.txt")]
    cli.run([*words, "--checkpoint", str(folder / "mine.safetensors")])
    return folder / "mine.onnx"
