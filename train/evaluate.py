"""Accuracy of anything that maps photographs to logits."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Evaluation:
    """Accuracy over a set of photographs, each counted once. Percent."""

    top1: float
    top5: float
    """Among the 5 highest classes, or among all where there are fewer."""
    n: int
    """Photographs."""
    loss: float
    """Mean cross-entropy, in nats."""
    per_class: tuple[float, ...]
    """Top-1 of each class; NaN would not be JSON, so a class without photographs has 0."""


def evaluate(
    predict: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num_classes: int,
) -> Evaluation:
    """Runs every batch through `predict`.

    Args:
        predict: normalised float32 (B, C, H, W) → logits (B, num_classes), from PyTorch or any other runtime.
        batches: (images, int64 class indices).
    """
    hits = torch.zeros(num_classes, dtype=torch.int64)
    seen = torch.zeros(num_classes, dtype=torch.int64)
    hits5, loss = 0, 0.0
    for images, targets in batches:
        logits = predict(images).float()
        ranked = logits.topk(min(5, num_classes), dim=1).indices
        found = ranked == targets[:, None]
        hits += torch.bincount(targets[found[:, 0]], minlength=num_classes)
        seen += torch.bincount(targets, minlength=num_classes)
        hits5 += int(found.any(dim=1).sum())
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
    n = int(seen.sum())
    return Evaluation(
        top1=100 * int(hits.sum()) / n,
        top5=100 * hits5 / n,
        n=n,
        loss=loss / n,
        per_class=tuple((100 * hits / seen.clamp_min(1)).tolist()),
    )
