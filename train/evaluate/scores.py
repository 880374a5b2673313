"""The outputs for a set of images beside their targets, from which figures that are no sums of images are computed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shvit.errors import InputError

from .classification import Predict

if TYPE_CHECKING:
    from ..distributed import World

MAX_SCORES = 1_000_000_000
"""Outputs that are kept, 8 GB with their targets: 12,500 labels of 80,000 images."""


@dataclass(frozen=True)
class Scores:
    """Outputs and targets of an evaluation; those of disjoint sets are joined."""

    outputs: torch.Tensor
    """(n, targets) float32, on the CPU."""
    targets: torch.Tensor
    """(n, targets) float32, on the CPU; NaN for a target that is not known."""

    def across(self, world: "World") -> "Scores":
        """Return the scores of all processes."""
        parts = world.gather((self.outputs, self.targets))
        return Scores(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def checked(self) -> "Scores":
        """Return the scores of images with any known target.

        Raises:
            InputError: there is none, or outputs are not finite.
        """
        known = (~self.targets.isnan()).any(dim=1)
        outputs, targets = self.outputs[known], self.targets[known]
        if not len(targets):
            raise InputError("no image to evaluate on could be read; give others")
        if unusable := int((~outputs.isfinite().all(dim=1)).sum()):
            raise InputError(f"the model's outputs are not finite for {unusable} of {len(outputs)} images; its weights "
                             "are damaged, or its training diverged")  # fmt: skip
        return Scores(outputs, targets)


def collect(
    predict: Predict,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num_targets: int,
    device: torch.device | str = "cpu",
) -> Scores:
    """Run every batch through `predict` and keep its outputs.

    Args:
        batches: (images, float32 (B, targets)); an image whose targets are all NaN does not count.
        device: where `predict` wants its images.

    Raises:
        InputError: images have other targets than the model, or too many for memory.
    """
    outputs, targets, total = [torch.empty(0, num_targets)], [torch.empty(0, num_targets)], 0
    for images, expected in batches:
        if expected.dim() != 2 or expected.shape[1] != num_targets:
            raise InputError(f"images with targets of shape {tuple(expected.shape[1:])}, and the model has "
                             f"{num_targets} outputs; evaluate on the labels that it was trained for")  # fmt: skip
        total += expected.numel()
        if total > MAX_SCORES:
            raise InputError(f"more than {MAX_SCORES:,} outputs are too many to keep; evaluate on fewer images")
        outputs.append(predict(images.to(device, non_blocking=True)).float().cpu())
        targets.append(expected)
    return Scores(torch.cat(outputs), torch.cat(targets))
