"""Class balance: the weight of a class in the loss, and of an image in the sampler, by the images of its class."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


def balanced_class_weight(counts: Sequence[int]) -> torch.Tensor:
    """Return the weight of each class, n / (classes · its images), as scikit-learn's `class_weight="balanced"`.

    The mean over the n images is 1, so that the learning rate keeps its meaning.
    """
    return torch.tensor([sum(counts) / (len(counts) * count) for count in counts])


def class_probabilities(counts: Sequence[int], strength: float) -> list[float]:
    """Return the probability that a drawn image is of each class, in proportion to count^(1 - strength)."""
    powers = [count ** (1 - strength) for count in counts]
    return [power / sum(powers) for power in powers]


def image_weights(targets: Sequence[int], counts: Sequence[int], strength: float) -> list[float]:
    """Return the probability with which each image is drawn: its class's, shared equally by the class's images."""
    shares = [chance / count for chance, count in zip(class_probabilities(counts, strength), counts, strict=True)]
    return [shares[target] for target in targets]


class ClassWeightedCrossEntropy(nn.Module):
    """PyTorch's cross-entropy, times the weight of an image's class, averaged over images.

    A mixed image has the losses of its two classes, in the proportions of the mixing.
    PyTorch's own `weight` differs with label smoothing: it multiplies the part of the smoothing that falls on each
    class by the weight of that class, so that every image is drawn towards the rare classes. It also divides by the sum
    of a batch's weights, so that the parts of a batch, in several processes or accumulation steps, would not add up.
    """

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, smoothing: float):
        super().__init__()
        self.register_buffer("weight", weight)
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits (B, classes).

        Args:
            targets: class indices (B,), or the proportions of mixed images (B, classes), which are not smoothed yet.
        """
        labels = F.cross_entropy(logits, targets, self.weight, reduction="none")  # (B,)
        uniform = -logits.float().log_softmax(1).mean(1)  # (B,)
        weight = targets @ self.weight if targets.is_floating_point() else self.weight[targets]  # (B,)
        return ((1 - self.smoothing) * labels + self.smoothing * weight * uniform).mean()
