"""The reference implementation's names and logits, of files as it publishes them."""

import argparse
import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from shvit import deploy
from shvit.create import create_model
from shvit.shvit import VARIANTS, rename_reference_keys, to_reference
from tests.conftest import ROOT

GOLDENS = ROOT / "tests" / "goldens"
CHECKPOINTS = [(name, distilled) for name in VARIANTS for distilled in (False, True)]
LOGITS = [("shvit_s1", False, 224), ("shvit_s1", False, 320), ("shvit_s3", False, 224), ("shvit_s3", False, 320),
          ("shvit_s1", True, 224)]  # fmt: skip


def key_of(name: str, distilled: bool) -> str:
    return f"{name}_distilled" if distilled else name


def names_hash(shapes: dict) -> str:
    """Over one sorted line for each tensor: its name and its shape."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def refreshed_goldens():
    """Writes the goldens anew from the file that SHVIT_REFRESH_GOLDENS names."""
    source = os.environ.get("SHVIT_REFRESH_GOLDENS")
    if source is None:
        return
    reference = json.loads(Path(source).read_text())
    names = {key: {"tensors": len(entry["shapes"]), "sha256": names_hash(entry["shapes"])}
             for key, entry in reference.items()}  # fmt: skip
    (GOLDENS / "reference_names.json").write_text(json.dumps(names, indent=1) + "\n")
    for name, distilled, px in LOGITS:
        entry = reference[key_of(name, distilled)]
        logits = entry["logits"] if px == entry["input_px"] else entry[f"logits_{px}"]
        lines = "\n".join(f"{logit:.6g}" for logit in logits)
        (GOLDENS / f"reference_logits_{key_of(name, distilled)}_{px}.txt").write_text(lines + "\n")


def reference_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """What the reference's parameter `name` was when the golden logits were made; from its name and shape alone."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(100)
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    kind = name.rpartition(".")[2]
    if kind == "running_var":
        value = np.exp(normal * 0.3)
    elif kind in ("running_mean", "bias"):
        value = normal * 0.1
    elif len(shape) > 1:
        value = normal / np.sqrt(np.prod(shape[1:]))
    else:
        branch_end = name.endswith(("pw2.bn.weight", "m.bn.weight", "proj.1.bn.weight"))
        value = np.maximum(1 + normal * 0.2, 0.3) * (0.25 if branch_end else 1)
    return torch.tensor(value, dtype=torch.float32)


def reference_image(px: int) -> torch.Tensor:
    return torch.tensor(np.random.RandomState(0).standard_normal((1, 3, px, px)), dtype=torch.float32)


@pytest.mark.parametrize(("name", "distilled"), CHECKPOINTS)
def test_names_and_shapes_are_those_of_the_published_checkpoints(name, distilled):
    golden = json.loads((GOLDENS / "reference_names.json").read_text())[key_of(name, distilled)]
    state_dict = timm.create_model(name, distilled=distilled, device="meta").state_dict()
    reference = to_reference(state_dict)
    assert len(reference) == golden["tensors"]
    assert names_hash({key: tensor.shape for key, tensor in reference.items()}) == golden["sha256"]
    assert list(rename_reference_keys(reference)) == list(state_dict)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A function that writes a file as the reference publishes it, with the parameters behind the golden logits."""
    folder = tmp_path_factory.mktemp("published")

    def write(name: str, distilled: bool) -> Path:
        path = folder / f"{key_of(name, distilled)}.pth"
        if not path.exists():
            shapes = to_reference(timm.create_model(name, distilled=distilled, device="meta").state_dict())
            model = {key: reference_tensor(key, tensor.shape) for key, tensor in shapes.items()}
            torch.save({"model": model, "args": argparse.Namespace(model=name), "epoch": 299}, path)
        return path

    return write


@pytest.mark.parametrize(("name", "distilled", "px"), LOGITS)
@torch.no_grad()
def test_published_file_gives_the_references_logits(published, name, distilled, px):
    path = published(name, distilled)
    golden = torch.tensor(np.loadtxt(GOLDENS / f"reference_logits_{key_of(name, distilled)}_{px}.txt"))
    assert golden.shape == (1000,)
    by_timm = timm.create_model(name, checkpoint_path=str(path), distilled=distilled).eval()
    by_us = create_model(name, path)
    for model in (by_timm, by_us, deploy(by_us)):
        torch.testing.assert_close(model(reference_image(px))[0].double(), golden, rtol=0, atol=1e-4)
