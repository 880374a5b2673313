"""Tiny models that are trained in seconds, and images of classes that they can tell apart."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from shvit.export.images import ImageFile
from shvit.export.spec import Spec
from shvit.train.data.images import open_image
from tests.conftest import settle

PX = 64
SIDES = (72, 80)
CELLS = 6  # of a class's pattern in each direction


def draw_images(folder: Path, classes: int, count: int, seed: int = 0) -> list[ImageFile]:
    """Images of `classes` coarse random patterns in turn, each with a pattern of its own added, and their classes."""
    folder.mkdir(parents=True)
    patterns = np.random.default_rng(1000).normal(0, 38, (classes, CELLS, CELLS, 3))
    rng = np.random.default_rng(seed)
    drawn = []
    for index in range(count):
        label = index % classes
        cells = 120 + patterns[label] + rng.normal(0, 20, (CELLS, CELLS, 3)) + rng.normal(0, 15, 3)
        image = Image.fromarray(cells.clip(0, 255).astype(np.uint8)).resize(SIDES[::-1], Image.Resampling.BICUBIC)
        grain = np.asarray(image) + rng.normal(0, 6, (*SIDES, 3))
        path = folder / f"{index:05}.png"
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
        drawn.append(ImageFile(path, label))
    return drawn


def read(drawn: Sequence[ImageFile], spec: Spec) -> torch.Tensor:
    """As timm's transform gives them: (n, C, H, W)."""
    transform = spec.transform()
    return torch.stack([transform(open_image(each.path)) for each in drawn])


def trained(classes: int, drawn: Sequence[ImageFile], seed: int = 0, steps: int = 40) -> tuple[nn.Module, Spec]:
    """A tiny SHViT that was trained on the images for a few seconds, and its spec."""
    torch.manual_seed(seed)
    model = timm.create_model("tiny_vit", num_classes=classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.weight.abs().max() == 0:
            nn.init.constant_(module.weight, 0.3)  # residual branches that begin at zero learn slowly
    spec = Spec.of("tiny_vit", model, PX)
    images, labels = read(drawn, spec), torch.tensor([each.label for each in drawn])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randperm(len(images))[:32]
        loss = nn.functional.cross_entropy(model.train()(images[chosen]), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return settle(model, images[:256]), spec
