"""Operators for an mmcv that was installed without compiled ones: torchvision's, which need no compiler.

`import mmdet.models` imports all of `mmcv.ops`, and that `mmcv._ext`, the compiled module. Where there is none, a
module of that name is put in its place: NMS and RoIAlign are all that Mask R-CNN and RetinaNet call.
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAME = "mmcv._ext"
AVERAGE = 1  # RoIAlign's pool_mode; 0 takes the maximum


def has_compiled_ops() -> bool:
    """Return whether mmcv has compiled operators of its own."""
    return importlib.util.find_spec("mmcv") is not None and isinstance(_spec(), ModuleSpec) and not stands_in()


def _spec() -> ModuleSpec | None:
    return sys.modules[NAME].__spec__ if NAME in sys.modules else importlib.util.find_spec(NAME)


def stands_in() -> bool:
    """Return whether torchvision's operators are in place."""
    return isinstance(sys.modules.get(NAME), Operators)


def stand_in() -> None:
    """Install torchvision's operators, unless mmcv has compiled ones or they are installed already."""
    if not has_compiled_ops():
        sys.modules.setdefault(NAME, Operators())


class Operators(ModuleType):
    """A module with the names of `mmcv._ext`; those that are not below raise NotImplementedError when called."""

    def __init__(self) -> None:
        super().__init__(NAME, __doc__)
        self.__spec__ = ModuleSpec(NAME, loader=None)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise NotImplementedError(
                f"{name} needs mmcv's compiled operators, which are not installed; docs/how-to/detection.md says how "
                "to compile them"
            )

        return missing

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        """Return indices of the boxes (N, 4) to keep, highest score first; `offset` is added to widths and heights."""
        from torchvision.ops import nms

        return nms(boxes + boxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)

    @staticmethod
    def roi_align_forward(
        features: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, *where: Any, **how: Any
    ) -> None:
        """Write the averages over each of `rois` (N, 5) to `output` (N, C, aligned_height, aligned_width)."""
        from torchvision.ops import roi_align

        height, width, scale, ratio, aligned = _averages(*where, **how)
        output.copy_(roi_align(features, rois, (height, width), scale, ratio, aligned))

    @staticmethod
    def roi_align_backward(
        grad: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, *where: Any, **how: Any
    ) -> None:
        """Write the gradient with respect to the features to `grad_input` (B, C, H, W)."""
        import torchvision  # noqa: F401  (registers the operator)

        height, width, scale, *rest = _averages(*where, **how)
        backward = torch.ops.torchvision._roi_align_backward
        grad_input.copy_(backward(grad, rois, scale, height, width, *grad_input.shape, *rest))


def _averages(
    aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool
) -> tuple[int, int, float, int, bool]:
    """Return RoIAlign's options besides `pool_mode`, by mmcv's names, which must be averages."""
    if pool_mode != AVERAGE:
        raise NotImplementedError("RoIAlign with pool_mode='max' needs mmcv's compiled operators; choose 'avg'")
    return aligned_height, aligned_width, spatial_scale, sampling_ratio, aligned
