"""Exact identities that turn trained layers into cheaper ones, and the layers that have two forms because of them.

Each identity is a pure function on plain torch layers: it returns a new module and leaves its arguments alone. A
layer's `fuse`, which timm's `reparameterize_model` calls, applies them: it returns the layer's inference form as a new
module, or the layer itself where it has none.

Shapes in comments: B batch, C channels, H×W the token grid, N = H·W tokens, D = qk_dim, P = partial_dim.
"""

from copy import deepcopy
from typing import Any

import torch
from timm.layers import DropPath, SEModule, trunc_normal_
from torch import nn
from torch.nn import functional as F

# --- identities -------------------------------------------------------------------------------------------------------


def _conv_like(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """Return a convolution with the geometry of `conv` and these parameters; output channels follow the weight.

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
    """Return (scale, shift) with BN(x) = scale·x + shift, from the running statistics."""
    assert bn.running_var is not None
    assert bn.running_mean is not None
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    return scale, bn.bias - bn.running_mean * scale


@torch.no_grad()
def fold_norm_into_conv(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a convolution for conv, then BN: BN(W∗x + b) = (scale·W)∗x + (scale·b + shift)."""
    scale, shift = _norm_scale_shift(bn)
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return _conv_like(conv, conv.weight * scale[:, None, None, None], shift)


@torch.no_grad()
def fold_norm_into_linear(bn: nn.BatchNorm1d, linear: nn.Linear) -> nn.Linear:
    """Return a linear layer for BN, then linear: W·BN(x) + b = (W·scale)·x + (W·shift + b)."""
    scale, shift = _norm_scale_shift(bn)
    new = deepcopy(linear)
    new.weight.copy_(linear.weight * scale)
    new.bias.copy_(linear.weight @ shift + linear.bias)
    return new


@torch.no_grad()
def fold_identity_into_depthwise(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution for x + conv(x): x + W∗x = (W + δ)∗x, where δ is 1 at each kernel's center.

    `conv` must be depthwise, with stride 1 and 'same' padding.
    """
    weight = conv.weight.clone()
    weight[:, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1
    assert conv.bias is not None
    return _conv_like(conv, weight, conv.bias)


@torch.no_grad()
def fold_affine_into_conv(norm: nn.GroupNorm, conv: nn.Conv2d) -> nn.Conv2d:
    """Return a 1×1 convolution for that after a norm's affine γ, β: W(γ·n + β) + b = (W·γ)n + (Wβ + b)."""
    weight = conv.weight.flatten(1)
    assert conv.bias is not None
    return _conv_like(conv, conv.weight * norm.weight[:, None, None], weight @ norm.bias + conv.bias)


@torch.no_grad()
def fold_scale_into_queries(qkv: nn.Conv2d, qk_dim: int, scale: float) -> nn.Conv2d:
    """Return `qkv` with the softmax's scale in the rows that make q: (qᵀk)·s = (s·q)ᵀk."""
    rows = torch.ones_like(qkv.bias)  # type: ignore[arg-type]
    rows[:qk_dim] = scale
    return _conv_like(qkv, qkv.weight * rows[:, None, None, None], qkv.bias * rows)  # type: ignore[operator]


@torch.no_grad()
def drop_key_bias(qkv: nn.Conv2d, qk_dim: int) -> nn.Conv2d:
    """Return `qkv` without the bias of k: softmax(qᵀ(k + b)) = softmax(qᵀk).

    Over one query's keys qᵀb is a constant, and softmax is shift-invariant.
    """
    assert qkv.bias is not None
    bias = qkv.bias.clone()
    bias[qk_dim : 2 * qk_dim] = 0
    return _conv_like(qkv, qkv.weight, bias)


@torch.no_grad()
def average_linears(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """Return a distilled model's two heads as one: (A·x + a + B·x + b)/2 = ((A+B)/2)·x + (a+b)/2."""
    new = deepcopy(first)
    new.weight.copy_((first.weight + second.weight) / 2)
    new.bias.copy_((first.bias + second.bias) / 2)
    return new


# --- layers of two forms ----------------------------------------------------------------------------------------------


class ConvNorm(nn.Sequential):
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

    def fuse(self) -> nn.Conv2d:
        return fold_norm_into_conv(self.c, self.bn)


class NormLinear(nn.Sequential):
    """BatchNorm, then the classifier: (B, C) → (B, num_classes)."""

    def __init__(self, in_dim: int, out_dim: int, **dd: Any):
        super().__init__()
        self.bn = nn.BatchNorm1d(in_dim, **dd)
        self.l = nn.Linear(in_dim, out_dim, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def fuse(self) -> nn.Linear:
        return fold_norm_into_linear(self.bn, self.l)


class Residual(nn.Module):
    """x + m(x), with stochastic depth of rate `drop_path` on m."""

    def __init__(self, m: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.m = m
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop_path(self.m(x))

    def fuse(self) -> nn.Module:
        return fold_identity_into_depthwise(self.m.fuse()) if isinstance(self.m, ConvNorm) else self


class SqueezeExcite(SEModule):
    """timm's squeeze-excite: channels gated by a sigmoid of their means."""

    def fuse(self) -> nn.Module:
        return DeployedSqueezeExcite(self).train(self.training)


class DeployedSqueezeExcite(nn.Module):
    """Squeeze-excite with its mean as a global average pool, which every runtime has as one operator."""

    def __init__(self, se: SqueezeExcite):
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = map(deepcopy, (se.fc1, se.act, se.fc2, se.gate))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)  # (B, C, 1, 1)
        return x * self.gate(self.fc2(self.act(self.fc1(gate))))


def fold_attention(norm: nn.GroupNorm, qkv: ConvNorm, proj: nn.Sequential, qk_dim: int, scale: float) -> nn.Module:
    """Return single-head attention (norm, `qkv`, activation and projection of `proj`) in its inference form."""
    folded = fold_scale_into_queries(fold_affine_into_conv(norm, qkv.fuse()), qk_dim, scale)
    act, conv = proj
    assert isinstance(conv, ConvNorm)
    deployed = DeployedSHSA(
        drop_key_bias(folded, qk_dim), conv.fuse(), deepcopy(act), qk_dim, norm.num_channels, norm.eps
    )
    return deployed.train(proj.training)


class DeployedSHSA(nn.Module):
    """SHSA with norm, scale and key bias folded into `qkv`, and the projection's norm into `proj`.

    Works at any grid; `img_size` of `deploy` sets `grid`, after which no shape is computed at run time and the norm
    is one LayerNorm over (P, H, W).
    """

    def __init__(self, qkv: nn.Conv2d, proj: nn.Conv2d, act: nn.Module, qk_dim: int, partial_dim: int, eps: float):
        super().__init__()
        self.qkv, self.act, self.proj = qkv, act, proj
        self.qk_dim, self.partial_dim, self.eps = qk_dim, partial_dim, eps
        self.grid: tuple[int, int] | None = None

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        """Apply GroupNorm of one group without its affine: (B, P, H, W), statistics over P, H and W."""
        if self.grid is not None:
            return F.layer_norm(x, (self.partial_dim, self.grid[0], self.grid[1]), eps=self.eps)
        x = x - x.mean((1, 2, 3), keepdim=True)
        return x * torch.rsqrt((x * x).mean((1, 2, 3), keepdim=True) + self.eps)

    def _to_grid(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Reshape (B, P, N) → (B, P, H, W), as `like` is."""
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
