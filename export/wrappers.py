"""Wrappers around a deployed model that set an artifact's input, output and arithmetic; and a model's layers."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shvit.errors import InputError
from shvit.fold import DeployedSHSA

from .spec import Spec


class Wrapper(nn.Module):
    """Base class of modules around a model."""

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


class Tupled(Wrapper):
    """A model of several outputs, which a trace can return as a tuple but not as a list."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.model(x))


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


class LabelProbabilities(Probabilities):
    """The model with a sigmoid behind its logits: any number of its labels may be true."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).sigmoid()


def with_predictions(model: nn.Module, spec: Spec, softmax: bool = False) -> tuple[nn.Module, Spec]:
    """Return the model with what files of its task give, and its spec: classes' logits, labels' probabilities, a value.

    Args:
        softmax: give probabilities of a classifier in place of logits.
    """
    if spec.task == "multi_label":
        return LabelProbabilities(model).eval(), replace(spec, outputs=("probabilities",))
    if spec.task == "regression":
        return model, replace(spec, outputs=("value",))
    if softmax:
        return Probabilities(model).eval(), replace(spec, outputs=("probabilities",))
    return model, spec


class Pooled(Wrapper):
    """A timm model up to what its classifier is given: (B, num_features)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        return model.forward_head(model.forward_features(x), pre_logits=True)


def with_attention(model: nn.Module, kind: type[DeployedSHSA]) -> nn.Module:
    """Return a copy of a deployed model whose attentions are of a class that computes the same by other operators."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, DeployedSHSA):
            module.__class__ = kind
    return model


def without_probabilities(model: nn.Module) -> nn.Module:
    """Return the model inside of `Probabilities`, whose gradients vanish where it is certain; others as they are."""
    return model.model if isinstance(model, Probabilities) else model


def feature_maps(name: str, model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model up to its list of feature maps, and their names, stride_16 …; raise InputError without any."""
    from timm.models._features import FeatureGetterNet

    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"{name} has no feature maps; leave out --features")
    levels = tuple(range(len(model.feature_info)))  # type: ignore[arg-type]
    features = FeatureGetterNet(copy.deepcopy(model), levels).eval()
    return features, tuple(f"stride_{stride}" for stride in features.feature_info.reduction())


# --- layers -----------------------------------------------------------------------------------------------------------


MIL_LAYERS = ("conv", "linear")  # Core ML's operations for `layers`


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that hold nearly all arithmetic, by their dotted names, without prefixes of wrappers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield layer_name(name), module


def layer_name(path: str) -> str:
    """Return a module's dotted name in its model, given its name in a wrapper around the model."""
    while path.startswith("model."):
        path = path.removeprefix("model.")
    return path


BATCH = 16  # images at a time through model and artifact


def run_batches(predict: Callable[[torch.Tensor], Sequence[torch.Tensor]], pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs for images' pixels, a few at a time, each output as one tensor."""
    parts = []
    for batch in pixels.split(BATCH):
        parts.append(predict(batch))  # noqa: PERF401  (one frame less)
    return [torch.cat([part.float() for part in each]) for each in zip(*parts, strict=True)]


def run_model(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a model's output, or outputs, as a tuple."""
    with torch.inference_mode():
        outputs = model(batch)
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def nearest_zero(model: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Return 0 or a model's last bias, (1,), whichever is nearer to its values (n, 1) in the root mean square."""
    biases = [layer.bias for _, layer in layers(model) if isinstance(layer, nn.Linear)][-1:]
    zeros = [torch.zeros(1), *(bias.detach().float() for bias in biases if bias is not None and bias.shape == (1,))]
    return min(zeros, key=lambda zero: (values - zero).square().mean().item())


def first_layer(model: nn.Module, batch: torch.Tensor) -> str | None:
    """Return the dotted name of the convolution whose input is the batch itself; None where there is none."""
    names: list[str] = []

    def record(name: str) -> Callable[..., None]:
        return lambda module, inputs: names.append(name) if torch.equal(inputs[0], batch) else None

    convolutions = [(name, layer) for name, layer in layers(model) if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(record(name)) for name, layer in convolutions]
    try:
        run_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return names[0] if names else None


def layer_outputs(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the output of each convolution and linear layer, by its dotted name; the last one of several calls."""
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.__setitem__(name, output.clone())  # what follows may be in place

    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers(model)]
    try:
        run_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def share_of_macs(model: nn.Module, spec: Spec, names: Sequence[str]) -> float:
    """Return the percentage of all layers' multiplications that are in the named ones."""
    if not names:
        return 0.0
    sizes = {name: output[0].numel() for name, output in layer_outputs(model, spec.blank()).items()}
    macs = {name: sizes.get(name, 0) * layer.weight[0].numel() for name, layer in layers(model)}  # type: ignore[index]
    named = {name.removesuffix(".conv") if name not in macs else name for name in names}  # as `unfold_identities` names
    return 100 * sum(macs.get(name, 0) for name in named) / max(sum(macs.values()), 1)
