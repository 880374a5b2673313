"""Pure, exact rewrites of a trained SHViT into its inference form.

Each identity is one function on plain torch layers; `fuse_layer` puts them together for the layers of shvit.py, and
`deploy` applies that to a whole model. Functions return new modules and leave their arguments alone.

Shapes in comments: B batch, C channels, H×W the token grid, N = H·W tokens, D = qk_dim, P = partial_dim.
"""

from collections import Counter
from copy import deepcopy
from functools import singledispatch

import torch
from timm.layers import GroupNorm1
from timm.utils import reparameterize_model
from torch import nn
from torch.nn import functional as F

from .shvit import SHSA, ConvNorm, NormLinear, Residual, SHViT, SqueezeExcite

__all__ = ["deploy"]


# --- identities -------------------------------------------------------------------------------------------------------


def _conv_like(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """A convolution with the geometry of `conv` and these parameters; output channels follow the weight.

    The weight keeps its memory format, and both are frozen if the weight of `conv` is.
    """
    new = nn.Conv2d(
        conv.in_channels if conv.groups > 1 else weight.shape[1],
        weight.shape[0],
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        device="meta",  # its own parameters are not needed
    )
    new.weight = nn.Parameter(weight.clone(), conv.weight.requires_grad)
    new.bias = nn.Parameter(bias.clone(), conv.weight.requires_grad)
    return new.train(conv.training)


def _norm_scale_shift(bn: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """BN(x) = scale·x + shift with the running statistics."""
    assert bn.running_var is not None
    assert bn.running_mean is not None
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    return scale, bn.bias - bn.running_mean * scale


@torch.no_grad()
def fold_norm_into_conv(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """BN(W∗x + b) = (scale·W)∗x + (scale·b + shift)."""
    scale, shift = _norm_scale_shift(bn)
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return _conv_like(conv, conv.weight * scale[:, None, None, None], shift)


@torch.no_grad()
def fold_norm_into_linear(bn: nn.BatchNorm1d, linear: nn.Linear) -> nn.Linear:
    """W·BN(x) + b = (W·scale)·x + (W·shift + b)."""
    scale, shift = _norm_scale_shift(bn)
    new = deepcopy(linear)
    new.weight.copy_(linear.weight * scale)
    new.bias.copy_(linear.weight @ shift + linear.bias)
    return new


@torch.no_grad()
def fold_identity_into_depthwise(conv: nn.Conv2d) -> nn.Conv2d:
    """x + W∗x = (W + δ)∗x, where δ is 1 at each kernel's center; `conv` must be depthwise, stride 1, 'same' padding."""
    weight = conv.weight.clone()
    weight[:, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1
    assert conv.bias is not None
    return _conv_like(conv, weight, conv.bias)


@torch.no_grad()
def fold_affine_into_conv(norm: nn.GroupNorm, conv: nn.Conv2d) -> nn.Conv2d:
    """W(γ·n + β) + b = (W·γ)n + (Wβ + b) for a 1×1 convolution behind a norm with affine parameters γ, β."""
    weight = conv.weight.flatten(1)
    assert conv.bias is not None
    return _conv_like(conv, conv.weight * norm.weight[:, None, None], weight @ norm.bias + conv.bias)


@torch.no_grad()
def fold_scale_into_queries(qkv: nn.Conv2d, qk_dim: int, scale: float) -> nn.Conv2d:
    """(qᵀk)·s = (s·q)ᵀk: the softmax's scale goes into the rows that make q."""
    rows = torch.ones_like(qkv.bias)  # type: ignore[arg-type]
    rows[:qk_dim] = scale
    return _conv_like(qkv, qkv.weight * rows[:, None, None, None], qkv.bias * rows)  # type: ignore[operator]


@torch.no_grad()
def drop_key_bias(qkv: nn.Conv2d, qk_dim: int) -> nn.Conv2d:
    """softmax(qᵀ(k + b)) = softmax(qᵀk): over one query's keys qᵀb is a constant, and softmax is shift-invariant."""
    assert qkv.bias is not None
    bias = qkv.bias.clone()
    bias[qk_dim : 2 * qk_dim] = 0
    return _conv_like(qkv, qkv.weight, bias)


@torch.no_grad()
def average_linears(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """(A·x + a + B·x + b)/2 = ((A+B)/2)·x + (a+b)/2: the distilled model's two heads as one."""
    new = deepcopy(first)
    new.weight.copy_((first.weight + second.weight) / 2)
    new.bias.copy_((first.bias + second.bias) / 2)
    return new


# --- inference forms of the layers that change their shape ------------------------------------------------------------


class DeployedSHSA(nn.Module):
    """SHSA with norm, scale and key bias folded into `qkv`, and the projection's norm into `proj`.

    Works at any grid; `img_size` of `deploy` sets `grid`, after which no shape is computed at run time and the norm
    is one LayerNorm over (P, H, W).
    """

    def __init__(self, qkv: nn.Conv2d, proj: nn.Conv2d, act: nn.Module, qk_dim: int, partial_dim: int, eps: float):
        super().__init__()
        self.qkv = qkv
        self.act = act
        self.proj = proj
        self.qk_dim = qk_dim
        self.partial_dim = partial_dim
        self.eps = eps
        self.grid: tuple[int, int] | None = None

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        """GroupNorm of one group without its affine: (B, P, H, W), statistics over P, H and W."""
        if self.grid is not None:
            return F.layer_norm(x, (self.partial_dim, self.grid[0], self.grid[1]), eps=self.eps)
        x = x - x.mean((1, 2, 3), keepdim=True)
        return x * torch.rsqrt((x * x).mean((1, 2, 3), keepdim=True) + self.eps)

    def _to_grid(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(B, P, N) → (B, P, H, W), as `like` is."""
        H, W = self.grid if self.grid is not None else (like.shape[2], like.shape[3])
        return x.reshape(-1, self.partial_dim, H, W)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1, x2 = torch.split(x, [self.partial_dim, self.proj.in_channels - self.partial_dim], dim=1)
        # (B, P, H, W) (B, C-P, H, W)
        qkv = self.qkv(self._normalize(x1)).flatten(2)  # (B, 2D+P, N)
        q, k, v = torch.split(qkv, [self.qk_dim, self.qk_dim, self.partial_dim], dim=1)
        # (B, D, N) (B, D, N) (B, P, N)
        attn = (q.transpose(1, 2) @ k).softmax(dim=-1)  # (B, N, N)
        x1 = self._to_grid(v @ attn.transpose(1, 2), x1)  # (B, P, H, W)
        return self.proj(self.act(torch.cat([x1, x2], dim=1)))


class DeployedSqueezeExcite(nn.Module):
    """Squeeze-excite with its mean as a global average pool, which every runtime has as one operator."""

    def __init__(self, se: SqueezeExcite):
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = map(deepcopy, (se.fc1, se.act, se.fc2, se.gate))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)  # (B, C, 1, 1)
        return x * self.gate(self.fc2(self.act(self.fc1(gate))))


# --- layers and models ------------------------------------------------------------------------------------------------


@singledispatch
def fuse_layer(layer: nn.Module) -> nn.Module:
    """The inference form of one layer of shvit.py (its parts as far as they have none of their own)."""
    raise TypeError(f"{type(layer).__name__} has no inference form")


@fuse_layer.register
def _(layer: ConvNorm) -> nn.Module:
    return fold_norm_into_conv(layer.c, layer.bn)


@fuse_layer.register
def _(layer: NormLinear) -> nn.Module:
    return fold_norm_into_linear(layer.bn, layer.l)


@fuse_layer.register
def _(layer: Residual) -> nn.Module:
    if isinstance(layer.m, ConvNorm):
        return fold_identity_into_depthwise(fold_norm_into_conv(layer.m.c, layer.m.bn))
    return layer


@fuse_layer.register
def _(layer: SqueezeExcite) -> nn.Module:
    return DeployedSqueezeExcite(layer).train(layer.training)


@fuse_layer.register
def _(layer: SHSA) -> nn.Module:
    if not isinstance(layer.pre_norm, GroupNorm1):
        return layer  # another norm_layer: its parts are fused one by one
    qk_dim, _, partial_dim = layer.qkv_dims
    qkv = fold_norm_into_conv(layer.qkv.c, layer.qkv.bn)
    qkv = fold_affine_into_conv(layer.pre_norm, qkv)
    qkv = fold_scale_into_queries(qkv, qk_dim, layer.scale)
    qkv = drop_key_bias(qkv, qk_dim)
    act, proj = layer.proj
    assert isinstance(proj, ConvNorm)
    joined = fold_norm_into_conv(proj.c, proj.bn)
    deployed = DeployedSHSA(qkv, joined, deepcopy(act), qk_dim, partial_dim, layer.pre_norm.eps)
    return deployed.train(layer.training)


def deploy(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> nn.Module:
    """A copy of `model` in its inference form: the same outputs up to rounding, fewer and cheaper operators.

    Args:
        model: a SHViT, a `features_only` wrapper or a larger model that holds one, or any other timm model (which gets
            timm's own `reparameterize_model`, and with `img_size` its BatchNorms go into its convolutions); in eval
            mode. It is left as it is.
        img_size: input height and width in pixels, which fixes the token grids: the graph then has no shape
            arithmetic. Without it the deployed model takes any size.

    Returns:
        The deployed copy. A distilled SHViT comes out with one head, the mean of its two. Frozen layers stay frozen.

    Raises:
        ValueError: `model` is in training mode, where BatchNorm is no fixed affine map, or `img_size` is no size.
    """
    size = None if img_size is None else _height_width(img_size)
    if any(module.training for module in model.modules()):
        raise ValueError("deploy() folds BatchNorm's running statistics, and this model is in training mode; "
                         "call model.eval() first")  # fmt: skip
    deployed = reparameterize_model(model).eval()  # torch.fx copies a graph module in training mode
    for module in deployed.modules():
        if isinstance(module, SHViT) and module.distilled:
            _merge_heads(module)
    attentions = [module for module in deployed.modules() if isinstance(module, DeployedSHSA)]
    for attention in attentions:
        attention.grid = None  # of an earlier deployment
    if size is not None and attentions:
        _fix_grids(deployed, attentions, *size)
    if size is not None and any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules()):
        deployed = _fold_norms(deployed, *size)
    return deployed


def _height_width(img_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ValueError(f"img_size {img_size!r} is not a size; give pixels above 0, as 224 or (height, width)")
    return sides[0], sides[1]


def _merge_heads(model: SHViT) -> None:
    if model.num_classes > 0:
        model.head = average_linears(model.head, model.head_dist)  # type: ignore[arg-type]
    model.head_dist = None
    model.distilled = model.distilled_training = False


@torch.no_grad()
def _fold_norms(model: nn.Module, height: int, width: int) -> nn.Module:
    """Another model's BatchNorms into the convolutions that they follow in an input's way through it.

    Where that does not give the same outputs, for instance because a convolution's output is also used without its
    norm, the model is returned as it is.
    """
    generator = torch.Generator().manual_seed(0)  # the caller's own is left alone
    image = torch.rand(1, _stem(model).in_channels, height, width, generator=generator).to(_stem(model).weight)
    folded = deepcopy(model)
    names = {module: name for name, module in folded.named_modules()}
    for conv, norm in _find_conv_norms(folded, image):
        folded.set_submodule(names[conv], fold_norm_into_conv(conv, norm))
        rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]  # timm's norms with activation
        folded.set_submodule(names[norm], nn.Sequential(*rest) if rest else nn.Identity())
    before, after = (_as_list(each(image)) for each in (model, folded))
    same = all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item()) for a, b in zip(before, after, strict=True)
    )
    return folded if same else model


def _find_conv_norms(model: nn.Module, image: torch.Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the norms that take their outputs, both called once."""
    makers: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # tensors are held, so that no other gets their place
    calls: Counter[nn.Module] = Counter()
    found = []

    def made(conv: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        calls[conv] += 1
        makers[id(output)] = conv, output

    def taken(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        calls[norm] += 1
        if id(inputs[0]) in makers:
            found.append((makers[id(inputs[0])][0], norm))

    hooks = [each.register_forward_hook(made) for each in model.modules() if isinstance(each, nn.Conv2d)]
    hooks += [each.register_forward_pre_hook(taken) for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in found if calls[pair[0]] == calls[pair[1]] == 1]


def _as_list(outputs: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _stem(model: nn.Module) -> nn.Conv2d:
    """The first convolution."""
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


@torch.no_grad()
def _fix_grids(model: nn.Module, attentions: list[DeployedSHSA], height: int, width: int) -> None:
    """Sets every attention's grid to the one it sees for an input of that size, found by running one."""

    def record(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        grids[module] = tuple(inputs[0].shape[2:])

    grids: dict[nn.Module, tuple[int, ...]] = {}
    hooks = [module.register_forward_pre_hook(record) for module in attentions]
    stem = _stem(model)
    try:
        model(stem.weight.new_zeros(1, stem.in_channels, height, width))
    finally:
        for hook in hooks:
            hook.remove()
    for attention in attentions:
        attention.grid = grids[attention]  # type: ignore[assignment]
