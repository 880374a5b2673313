"""Tiny models of the tasks beside classification that were trained for seconds, and images for them."""

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import register_model
from torch import nn

from shvit.checkpoint import write_checkpoint
from shvit.export.spec import Spec
from shvit.train.data.images import open_image
from shvit.weights.run_info import RunInfo, Task
from tests.conftest import TINY, settle

PX = 32
SIDES = (36, 40)
CELLS = 5  # of a label's pattern in each direction
LABELS = ("cat", "dog", "owl", "a tree")
THRESHOLDS = (0.5, 0.3, 0.7, 0.45)
VALUE = "year"
MEAN, STEPS = 1950.0, (4.0, 9.0, -15.0, 22.0)
SMALL = {**TINY, "depth": (1, 1, 1)}


def draw_labeled(folder: Path, count: int, seed: int) -> torch.Tensor:
    """Images on which the coarse patterns of some of the labels lie over each other; returns which, (count, labels)."""
    folder.mkdir(parents=True)
    patterns = np.random.default_rng(1000).normal(0, 40, (len(LABELS), CELLS, CELLS, 3))
    rng = np.random.default_rng(seed)
    present = rng.random((count, len(LABELS))) < 0.4
    for index, labels in enumerate(present):
        cells = 120 + np.tensordot(labels.astype(float), patterns, 1) + rng.normal(0, 15, patterns[0].shape)
        image = Image.fromarray(cells.clip(0, 255).astype(np.uint8)).resize(SIDES[::-1], Image.Resampling.BICUBIC)
        image.save(folder / f"{index:04}.png")
    return torch.from_numpy(present).float()


@register_model
def tiny_labels(pretrained: bool = False, **kwargs) -> nn.Module:
    """A name for a model of so many labels."""
    return timm.create_model("shvit_s1", **{**SMALL, "num_classes": len(LABELS), **kwargs})


@register_model
def tiny_value(pretrained: bool = False, **kwargs) -> nn.Module:
    """A name for a model of one value."""
    return timm.create_model("shvit_s1", **{**SMALL, "num_classes": 1, **kwargs})


INFOS: dict[Task, RunInfo] = {
    "multi_label": RunInfo("tiny_labels", LABELS, PX, task="multi_label", thresholds=THRESHOLDS),
    "regression": RunInfo("tiny_value", (VALUE,), PX, task="regression"),
}
"""What runs would write down."""


def train_for(task: Task, folder: Path, path: Path) -> nn.Module:
    """Train on images drawn into `folder`, write the checkpoint `path`, and return the model."""
    present = draw_labeled(folder, 96, seed=1)
    years = present @ torch.tensor(STEPS)
    scale = years.std()
    targets = present if task == "multi_label" else ((years - years.mean()) / scale)[:, None]
    loss = nn.functional.binary_cross_entropy_with_logits if task == "multi_label" else nn.functional.mse_loss
    torch.manual_seed(0)
    model = timm.create_model(INFOS[task].model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.weight.abs().max() == 0:
            nn.init.constant_(module.weight, 0.3)  # residual branches that begin at zero learn slowly
    transform = Spec.of("", model, PX).transform()
    images = torch.stack([transform(open_image(file)) for file in sorted(folder.iterdir())])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.02)
    for _ in range(40):
        chosen = torch.randperm(len(images))[:32]
        step = loss(model.train()(images[chosen]), targets[chosen])
        optimizer.zero_grad()
        step.backward()
        optimizer.step()
    settle(model, images)
    if task == "regression":  # in years, as the weights of a run give them
        with torch.no_grad():
            model.head.l.weight *= scale
            model.head.l.bias.mul_(scale).add_(MEAN + years.mean())
    write_checkpoint(model.state_dict(), path, INFOS[task].metadata)
    return model.eval()
