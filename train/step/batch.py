"""What a training loader gives: augmented images as bytes, their classes, and what could not be read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.loader import fast_collate

Problem = tuple[str, int, int]
"""(what is said of a damaged image, its index, how many images it stands for)."""


@dataclass(frozen=True)
class Batch:
    """What a loader gives: augmented images as bytes, and what went wrong with others."""

    images: torch.Tensor
    """(B, 3, H, W), uint8."""
    targets: torch.Tensor
    """(B,), int64."""
    problems: tuple[Problem, ...] = ()
    """Damaged images, whose places others have taken."""

    def pin_memory(self) -> "Batch":
        """Called by DataLoader."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.problems)


Item = tuple[np.ndarray, int, tuple[Problem, ...]]


def collate(items: Sequence[Item]) -> Batch:
    images, targets = fast_collate([(image, target) for image, target, _ in items])
    return Batch(images, targets, tuple(problem for _, _, problems in items for problem in problems))
