"""SHViT compared with the designs that it replaces, built from its own layers: the paper's argument in numbers.

Nothing here is trained; the alternatives are only counted.
"""

from dataclasses import dataclass

import torch
from timm.layers import Attention2d, GroupNorm1
from torch import nn

from shvit.shvit import SHSA, ConvNorm, SHViT

from .counting import Cost, cost

HEAD_DIM = 32  # channels of one head, as is usual
STEPS = 4  # iterations for the width of a pyramid; its multiply-adds are then within a percent or two
SAME = 0.05  # relative difference below which two figures count as about the same


@dataclass(frozen=True)
class MacroDesign:
    """A stem and its stages."""

    stride: int
    """Pixels per token of the first stage, in each direction."""
    embed_dim: tuple[int, ...]
    depth: tuple[int, ...]
    tokens: tuple[int, ...]
    cost: Cost


@dataclass(frozen=True)
class MicroDesign:
    """One attention layer: norm, attention and projection."""

    stage: str
    tokens: int
    heads: int
    channels: int
    """Channels that attention works on."""
    cost: Cost


@dataclass(frozen=True)
class Comparison:
    """The model's own design and the alternative to it."""

    own: MacroDesign | MicroDesign
    other: MacroDesign | MicroDesign
    summary: str
    """The figures in a sentence."""


def compare_macro(model: SHViT, x: torch.Tensor) -> Comparison:
    """Compare the stem and stages of a SHViT before deployment with a stride-4 pyramid's, on one image `x`."""
    with torch.random.fork_rng(devices=[]):  # the alternative's parameters take none of the caller's random numbers
        own, other = _macro(model, x), _macro(stride_4(model, x), x)
    return Comparison(own, other, _summarize_macro(own, other))


def compare_micro(model: SHViT, x: torch.Tensor) -> list[Comparison]:
    """Compare the attention layer of each stage that has one with a multi-head layer, on one image `x`."""
    comparisons = []
    for index, (stage, features) in enumerate(zip(model.stages, _maps(model, x), strict=True), start=1):
        layer = _attention(stage)
        if layer is None:
            continue
        with torch.random.fork_rng(devices=[]):
            many = multi_head(layer)
        dim, where = features.shape[1], (f"stage {index}", features.shape[2:].numel())
        own = MicroDesign(*where, heads=1, channels=layer.split_dims[0], cost=cost(layer, features))
        other = MicroDesign(*where, heads=dim // head_dim(dim), channels=dim, cost=cost(many, features))
        comparisons.append(Comparison(own, other, _summarize_micro(own, other)))
    return comparisons


def stride_4(model: SHViT, x: torch.Tensor) -> SHViT:
    """Return the usual pyramid in place of a stride-16 stem with three stages: stages at strides 4, 8, 16 and 32.

    Blocks and downsampling are the model's, and as many of each kind: those of its first stage are shared between the
    first two, and attention stays in the last two, with the same share of the channels. The stem has two convolutions
    in place of four. Widths double from stage to stage (8 at least) and are such that the multiply-adds on `x` are the
    model's. Parameters follow from that: four times as many tokens use those of each stage, so there are fewer.

    How steeply widths grow matters: S4's pyramid moves 2.4 times the bytes of activations, 2.7 times if widths grow by
    1.6 from stage to stage, 1.8 times if they triple.
    """
    wanted, dim = cost(model, x).macs, float(model.num_features)  # of the last stage
    for _ in range(STEPS):  # multiply-adds grow nearly with the square of the width
        dim *= (wanted / cost(_pyramid(model, dim), x).macs) ** 0.5
    return _pyramid(model, dim)


def _pyramid(model: SHViT, dim: float) -> SHViT:
    """Return the pyramid of `stride_4` with `dim` channels in the last stage."""
    first, *rest = model.stages
    mixers = [_attention(stage) for stage in (first, first, *rest)]
    embed_dim = tuple(max(8, round(dim / 2**i)) for i in reversed(range(len(mixers))))
    depth = len(first.blocks)  # type: ignore[arg-type]
    share = [mixer.split_dims[0] / sum(mixer.split_dims) if mixer else 0.0 for mixer in mixers]
    pyramid = SHViT(
        in_chans=model.in_chans,
        num_classes=model.num_classes,
        embed_dim=embed_dim,
        depth=(max(depth // 2, 1), max(depth - depth // 2, 1), *(len(stage.blocks) for stage in rest)),  # type: ignore[arg-type]
        partial_dim=tuple(round(dim * part) for dim, part in zip(embed_dim, share, strict=True)),
        qk_dim=tuple(mixer.qkv_dims[0] if mixer else 0 for mixer in mixers),
        use_attn=tuple(mixer is not None for mixer in mixers),
    )
    act = pyramid.patch_embed[1]
    half = embed_dim[0] // 2
    stem = ConvNorm(model.in_chans, half, 3, stride=2), act, ConvNorm(half, embed_dim[0], 3, stride=2)
    pyramid.patch_embed = nn.Sequential(*stem)
    return pyramid.eval()


def _attention(stage: nn.Module) -> SHSA | None:
    """Return the first of a stage's attention layers, which are alike."""
    return next((module for module in stage.modules() if isinstance(module, SHSA)), None)


def head_dim(dim: int) -> int:
    """Return the divisor of `dim` that is nearest to 32."""
    return min((d for d in range(1, dim + 1) if dim % d == 0), key=lambda d: abs(d - HEAD_DIM))


def multi_head(layer: SHSA) -> nn.Sequential:
    """Return multi-head self-attention on all channels, in place of one head on some: (B, C, H, W) → (B, C, H, W).

    It is timm's layer with the surroundings of SHSA: the same norm before, BatchNorm behind both projections, the
    activation before the last.
    """
    dim = sum(layer.split_dims)
    attention = Attention2d(dim, num_heads=dim // head_dim(dim))
    attention.qkv = ConvNorm(dim, 3 * dim)  # type: ignore[assignment]
    attention.proj = nn.Sequential(layer.proj[0], ConvNorm(dim, dim))  # type: ignore[assignment]
    attention.fused_attn = False  # type: ignore[misc]
    return nn.Sequential(GroupNorm1(dim), attention).eval()


@torch.no_grad()
def _maps(model: SHViT, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of each stage."""
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert isinstance(maps, list)
    return maps


def _macro(model: SHViT, x: torch.Tensor) -> MacroDesign:
    maps = _maps(model, x)
    return MacroDesign(
        stride=2 ** sum(isinstance(layer, ConvNorm) for layer in model.patch_embed),
        embed_dim=tuple(features.shape[1] for features in maps),
        depth=tuple(len(stage.blocks) for stage in model.stages),  # type: ignore[arg-type]
        tokens=tuple(features.shape[2:].numel() for features in maps),
        cost=cost(model, x),
    )


def _summarize_macro(own: MacroDesign, other: MacroDesign) -> str:
    mine, its = own.cost, other.cost
    return (
        f"Compared with the stride-{own.stride} design of {len(own.depth)} stages, the stride-{other.stride} pyramid "
        f"of {len(other.depth)} has {times(its.macs, mine.macs)} multiply-adds, {times(its.params, mine.params)} "
        f"parameters and {times(its.activation_bytes, mine.activation_bytes)} bytes of activations to read and write "
        f"({times(its.bytes, mine.bytes)} with the weights, which a batch shares): "
        f"{its.flop_per_byte:.1f} FLOP for each byte against {mine.flop_per_byte:.1f}."
    )


def _summarize_micro(own: MicroDesign, other: MicroDesign) -> str:
    mine, its = own.cost, other.cost
    share, other_share = round(mine.memory_bound_percent), round(its.memory_bound_percent)
    heads = f"{other.heads} heads" if other.heads > 1 else "one head"
    size = "larger" if share > other_share else "smaller" if share < other_share else "equal"
    return (
        f"{own.stage.capitalize()}: compared with {heads} on all {other.channels} channels, one head on "
        f"{own.channels} needs {times(mine.macs, its.macs)} multiply-adds and {times(mine.bytes, its.bytes)} bytes; "
        f"its memory-bound operators need {times(mine.memory_bound_bytes, its.memory_bound_bytes)}, a share that is "
        f"{size} ({share} % against {other_share} %)."
    )


def times(new: float, old: float) -> str:
    """Return how `new` compares with `old`, both above 0: 3.0 times fewer, 1.2 times more, or about as many."""
    if abs(new / old - 1) <= SAME:
        return "about as many"
    return f"{old / new:.1f} times fewer" if new < old else f"{new / old:.1f} times more"
