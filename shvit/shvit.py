"""SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design.

Yun and Ro, CVPR 2024, https://arxiv.org/abs/2401.16456; reference code https://github.com/ysj9909/SHViT (MIT).
Module names are those of timm's port, which importing this file replaces: weights go both ways.

Shapes in comments: B batch, C channels, H×W the token grid, N = H·W tokens, D = qk_dim, P = partial_dim.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GroupNorm1, SelectAdaptivePool2d, calculate_drop_path_rates
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F

from .fold import ConvNorm, NormLinear, Residual, SqueezeExcite, fold_attention

__all__ = ["VARIANTS", "SHViT", "Variant", "rename_reference_keys", "to_reference"]

Layer = Callable[..., nn.Module]


class FFN(nn.Module):
    """Two 1×1 convolutions through `hidden_dim` channels; the branch starts at zero."""

    def __init__(self, dim: int, hidden_dim: int, act_layer: Layer = nn.ReLU, **dd: Any):
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden_dim, **dd)
        self.act = act_layer()
        self.pw2 = ConvNorm(hidden_dim, dim, norm_init=0.0, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pw2(self.act(self.pw1(x)))


class SHSA(nn.Module):
    """Single-head self-attention on the first `partial_dim` channels, normalized as one; the others pass beside it."""

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        partial_dim: int,
        norm_layer: Layer = GroupNorm1,
        act_layer: Layer = nn.ReLU,
        **dd: Any,
    ):
        super().__init__()
        self.scale = qk_dim**-0.5
        self.split_dims = [partial_dim, dim - partial_dim]
        self.qkv_dims = [qk_dim, qk_dim, partial_dim]
        self.pre_norm = norm_layer(partial_dim, **dd)
        self.qkv = ConvNorm(partial_dim, sum(self.qkv_dims), **dd)
        self.proj = nn.Sequential(act_layer(), ConvNorm(dim, dim, norm_init=0.0, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, _, H, W = x.shape
        x1, x2 = torch.split(x, self.split_dims, dim=1)  # (B, P, H, W) (B, C-P, H, W)
        qkv = self.qkv(self.pre_norm(x1)).flatten(2)  # (B, 2D+P, N)
        q, k, v = torch.split(qkv, self.qkv_dims, dim=1)  # (B, D, N) (B, D, N) (B, P, N)
        attn = (q.transpose(1, 2) @ k * self.scale).softmax(dim=-1)  # (B, N, N)
        x1 = (v @ attn.transpose(1, 2)).reshape(B, -1, H, W)  # (B, P, H, W)
        return self.proj(torch.cat([x1, x2], dim=1))

    def fuse(self) -> nn.Module:
        if not isinstance(self.pre_norm, GroupNorm1):
            return self  # another norm_layer: its parts are fused one by one
        return fold_attention(self.pre_norm, self.qkv, self.proj, self.qkv_dims[0], self.scale)


class BasicBlock(nn.Module):
    """Depthwise convolution, attention (where `use_attn`) and FFN, each residual."""

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        partial_dim: int,
        use_attn: bool,
        drop_path: float = 0.0,
        norm_layer: Layer = GroupNorm1,
        act_layer: Layer = nn.ReLU,
        **dd: Any,
    ):
        super().__init__()
        self.conv = Residual(ConvNorm(dim, dim, 3, groups=dim, norm_init=0.0, **dd), drop_path)
        self.mixer: nn.Module = nn.Identity()
        if use_attn:
            self.mixer = Residual(SHSA(dim, qk_dim, partial_dim, norm_layer, act_layer, **dd), drop_path)
        self.ffn = Residual(FFN(dim, 2 * dim, act_layer, **dd), drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(self.mixer(self.conv(x)))


class PatchMerging(nn.Module):
    """Inverted bottleneck that halves the grid, rounding up: (B, dim, H, W) → (B, out_dim, ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, dim: int, out_dim: int, act_layer: Layer = nn.ReLU, **dd: Any):
        super().__init__()
        hidden_dim = 4 * dim
        self.conv1 = ConvNorm(dim, hidden_dim, **dd)
        self.act1 = act_layer()
        self.conv2 = ConvNorm(hidden_dim, hidden_dim, 3, stride=2, groups=hidden_dim, **dd)
        self.act2 = act_layer()
        self.se = SqueezeExcite(hidden_dim, 0.25, **dd)
        self.conv3 = ConvNorm(hidden_dim, out_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.conv1(x))
        x = self.act2(self.conv2(x))
        return self.conv3(self.se(x))


def _refine(dim: int, act_layer: Layer, **dd: Any) -> list[nn.Module]:
    """Return the residual depthwise convolution and residual FFN on either side of a patch merging."""
    return [Residual(ConvNorm(dim, dim, 3, groups=dim, **dd)), Residual(FFN(dim, 2 * dim, act_layer, **dd))]


class Stage(nn.Module):
    """A downsample to half the grid (all stages but the first) and the blocks."""

    def __init__(
        self, in_dim: int | None, dim: int, drop_path: list[float], act_layer: Layer, dd: dict[str, Any], **block: Any
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if in_dim is not None:
            self.downsample = nn.Sequential(
                *_refine(in_dim, act_layer, **dd),
                PatchMerging(in_dim, dim, act_layer, **dd),
                *_refine(dim, act_layer, **dd),
            )
        blocks = [BasicBlock(dim, drop_path=rate, act_layer=act_layer, **block, **dd) for rate in drop_path]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class SHViT(nn.Module):
    """SHViT classifier and backbone: (B, in_chans, H, W) → logits (B, num_classes).

    Any input size works; features come at strides 16, 32 and 64, each rounded up. The deployed form
    (`shvit.deploy`) is this class too, with cheaper layers.

    Args:
        num_classes: classes of each head; 0 leaves the pooled features.
        global_pool: timm's pooling name, '' for none (then `num_classes` must be 0).
        embed_dim: channels of each stage; the first must be a multiple of 8 (the stem's first width is an eighth).
        depth, use_attn: blocks of each stage, and whether they have attention.
        partial_dim, qk_dim: channels that attention sees, and those of a query and of a key, for each stage.
        drop_path_rate: stochastic depth of the last block's branches; earlier blocks rise to it linearly.
        distilled: two heads as in DeiT without a token: a training forward returns both logits, inference their mean.
        device, dtype: where parameters are made; on the meta device call `to_empty` and `init_weights` afterwards.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: tuple[int, ...] = (128, 224, 320),
        depth: tuple[int, ...] = (2, 4, 5),
        partial_dim: tuple[int, ...] = (32, 48, 68),
        qk_dim: tuple[int, ...] = (16, 16, 16),
        use_attn: tuple[bool, ...] = (False, True, True),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        distilled: bool = False,
        norm_layer: Layer = GroupNorm1,
        act_layer: Layer = nn.ReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.distilled = self.distilled_training = distilled

        stem = [in_chans] + [embed_dim[0] // divisor for divisor in (8, 4, 2, 1)]
        convs = [ConvNorm(in_dim, out_dim, 3, stride=2, **dd) for in_dim, out_dim in pairwise(stem)]
        layers: list[nn.Module] = [layer for conv in convs for layer in (conv, act_layer())]
        self.patch_embed = nn.Sequential(*layers[:-1])  # no activation after the last

        drop_path: Any = calculate_drop_path_rates(drop_path_rate, list(depth), stagewise=True)
        stages, feature_info = [], []
        for i, dim in enumerate(embed_dim):
            block = {"qk_dim": qk_dim[i], "partial_dim": partial_dim[i], "use_attn": use_attn[i]}
            in_dim = embed_dim[i - 1] if i else None
            stages.append(Stage(in_dim, dim, drop_path[i], act_layer, dd, norm_layer=norm_layer, **block))
            feature_info.append({"num_chs": dim, "reduction": 2 ** (i + 4), "module": f"stages.{i}"})
        self.feature_info = feature_info
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self._make_head(num_classes, global_pool, dd)
        self.register_load_state_dict_pre_hook(_rename_on_load)

    def _make_head(self, num_classes: int, global_pool: str, dd: dict[str, Any]) -> None:
        """Make pooling and classifier(s), in the deployed form where the model is deployed, and in the model's mode."""
        if num_classes and not global_pool:
            raise ValueError(f"global_pool='' leaves a feature map, which {num_classes} classes cannot be read from; "
                             "pass num_classes=0 with it, or a pooling such as 'avg'")  # fmt: skip
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool).train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.flatten = (nn.Flatten(1) if global_pool else nn.Identity()).train(self.training)

        def head() -> nn.Module:
            if num_classes == 0:
                return nn.Identity().train(self.training)
            head = NormLinear(self.head_hidden_size, num_classes, **dd).train(self.training)
            return head.l if self.deployed else head

        self.head = head()
        self.head_dist = head() if self.distilled else None

    __jit_unused_properties__: ClassVar = ["deployed"]

    @property
    def deployed(self) -> bool:
        """True if the layers are in their inference form."""
        return isinstance(self.patch_embed[0], nn.Conv2d)

    def fuse(self) -> "SHViT":
        """Fuse every layer in place, as timm's port does; two heads stay two. `shvit.deploy` returns a copy."""
        reparameterize_model(self, inplace=True)
        return self

    def init_weights(self) -> None:
        """Re-initialize every parameter, as the constructor does; needed after `to_empty` on a meta-device model."""
        for module in self.modules():
            if reset := getattr(module, "reset_parameters", None):
                reset()
        for module in self.modules():
            if isinstance(module, ConvNorm | NormLinear):
                module.init_weights()

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay besides norms and biases: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter groups: the stem and the blocks, or the stages if `coarse`."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks' activations twice in training, to keep fewer of them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def set_distilled_training(self, enable: bool = True) -> None:
        """Set whether a training forward returns both heads' logits (the default when `distilled`) or their mean."""
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the linear layer (a pair when `distilled`), deployed or not; Identity without classes."""
        heads = [self.head] if self.head_dist is None else [self.head, self.head_dist]
        linears = tuple(head.l if isinstance(head, NormLinear) else head for head in heads)
        return linears if self.distilled else linears[0]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make new heads, and another pooling unless `global_pool` is None."""
        global_pool = self.global_pool.pool_type if global_pool is None else global_pool
        weight = next(self.patch_embed.parameters())
        self._make_head(num_classes, global_pool, {"device": weight.device, "dtype": weight.dtype})

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return (final features, the stages' outputs (B, C, ⌈H/16⌉, ⌈W/16⌉), …), or the outputs alone.

        Args:
            indices: the last n stages if an int, these stages if a list, all if None.
            stop_early: leave out the stages after the last one asked for.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt!r} is not supported; SHViT's features are 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.stages[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`; the head too, if it lost its stage or `prune_head`."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index + 1 < len(self.stages)
        if pruned:
            del self.stages[max_index + 1 :]
            self.num_features = int(self.feature_info[max_index]["num_chs"])
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_chans, H, W) → (B, C, ⌈H/64⌉, ⌈W/64⌉)."""
        return self.stages(self.patch_embed(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False):
        """Map (B, C, H, W) → logits, or the pooled (B, C) if `pre_logits`."""
        x = self.flatten(self.global_pool(x))
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        if pre_logits:
            return x
        if self.head_dist is None:
            return self.head(x)
        logits, logits_dist = self.head(x), self.head_dist(x)
        if self.training and self.distilled_training and not torch.jit.is_scripting():
            return logits, logits_dist
        return (logits + logits_dist) / 2

    def forward(self, x: torch.Tensor):
        """Return logits for (B, in_chans, H, W): (B, num_classes), or a pair of them in distilled training."""
        return self.forward_head(self.forward_features(x))


@dataclass(frozen=True)
class Variant:
    """Widths and depths that distinguish one SHViT from another; one value for each of the three stages."""

    embed_dim: tuple[int, int, int]
    depth: tuple[int, int, int]
    partial_dim: tuple[int, int, int]


VARIANTS = {  # reference: model/build.py of ysj9909/SHViT; millions of parameters, GMACs at the default size
    "shvit_s1": Variant(embed_dim=(128, 224, 320), depth=(2, 4, 5), partial_dim=(32, 48, 68)),  # 6.3 M, 0.24
    "shvit_s2": Variant(embed_dim=(128, 308, 448), depth=(2, 4, 5), partial_dim=(32, 66, 96)),  # 11.5 M, 0.37
    "shvit_s3": Variant(embed_dim=(192, 352, 448), depth=(3, 5, 5), partial_dim=(48, 75, 96)),  # 14.2 M, 0.60
    "shvit_s4": Variant(embed_dim=(224, 336, 448), depth=(4, 7, 6), partial_dim=(48, 72, 96)),  # 16.6 M, 0.99
}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "hf_hub_id": "timm/",  # completed by timm to timm/<name>.in1k
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (4, 4),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0.c",
        "classifier": "head.l",
        "license": "mit",
        "paper_ids": "arXiv:2401.16456",
        "paper_name": "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
        "origin_url": "https://github.com/ysj9909/SHViT",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "shvit_s1.in1k": _cfg(),
        "shvit_s2.in1k": _cfg(),
        "shvit_s3.in1k": _cfg(),
        "shvit_s4.in1k": _cfg(input_size=(3, 256, 256)),
    }
)


def _register(name: str) -> Callable[..., SHViT]:
    """Register a function that creates a variant with timm, in place of timm's port of the same name."""

    def create(pretrained: bool = False, **kwargs: Any) -> SHViT:
        if kwargs.get("distilled"):
            overlay = {"classifier": ("head.l", "head_dist.l"), **(kwargs.get("pretrained_cfg_overlay") or {})}
            kwargs["pretrained_cfg_overlay"] = overlay
        features = {"out_indices": (0, 1, 2), "flatten_sequential": True}
        options = {**asdict(VARIANTS[name]), **kwargs}
        return build_model_with_cfg(SHViT, name, pretrained, feature_cfg=features, **options)

    create.__name__ = create.__qualname__ = name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"Overwriting {name} in registry")
        return register_model(create)


shvit_s1, shvit_s2, shvit_s3, shvit_s4 = map(_register, VARIANTS)


Value = TypeVar("Value")
Rename = tuple[str, str | Callable[[re.Match[str]], str]]
FROM_REFERENCE: tuple[Rename, ...] = (  # stages 2 and 3 begin with the three parts of their downsample
    (r"^blocks1\.(\d+)\.", r"stages.0.blocks.\1."),
    (r"^blocks([23])\.0\.([01])\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.{m[2]}."),
    (r"^blocks([23])\.1\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.2."),
    (r"^blocks([23])\.2\.([01])\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.{int(m[2]) + 3}."),
    (r"^blocks([23])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 3}."),
)
TO_REFERENCE: tuple[Rename, ...] = (
    (r"^stages\.0\.blocks\.(\d+)\.", r"blocks1.\1."),
    (r"^stages\.([12])\.downsample\.([01])\.", lambda m: f"blocks{int(m[1]) + 1}.0.{m[2]}."),
    (r"^stages\.([12])\.downsample\.2\.", lambda m: f"blocks{int(m[1]) + 1}.1."),
    (r"^stages\.([12])\.downsample\.([34])\.", lambda m: f"blocks{int(m[1]) + 1}.2.{int(m[2]) - 3}."),
    (r"^stages\.([12])\.blocks\.(\d+)\.", lambda m: f"blocks{int(m[1]) + 1}.{int(m[2]) + 3}."),
)


def _rename(key: str, renames: tuple[Rename, ...]) -> str:
    matching = (each for each in renames if re.match(each[0], key))
    return next((re.sub(pattern, replacement, key) for pattern, replacement in matching), key)


def rename_reference_keys(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Return the same tensors with the reference's names turned into ours; other names stay."""
    return {_rename(key, FROM_REFERENCE): value for key, value in state_dict.items()}


def to_reference(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Return the same tensors with our names turned into the reference's: the inverse of `rename_reference_keys`."""
    return {_rename(key, TO_REFERENCE): value for key, value in state_dict.items()}


def _rename_on_load(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Let `load_state_dict` take the reference's names."""
    own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    renamed = rename_reference_keys({key[len(prefix) :]: value for key, value in own.items()})
    state_dict.update({prefix + key: value for key, value in renamed.items()})
