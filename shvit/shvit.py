"""SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design.

Yun and Ro, CVPR 2024, https://arxiv.org/abs/2401.16456; reference code https://github.com/ysj9909/SHViT (MIT).

Module names, and so state dicts, are those of timm's port: weights go both ways. Importing this file registers
`shvit_s1` … `shvit_s4` with timm in place of that port.

Shapes in comments: B batch, C channels, H×W the token grid, N = H·W tokens, D = qk_dim, P = partial_dim.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    GroupNorm1,
    SelectAdaptivePool2d,
    SEModule,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F

from .checkpoint import rename_reference_keys

__all__ = ["VARIANTS", "SHViT", "Variant"]


class Fusible:
    """A layer with a cheaper inference form, found by `timm.utils.reparameterize_model` through `fuse`."""

    def fuse(self) -> nn.Module:
        """The layer's inference form as a new module, or the layer itself where it has none."""
        from .deployment import fuse_layer  # deploy.py knows the layers, not the other way round

        return fuse_layer(self)  # type: ignore[arg-type]


class ConvNorm(nn.Sequential, Fusible):
    """Bias-free convolution with 'same' padding, then BatchNorm whose weight starts at `norm_init`."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        norm_init: float = 1.0,
        **dd: Any,
    ):
        super().__init__()
        self.norm_init = norm_init
        padding = kernel_size // 2
        self.c = nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_dim, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.constant_(self.bn.weight, self.norm_init)


class NormLinear(nn.Sequential, Fusible):
    """BatchNorm, then the classifier: (B, C) → (B, num_classes)."""

    def __init__(self, in_dim: int, out_dim: int, **dd: Any):
        super().__init__()
        self.bn = nn.BatchNorm1d(in_dim, **dd)
        self.l = nn.Linear(in_dim, out_dim, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)


class Residual(nn.Module, Fusible):
    """x + m(x), with stochastic depth of rate `drop_path` on m."""

    def __init__(self, m: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.m = m
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.m(x))


class FFN(nn.Module):
    """Two 1×1 convolutions through `hidden_dim` channels; the branch starts at zero."""

    def __init__(self, dim: int, hidden_dim: int, act_layer: Callable[[], nn.Module] = nn.ReLU, **dd: Any):
        super().__init__()
        self.pw1 = ConvNorm(dim, hidden_dim, **dd)
        self.act = act_layer()
        self.pw2 = ConvNorm(hidden_dim, dim, norm_init=0.0, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pw2(self.act(self.pw1(x)))


class SHSA(nn.Module, Fusible):
    """Single-head self-attention on the first `partial_dim` channels; the others pass beside it.

    The norm is a GroupNorm of one group: its statistics run over channels and positions together.
    """

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        partial_dim: int,
        norm_layer: Callable[..., nn.Module] = GroupNorm1,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
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


class BasicBlock(nn.Module):
    """Depthwise convolution, attention (where `use_attn`) and FFN, each residual."""

    def __init__(
        self,
        dim: int,
        qk_dim: int,
        partial_dim: int,
        use_attn: bool,
        drop_path: float = 0.0,
        norm_layer: Callable[..., nn.Module] = GroupNorm1,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
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


class SqueezeExcite(SEModule, Fusible):
    """timm's squeeze-excite: channels gated by a sigmoid of their means."""


class PatchMerging(nn.Module):
    """Inverted bottleneck that halves the grid, rounding up: (B, dim, H, W) → (B, out_dim, ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, dim: int, out_dim: int, act_layer: Callable[[], nn.Module] = nn.ReLU, **dd: Any):
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


def _refine(dim: int, act_layer: Callable[[], nn.Module], **dd: Any) -> list[nn.Module]:
    """What stands on either side of a patch merging: a residual depthwise convolution and a residual FFN."""
    return [Residual(ConvNorm(dim, dim, 3, groups=dim, **dd)), Residual(FFN(dim, 2 * dim, act_layer, **dd))]


class Stage(nn.Module):
    """A downsample to half the grid (all stages but the first) and the blocks."""

    def __init__(
        self,
        in_dim: int | None,
        dim: int,
        depth: int,
        drop_path: list[float],
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        dd: dict[str, Any] | None = None,
        **block: Any,
    ):
        super().__init__()
        dd = dd or {}
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if in_dim is not None:
            self.downsample = nn.Sequential(
                *_refine(in_dim, act_layer, **dd),
                PatchMerging(in_dim, dim, act_layer, **dd),
                *_refine(dim, act_layer, **dd),
            )
        self.blocks = nn.Sequential(
            *[BasicBlock(dim, drop_path=drop_path[i], act_layer=act_layer, **block, **dd) for i in range(depth)]
        )

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
        in_chans: channels of the input image.
        num_classes: classes of each head; 0 leaves the pooled features.
        global_pool: timm's pooling name, '' for none (then `num_classes` must be 0).
        embed_dim: channels of each stage; `embed_dim[0]` must be a multiple of 8 (the stem's first width is an eighth).
        depth: blocks of each stage.
        partial_dim: channels that attention sees, for each stage.
        qk_dim: channels of a query and of a key, for each stage.
        use_attn: whether a stage's blocks have attention.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block's branches; earlier blocks rise to it linearly.
            The reference uses none.
        distilled: two heads as in DeiT without a token: a training forward returns both logits as a tuple,
            inference their mean.
        norm_layer: the attention's norm.
        act_layer: every activation.
        device: where parameters are made; on the meta device call `to_empty` and `init_weights` afterwards.
        dtype: the parameters' type.
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
        norm_layer: Callable[..., nn.Module] = GroupNorm1,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.distilled = self.distilled_training = distilled

        stem = [in_chans] + [embed_dim[0] // divisor for divisor in (8, 4, 2, 1)]
        layers: list[nn.Module] = []
        for in_dim, out_dim in pairwise(stem):
            layers += [ConvNorm(in_dim, out_dim, 3, stride=2, **dd), act_layer()]
        self.patch_embed = nn.Sequential(*layers[:-1])  # no activation after the last

        drop_path: Any = calculate_drop_path_rates(drop_path_rate, list(depth), stagewise=True)
        self.stages = nn.Sequential(
            *[
                Stage(
                    in_dim=embed_dim[i - 1] if i else None,
                    dim=embed_dim[i],
                    depth=depth[i],
                    drop_path=drop_path[i],
                    qk_dim=qk_dim[i],
                    partial_dim=partial_dim[i],
                    use_attn=use_attn[i],
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    dd=dd,
                )
                for i in range(len(embed_dim))
            ]
        )
        self.feature_info = [
            {"num_chs": dim, "reduction": 2 ** (i + 4), "module": f"stages.{i}"} for i, dim in enumerate(embed_dim)
        ]
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self._make_head(num_classes, global_pool, dd)
        self.register_load_state_dict_pre_hook(_rename_on_load)

    def _make_head(self, num_classes: int, global_pool: str, dd: dict[str, Any]) -> None:
        """Pooling and the classifier(s), in the deployed form where the model is deployed, and in the model's mode."""
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
        """Whether the layers are in their inference form (see shvit.deploy)."""
        return isinstance(self.patch_embed[0], nn.Conv2d)

    @torch.jit.ignore
    def fuse(self) -> "SHViT":
        """Fuses every layer in place, as timm's port does, and returns the model; `shvit.deploy` gives a copy.

        A distilled model keeps its two heads.
        """
        reparameterize_model(self, inplace=True)
        return self

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws every parameter anew, as the constructor does; needed after `to_empty` on a meta-device model."""
        for module in self.modules():
            if reset := getattr(module, "reset_parameters", None):
                reset()
        for module in self.modules():
            if isinstance(module, ConvNorm | NormLinear):
                module.init_weights()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay besides norms and biases: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter groups: the stem and the blocks, or the stages if `coarse`."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)"}
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks' activations twice in training, to keep fewer of them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a training forward returns both heads' logits (the default when `distilled`) or their mean."""
        self.distilled_training = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The linear layer (a pair of them when `distilled`), deployed or not; Identity without classes."""
        heads = [self.head] if self.head_dist is None else [self.head, self.head_dist]
        linears = tuple(head.l if isinstance(head, NormLinear) else head for head in heads)
        return linears if self.distilled else linears[0]

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads, and another pooling unless `global_pool` is None."""
        if global_pool is None:
            global_pool = self.global_pool.pool_type
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
        """The stages' outputs, with the final features unless `intermediates_only`.

        Args:
            x: (B, in_chans, H, W).
            indices: the last n stages if an int, these stages if a list, all if None.
            norm: accepted for timm; SHViT has no final norm.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: 'NCHW' alone.
            intermediates_only: return the list alone.

        Returns:
            A list of (B, C, ⌈H/16⌉, ⌈W/16⌉), …, or (final features, that list).
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
        """Drops the stages behind the last of `indices`; the head too, if it lost its stage or `prune_head`."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index + 1 < len(self.stages)
        if pruned:
            del self.stages[max_index + 1 :]
            self.num_features = int(self.feature_info[max_index]["num_chs"])
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) → (B, C, ⌈H/64⌉, ⌈W/64⌉)."""
        return self.stages(self.patch_embed(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False):
        """(B, C, H, W) → logits, or the pooled (B, C) if `pre_logits`."""
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


def _rename_on_load(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets `load_state_dict` take the reference's parameter names."""
    own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    renamed = rename_reference_keys({key[len(prefix) :]: value for key, value in own.items()})
    state_dict.update({prefix + key: value for key, value in renamed.items()})


@dataclass(frozen=True)
class Variant:
    """What distinguishes one SHViT from another; one value for each of the three stages."""

    embed_dim: tuple[int, int, int]
    depth: tuple[int, int, int]
    partial_dim: tuple[int, int, int]


VARIANTS = {  # reference: model/build.py of ysj9909/SHViT
    "shvit_s1": Variant(embed_dim=(128, 224, 320), depth=(2, 4, 5), partial_dim=(32, 48, 68)),
    "shvit_s2": Variant(embed_dim=(128, 308, 448), depth=(2, 4, 5), partial_dim=(32, 66, 96)),
    "shvit_s3": Variant(embed_dim=(192, 352, 448), depth=(3, 5, 5), partial_dim=(48, 75, 96)),
    "shvit_s4": Variant(embed_dim=(224, 336, 448), depth=(4, 7, 6), partial_dim=(48, 72, 96)),
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


def _create_shvit(name: str, pretrained: bool = False, **kwargs: Any) -> SHViT:
    if kwargs.get("distilled"):
        overlay = {"classifier": ("head.l", "head_dist.l"), **(kwargs.get("pretrained_cfg_overlay") or {})}
        kwargs["pretrained_cfg_overlay"] = overlay
    return build_model_with_cfg(
        SHViT,
        name,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2), "flatten_sequential": True},
        **{**asdict(VARIANTS[name]), **kwargs},
    )


def _register(entrypoint: Callable[..., SHViT]) -> Callable[..., SHViT]:
    """timm's `register_model`, without its warning that the name was taken: replacing timm's port is the purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f"Overwriting {entrypoint.__name__} in registry")
        return register_model(entrypoint)


@_register
def shvit_s1(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """6.3 M parameters, 0.24 GMACs at 224 px."""
    return _create_shvit("shvit_s1", pretrained, **kwargs)


@_register
def shvit_s2(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """11.5 M parameters, 0.37 GMACs at 224 px."""
    return _create_shvit("shvit_s2", pretrained, **kwargs)


@_register
def shvit_s3(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """14.2 M parameters, 0.60 GMACs at 224 px."""
    return _create_shvit("shvit_s3", pretrained, **kwargs)


@_register
def shvit_s4(pretrained: bool = False, **kwargs: Any) -> SHViT:
    """16.6 M parameters, 0.99 GMACs at 256 px."""
    return _create_shvit("shvit_s4", pretrained, **kwargs)
