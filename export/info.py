"""What a model is made of: MACs, parameters, activations and tokens, by stage and kind of layer."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shvit.shvit import FFN, SHSA, ConvNorm, NormLinear, PatchMerging, Residual, SHViT

from .spec import Spec

KINDS = {ConvNorm: "depthwise conv", FFN: "FFN", SHSA: "attention"}  # what a residual branch is


@dataclass(frozen=True)
class Row:
    """One kind of layer in one stage, all of its layers together."""

    stage: str
    kind: str
    layers: int
    macs: int
    """Multiply-adds for one image (convolutions and matrix products)."""
    params: int
    activation_bytes: int
    """float32 bytes that the layers write as their results, for one image."""
    tokens: int
    """Positions of the grid that the layers put out; 1 behind the pooling."""


def describe_layers(model: nn.Module, spec: Spec) -> list[Row]:
    """Rows for a SHViT by stage and kind; for any other model by its top-level modules."""
    parts = _parts(model)
    outputs: dict[nn.Module, torch.Tensor] = {}
    hooks = [part.register_forward_hook(lambda m, _, out: outputs.update({m: out})) for _, _, part in parts]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(spec.blank())
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in model.named_modules()}
    flops = counter.get_flop_counts()
    root = type(model).__name__
    rows: dict[tuple[str, str], Row] = {}
    for stage, kind, part in parts:
        output = outputs.get(part)
        if not isinstance(output, torch.Tensor):
            continue
        key = (stage, kind)
        old = rows.get(key, Row(stage, kind, 0, 0, 0, 0, 0))
        rows[key] = Row(
            stage,
            kind,
            old.layers + 1,
            old.macs + sum(flops.get(f"{root}.{names[part]}", {}).values()) // 2,
            old.params + sum(p.numel() for p in part.parameters()),
            old.activation_bytes + 4 * output.numel(),
            output.shape[2:].numel() if output.ndim == 4 else 1,
        )
    return list(rows.values())


def _parts(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """(stage, kind, module), disjoint and in order of execution."""
    if not isinstance(model, SHViT) or model.deployed:
        return [(name, type(module).__name__, module) for name, module in model.named_children()]
    parts: list[tuple[str, str, nn.Module]] = [("stem", "conv", part) for part in model.patch_embed]
    for index, stage in enumerate(model.stages, start=1):
        for name, module in stage.named_modules():
            where = f"stage {index}" + (" downsample" if name.startswith("downsample") else "")
            if isinstance(module, Residual):
                parts.append((where, KINDS[type(module.m)], module))
            elif isinstance(module, PatchMerging):
                parts.append((where, "patch merging", module))
    return parts + [("head", "classifier", head) for head in model.children() if isinstance(head, NormLinear)]
