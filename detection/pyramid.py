"""A detector's backbone and neck as a model with timm's feature maps, which is the part that a phone runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from shvit.errors import InputError

from .detector import create_detector, load_detector
from .parsing.config import load_config

if TYPE_CHECKING:
    from mmdet.models.detectors import BaseDetector

IMG_SIZE = 512  # pixels, where none is asked for: the paper's table of detectors


class Pyramid(nn.Module):
    """A detector's backbone and neck: (B, 3, H, W), normalized → the maps that its heads take, finest first.

    It has what timm asks of a model with feature maps, so that `shvit export --features` and `verify` take it.

    Args:
        detector: in eval mode.
        strides: of each map.
    """

    num_classes = 0
    in_chans = 3

    def __init__(self, detector: "BaseDetector", strides: list[int]):
        super().__init__()
        self.backbone, self.neck = detector.backbone, detector.neck
        mean, std = ((getattr(detector.data_preprocessor, name).flatten() / 255).tolist() for name in ("mean", "std"))
        self.pretrained_cfg = {
            "input_size": (3, IMG_SIZE, IMG_SIZE),
            "mean": tuple(mean),
            "std": tuple(std),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "border",
        }
        with torch.no_grad():
            channels = [each.shape[1] for each in self(torch.zeros(1, 3, 64, 64))]
        self.feature_info = [
            {"num_chs": chans, "reduction": stride, "module": "neck"}
            for chans, stride in zip(channels, strides, strict=True)
        ]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.neck(self.backbone(x))

    def forward_intermediates(
        self, x: torch.Tensor, indices: Sequence[int] | None = None, **_: object
    ) -> list[torch.Tensor]:
        """Return the maps with these indices; all where None."""
        maps = self(x)
        return [maps[index] for index in (range(len(maps)) if indices is None else indices)]


def create_pyramid(config: str, checkpoint: Path | None = None) -> Pyramid:
    """Return the backbone and neck of a config's detector, with random weights where no checkpoint is given.

    Raises:
        InputError: as `load_config` and `load_detector`, or the detector has no anchors that tell the strides.
    """
    opened = load_config(config)
    detector = create_detector(opened) if checkpoint is None else load_detector(opened, checkpoint)
    head = detector.rpn_head if hasattr(detector, "rpn_head") else getattr(detector, "bbox_head", None)
    generator = getattr(head, "prior_generator", None)
    if generator is None or not hasattr(detector, "neck"):
        raise InputError(f"{config}: has no neck or no anchors; Mask R-CNN and RetinaNet have")
    return Pyramid(detector, [stride[0] for stride in generator.strides]).eval()
