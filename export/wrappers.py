"""What a deployed model is wrapped in for its artifact: what goes in, what comes out, in which arithmetic."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from shvit.errors import InputError

from .spec import Spec


class Wrapper(nn.Module):
    """Something around a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class Half(Wrapper):
    """A copy of the model in float16 behind float32 inputs and outputs."""

    def __init__(self, model: nn.Module):
        super().__init__(copy.deepcopy(model).half())

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        outputs = self.model(x.half())
        return outputs.float() if isinstance(outputs, torch.Tensor) else [output.float() for output in outputs]


class Normalized(Wrapper):
    """The model behind its own normalization: takes (B, C, H, W) float32, RGB from 0 to `white`."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: nn.Module, spec: Spec, white: float):
        super().__init__(model)
        std = torch.tensor(spec.std)
        self.register_buffer("scale", (1 / (white * std))[:, None, None])
        self.register_buffer("shift", (-torch.tensor(spec.mean) / std)[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        return self.model(x * self.scale + self.shift)


class ChannelsLast(Wrapper):
    """The model behind (B, H, W, C) uint8, as pixels lie in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        return self.model(x.permute(0, 3, 1, 2).float())


class Probabilities(Wrapper):
    """The model with a softmax behind its logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).softmax(dim=1)


def without_softmax(model: nn.Module) -> nn.Module:
    """The logits of `Probabilities`, which hardly have a gradient where they are certain; others as they are."""
    return model.model if isinstance(model, Probabilities) else model


def feature_maps(name: str, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model up to its feature maps, of which it gives a list, and their names: stride_16 and so on.

    Raises:
        InputError: it has none.
    """
    from timm.models._features import FeatureGetterNet

    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"{name} has no feature maps; leave out --features")
    levels = tuple(range(len(model.feature_info)))  # type: ignore[arg-type]
    features = FeatureGetterNet(copy.deepcopy(model), levels).eval()
    return features, tuple(f"stride_{stride}" for stride in features.feature_info.reduction())


MIL_LAYERS = ("conv", "linear")
"""Core ML's operations for `layers`."""


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that hold nearly all arithmetic, by their dotted names, without the prefixes of forms around them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield layer_name(name), module


def layer_name(path: str) -> str:
    """A module's dotted name in its model, given that in a form around the model."""
    while path.startswith("model."):
        path = path.removeprefix("model.")
    return path
