"""A training batch: augmented images as bytes, their classes, and the images that could not be read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.loader import fast_collate

Problem = tuple[str, int, int]
"""(message about a damaged image, its index, number of images that are lost)."""


@dataclass(frozen=True)
class Batch:
    """A batch of augmented images as bytes, and the problems met in loading it."""

    images: torch.Tensor
    """(B, C, H, W), uint8; float32 where images are not of 8 bits."""
    targets: torch.Tensor
    """(B,), int64: class indices; or (B, targets), float32: proportions of classes, labels or values."""
    problems: tuple[Problem, ...] = ()
    """Damaged images, which others have replaced."""

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; called by DataLoader."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.problems)


Item = tuple[np.ndarray | torch.Tensor, int | np.ndarray, tuple[Problem, ...]]


def collate(items: Sequence[Item]) -> Batch:
    """Collate items into a batch; called by DataLoader."""
    images, _ = fast_collate([(image, 0) for image, _, _ in items])
    if items[0][0].dtype == torch.float32:  # which timm turns into bytes
        images = torch.stack([image for image, _, _ in items])  # type: ignore[misc]
    targets = torch.from_numpy(np.stack([np.asarray(target) for _, target, _ in items]))
    return Batch(images, targets, tuple(problem for _, _, problems in items for problem in problems))
