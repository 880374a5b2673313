"""`deploy`: a trained model in its inference form, by the exact rewrites of fold.py."""

from collections import Counter
from copy import deepcopy

import torch
from timm.utils import reparameterize_model
from torch import nn

from .fold import DeployedSHSA, average_linears, fold_norm_into_conv
from .shvit import SHViT

__all__ = ["deploy"]


def deploy(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> nn.Module:
    """Return a copy of `model` in its inference form: equal outputs up to rounding, fewer and cheaper operators.

    Args:
        model: a SHViT, a `features_only` wrapper or a larger model that holds one, or any other timm model (which gets
            timm's own `reparameterize_model`, and with `img_size` its BatchNorms go into its convolutions); in eval
            mode. It is left as it is.
        img_size: input height and width in pixels, which fixes the token grids: the graph then has no shape
            arithmetic. Without it the deployed model takes any size.

    Returns:
        The deployed copy. A distilled SHViT comes out with one head, the mean of its two. Frozen layers stay frozen.

    Raises:
        ValueError: `model` is in training mode, where BatchNorm is not a fixed affine map, or `img_size` is not a size.
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
    """Fold BatchNorms of another model than SHViT into the convolutions that they follow on an input.

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
    """Return the convolutions and the norms that take their outputs, where both are called once."""
    makers: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # tensors are held, so that no other gets their place
    calls: Counter[nn.Module] = Counter()
    pairs = []

    def made(conv: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        calls[conv] += 1
        makers[id(output)] = conv, output

    def taken(norm: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        calls[norm] += 1
        if id(inputs[0]) in makers:
            pairs.append((makers[id(inputs[0])][0], norm))

    hooks = [each.register_forward_hook(made) for each in model.modules() if isinstance(each, nn.Conv2d)]
    hooks += [each.register_forward_pre_hook(taken) for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


def _as_list(outputs: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _stem(model: nn.Module) -> nn.Conv2d:
    """Return the first convolution."""
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


@torch.no_grad()
def _fix_grids(model: nn.Module, attentions: list[DeployedSHSA], height: int, width: int) -> None:
    """Set every attention's grid to the one it sees for an input of that size, found by running one."""

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
