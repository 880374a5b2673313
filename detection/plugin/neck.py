"""The feature pyramid for a backbone whose finest stride is 16: finer levels by transposed convolutions."""

from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import nn
from torch.nn import functional as F


@MODELS.register_module()
class TransposedFPN(BaseModule):
    """FPN whose finer levels are successive transposed convolutions (2×2, stride 2) of the finest lateral.

    Levels coarser than the backbone's are stride-2 subsamplings of the coarsest output. Parameters have the names of
    the reference's detection checkpoints (its neck is `EfficientViTFPN` of github.com/microsoft/Cream), where
    `extra_trans_convs` count from coarse to fine and `extra_fpn_convs` from fine to coarse.

    Args:
        in_channels: of the backbone's feature maps, finest first.
        out_channels: of every level.
        num_outs: levels in all.
        num_extra_trans_convs: levels that are finer than the backbone's; none makes it MMDetection's FPN.
        init_cfg: mmengine's; Xavier's uniform distribution for convolutions by default, as FPN has it.

    Raises:
        ValueError: fewer levels than the backbone and the transposed convolutions give.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int = 5,
        num_extra_trans_convs: int = 0,
        init_cfg: dict | list | None = None,
    ):
        super().__init__(init_cfg or {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"})
        self.in_channels = list(in_channels)
        self.extra_levels = num_outs - num_extra_trans_convs - len(in_channels)
        if self.extra_levels < 0:
            raise ValueError(
                f"num_outs={num_outs} is less than {len(in_channels)} levels of the backbone and "
                f"{num_extra_trans_convs} finer ones; raise it to {num_outs - self.extra_levels}"
            )
        self.lateral_convs = nn.ModuleList(_named(nn.Conv2d(dim, out_channels, 1)) for dim in in_channels)
        self.fpn_convs = nn.ModuleList(_smooth(out_channels) for _ in in_channels)
        finer = range(num_extra_trans_convs)
        self.extra_trans_convs = nn.ModuleList(
            _named(nn.ConvTranspose2d(out_channels, out_channels, 2, stride=2)) for _ in finer
        )
        self.extra_fpn_convs = nn.ModuleList(_smooth(out_channels) for _ in finer)
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return maps (B, out_channels, …) of each level, given (B, in_channels[i], H_i, W_i); both finest first."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        for fine, coarse in reversed(list(zip(range(len(laterals)), range(1, len(laterals)), strict=False))):
            size = laterals[fine].shape[2:]
            laterals[fine] = laterals[fine] + F.interpolate(laterals[coarse], size=size, mode="nearest")
        finer = [laterals[0]]
        for conv in self.extra_trans_convs:
            finer.insert(0, conv(finer[0]))  # twice the height and width
        outs = [conv(x) for conv, x in zip(self.extra_fpn_convs, finer[:-1], strict=True)]
        outs += [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]
        for _ in range(self.extra_levels):
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)


def _smooth(dim: int) -> nn.Sequential:
    """Return the 3×3 convolution behind each level."""
    return _named(nn.Conv2d(dim, dim, 3, padding=1))


def _named(conv: nn.Module) -> nn.Sequential:
    """Return a convolution as `conv` inside a module, which is where mmcv's ConvModule has it."""
    named = nn.Sequential()
    named.add_module("conv", conv)
    return named
