"""What several test files share: a small SHViT, and parameters that hide no mistake."""

import subprocess
from math import prod
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import shvit  # noqa: F401  (registers the models)

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent


def kept_files() -> set[str]:
    """The project's files as git lists them; as the sdist does, where that is what was unpacked."""
    if not (ROOT / ".git").exists():
        return set((ROOT / "shvit.egg-info" / "SOURCES.txt").read_text().splitlines())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if (ROOT / name).is_file()}


TINY = {"embed_dim": (16, 24, 32), "depth": (1, 2, 1), "partial_dim": (8, 6, 8), "num_classes": 10}
"""Arguments of `timm.create_model("shvit_s1", …)` for a model of 45 thousand parameters."""

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
