"""Backbones for MMDetection: SHViT, and any other timm model."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from shvit.checkpoint import load_checkpoint
from shvit.create import create_model
from shvit.errors import InputError
from shvit.shvit import VARIANTS, SHViT
from shvit.weights.resolve import find_weights


def resolve_weights(checkpoint: str | Path) -> Path:
    """Return a file of weights, or that of a published name; raises as `find_weights`."""
    return find_weights(checkpoint, lambda line: print_log(line, "current"))[0]


class _Backbone(nn.Module):
    """A backbone with norms and stages that are frozen, as detectors need.

    A detector's batches are too small for statistics, so the norms keep those of the classifier.
    """

    norm_eval: bool

    def freeze(self) -> None:
        """Freeze the parameters of `frozen` modules, before a wrapper lists the trainable ones."""
        for module in self.frozen():
            for parameter in module.parameters():
                parameter.requires_grad = False

    def train(self, mode: bool = True) -> "_Backbone":
        super().train(mode)
        for module in self.frozen():
            module.eval()
        for module in self.modules():
            if self.norm_eval and isinstance(module, _BatchNorm):
                module.eval()
        return self

    def frozen(self) -> Sequence[nn.Module]:
        """Return the modules that are not trained at all."""
        return ()


@MODELS.register_module("SHViT")
class SHViTBackbone(_Backbone, SHViT):
    """SHViT up to its stages' outputs: (B, 3, H, W) → a tuple of (B, embed_dim[i], ⌈H/s⌉, ⌈W/s⌉), s = 16, 32, 64.

    Its parameters have SHViT's own names, and `load_state_dict` takes the reference's too.

    Args:
        model: shvit_s1 … shvit_s4.
        out_indices: the stages whose outputs are given, 0 to 2.
        frozen_stages: -1 for none, 0 for the stem, n for the stem and n stages; their parameters need no gradient.
        norm_eval: BatchNorms keep their statistics in training mode.
        drop_path_rate: stochastic depth of the last block, as in SHViT.
        with_cp: gradient checkpointing: less memory for about a third more time.
        init_cfg: None, or {"type": "Pretrained", "checkpoint": …}: a file of any layout that `shvit` reads, also a
            detector's with the prefix `backbone.`; or a name of `shvit weights list`, which is downloaded once.
        fields: any other argument of SHViT, in place of the variant's.

    Raises:
        InputError: an unknown model, or an argument that is out of range.
    """

    def __init__(
        self,
        model: str,
        out_indices: Sequence[int] = (0, 1, 2),
        frozen_stages: int = -1,
        norm_eval: bool = True,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | None = None,
        **fields: Any,
    ):
        if model not in VARIANTS:
            raise InputError(f"unknown SHViT {model!r}; choose from {', '.join(VARIANTS)}, or type='TimmBackbone'")
        arguments = {**asdict(VARIANTS[model]), **fields}
        super().__init__(num_classes=0, global_pool="", drop_path_rate=drop_path_rate, **arguments)
        last = len(self.stages) - 1
        if not out_indices or not all(0 <= index <= last for index in out_indices):
            raise InputError(f"out_indices {tuple(out_indices)} is out of range; choose from 0 to {last}")
        if not -1 <= frozen_stages <= last + 1:
            raise InputError(f"frozen_stages {frozen_stages} is out of range; choose from -1 (none) to {last + 1}")
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.init_cfg = _checked(init_cfg)
        self.set_grad_checkpointing(with_cp)
        self.freeze()

    def frozen(self) -> Sequence[nn.Module]:
        stages = list(self.stages)
        unused = stages[max(self.out_indices) + 1 :]
        return [self.patch_embed, *stages[: self.frozen_stages], *unused] if self.frozen_stages >= 0 else unused

    def init_weights(self) -> None:
        """Load the weights that `init_cfg` names, strictly; otherwise the constructor's random ones stay."""
        if self.init_cfg is not None:
            path = resolve_weights(self.init_cfg["checkpoint"])
            load_checkpoint(self, path, reset_head=True)
            _tell(self, path)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.forward_intermediates(x, indices=list(self.out_indices), intermediates_only=True)
        return tuple(maps)  # type: ignore[arg-type]


@MODELS.register_module()
class TimmBackbone(_Backbone):
    """Any `features_only` model of timm: (B, 3, H, W) → a tuple of its feature maps, finest first.

    Args:
        model: a name that `timm.create_model` knows.
        out_indices: the feature maps that are given; all where None.
        norm_eval: BatchNorms keep their statistics in training mode.
        init_cfg: None, or {"type": "Pretrained", "checkpoint": …} with a file of the whole classifier in timm's layout.
        pretrained: begin with timm's own weights, from the hub.
        arguments: passed to `timm.create_model`.

    Raises:
        InputError: timm does not know the model, or has no feature maps of it.
    """

    def __init__(
        self,
        model: str,
        out_indices: Sequence[int] | None = None,
        norm_eval: bool = True,
        init_cfg: dict[str, Any] | None = None,
        pretrained: bool = False,
        **arguments: Any,
    ):
        super().__init__()
        self.name, self.arguments = model, arguments
        self.norm_eval = norm_eval
        self.init_cfg = _checked(init_cfg)
        if not timm.is_model(model):
            create_model(model)  # which says what was meant
        levels: dict[str, Any] = {} if out_indices is None else {"out_indices": tuple(out_indices)}
        try:
            self.model = timm.create_model(model, pretrained, features_only=True, **levels, **arguments)
        except (RuntimeError, AttributeError, AssertionError, IndexError) as error:
            raise InputError(f"timm gives no feature maps {out_indices or ''} of {model!r} ({error}); choose another "
                             "model or out_indices") from error  # fmt: skip

    def init_weights(self) -> None:
        """Load the classifier that `init_cfg` names, strictly, and keep the part that computes feature maps."""
        if self.init_cfg is None:
            return
        path = resolve_weights(self.init_cfg["checkpoint"])
        whole = create_model(self.name, path, **self.arguments).state_dict()
        flat = {name.replace(".", "_"): tensor for name, tensor in whole.items()}  # FeatureListNet joins names by _
        own = self.model.state_dict()
        self.model.load_state_dict({name: flat[name.replace(".", "_")] for name in own})
        _tell(self, path)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.model(x))


def _checked(init_cfg: dict[str, Any] | None) -> dict[str, Any] | None:
    if init_cfg is not None and (init_cfg.get("type") != "Pretrained" or "checkpoint" not in init_cfg):
        raise InputError(f"init_cfg {dict(init_cfg)} of the backbone is not known; give dict(type='Pretrained', "
                         "checkpoint=FILE), or None")  # fmt: skip
    return init_cfg


def _tell(backbone: nn.Module, path: Path) -> None:
    number = len(backbone.state_dict())
    print_log(f"backbone: all {number} tensors loaded from {path}", "current", logging.INFO)
