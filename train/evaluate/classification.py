"""Top-1, top-5 and balanced accuracy."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from shvit.errors import InputError, printable
from shvit.files import atomic_write

if TYPE_CHECKING:
    from ..distributed import World

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Normalized float32 (B, C, H, W) → outputs (B, num_classes), from PyTorch or any other runtime: logits, or values."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy over a set of images, each counted once. Percent."""

    top1: float
    top5: float
    """Among the 5 highest classes, or among all where there are fewer."""
    n: int
    """Images."""
    loss: float
    """Mean cross-entropy, in nats."""
    balanced_top1: float
    """Balanced accuracy: mean of `per_class` over the classes that have images."""
    per_class: tuple[float, ...]
    """Top-1 of each class; NaN would not be JSON, so a class without images has 0."""


@dataclass(frozen=True)
class Counts:
    """Confusion matrix and totals of an evaluation; those of disjoint sets add up."""

    confusion: torch.Tensor
    """(classes, classes) int64: images by true class and by predicted class."""
    totals: torch.Tensor
    """(3,) float64: images whose class is among the 5 highest, summed cross-entropy, images without finite logits."""

    def across(self, world: "World") -> "Counts":
        """Return the counts of all processes."""
        return Counts(world.sum(self.confusion), world.sum(self.totals))

    def evaluation(self) -> Evaluation:
        """Return the accuracy.

        Raises:
            InputError: nothing was counted, or logits are not finite, so that no class is the highest.
        """
        seen, hits = self.confusion.sum(1), self.confusion.diagonal()
        n = int(seen.sum())
        if n == 0:
            raise InputError("no image to evaluate on could be read; give others")
        hits5, loss, unusable = self.totals.tolist()
        if unusable or not math.isfinite(loss):
            raise InputError(f"the model's outputs are not finite, or too large for a loss, for {int(unusable) or n} "
                             f"of {n} images; its weights are damaged, or its training diverged")  # fmt: skip
        per_class = 100 * hits.double() / seen.clamp_min(1)
        return Evaluation(
            top1=100 * int(hits.sum()) / n,
            top5=100 * hits5 / n,
            n=n,
            loss=loss / n,
            balanced_top1=per_class[seen > 0].mean().item(),
            per_class=tuple(per_class.tolist()),
        )


def count(
    predict: Predict,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num_classes: int,
    device: torch.device | str = "cpu",
) -> Counts:
    """Run every batch through `predict` and count its predictions.

    Args:
        batches: (images, int64 class indices), of which a negative one does not count; or (images, float32
            proportions of the classes), whose highest is the class, and none of which counts where they are NaN.
        device: where `predict` wants its images.

    Raises:
        InputError: a class index that the model does not have.
    """
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for images, targets in batches:
        if not targets.is_floating_point() and targets.max() >= num_classes:
            raise InputError(f"an image of class {int(targets.max())}, and the model has {num_classes} classes, "
                             "counted from 0; evaluate on the classes that it was trained for")  # fmt: skip
        images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        logits = predict(images).float()
        counted = targets.isfinite().all(dim=1) if targets.is_floating_point() else targets >= 0
        logits, targets = logits[counted], targets[counted]
        totals[1] += F.cross_entropy(logits, targets, reduction="sum").double()
        targets = targets.argmax(dim=1) if targets.is_floating_point() else targets
        ranked = logits.topk(min(5, num_classes), dim=1).indices
        confusion += torch.bincount(targets * num_classes + ranked[:, 0], minlength=num_classes * num_classes)
        totals[0] += (ranked == targets[:, None]).any(dim=1).sum()
        totals[2] += (~logits.isfinite().all(dim=1)).sum()
    return Counts(confusion.reshape(num_classes, num_classes), totals)


def evaluate(predict: Predict, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], num_classes: int) -> Evaluation:
    """Return the accuracy of `predict`; see `count`."""
    return count(predict, batches, num_classes).evaluation()


def plot_confusion(counts: Counts, classes: Sequence[str], path: Path, title: str) -> None:
    """Draw the confusion matrix as a PNG, each row in percent, with numbers if there are at most 40 classes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    classes = [
        printable(name).replace("$", r"\$") for name in classes
    ]  # between two of which matplotlib sees a formula
    seen = counts.confusion.sum(1, keepdim=True).clamp_min(1)
    shares = (100 * counts.confusion / seen).cpu().numpy()
    size, legible = len(classes), len(classes) <= 40
    side = min(max(4.0, 0.45 * size + 1.5), 14.0)
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if legible:
        axis.set_xticks(range(size), classes, rotation=90, fontsize=8)
        axis.set_yticks(
            range(size), [f"{name} ({int(n)})" for name, n in zip(classes, seen[:, 0], strict=True)], fontsize=8
        )
        for row, column in zip(*shares.nonzero(), strict=True):
            share = shares[row, column]
            axis.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if share > 50 else "#1c2733")  # fmt: skip
    axis.set_xlabel("predicted class, % of the row")
    axis.set_ylabel("true class (images)")
    axis.set_title(title, fontsize=10)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
