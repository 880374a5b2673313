"""int8 for ONNX Runtime and OpenVINO: a float ONNX file into one with quantized convolutions and linear layers.

Activations are unsigned 8-bit with a range for each tensor, weights signed 8-bit with a scale for each output channel.
What lies between the layers (additions, attention's softmax and products, norms, gates) stays in float32, and is given
what is not rounded: quantizing these too cost 0.8 to 2 dB on trained models, and a signal that is rounded wherever a
layer reads it, with rounded logits at the end, 4 to 8 dB.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from shvit.errors import InputError
from shvit.files import scratch_folder
from shvit.terminal import quiet

from ..spec import Spec
from ..wrappers import layers
from .ranges import LEVELS, Range, best_range, histogram

if TYPE_CHECKING:
    from onnx import ModelProto

LAYERS = ("Conv", "Gemm")
"""ONNX operators that are a whole module, bias included."""
FLOAT_OUTPUTS = ("Gemm",)
"""Operators whose kernels in 8 bits give float32: logits are not rounded, nor cut at the range of those seen."""


class LayerRanges(NamedTuple):
    """Lowest and highest value; 0 is always within."""

    input: Range
    output: Range


class Unfolded(nn.Module):
    """x + (W - δ)∗x in place of W∗x, δ being 1 at each kernel's center: what the identity carries is not rounded."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = copy.deepcopy(conv)
        with torch.no_grad():
            self.conv.weight[_center(conv)] -= 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def unfold_identities(model: nn.Module) -> nn.Module:
    """A copy whose depthwise convolutions are free of an identity wherever that leaves smaller weights.

    Deployment folds the identity in, which is quicker in float. In int8 the signal of the whole network would then
    be rounded twice more in every block: on trained S1s the logits had 0.8 to 1.3 dB more noise.
    """
    model = copy.deepcopy(model)
    for name, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d) and _holds_identity(conv):
            model.set_submodule(name, Unfolded(conv))
    return model.eval()


def _holds_identity(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels > 1
    if not depthwise or set(conv.stride) != {1} or isinstance(conv.padding, str):
        return False
    sides = zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    if not all(2 * padding == dilation * (size - 1) and size % 2 for padding, dilation, size in sides):
        return False
    return conv.weight[_center(conv)].mean().item() > 0.5  # nearer to 1 than to 0: |W - δ| < |W|


def _center(conv: nn.Conv2d) -> tuple[Any, ...]:
    return (slice(None), 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)


# --- ranges -----------------------------------------------------------------------------------------------------------


def activation_ranges(model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, LayerRanges]:
    """The ranges of what goes into and comes out of each layer that disturb the model's outputs least (see `ranges`).

    Errors are weighed by the squared gradient of the outputs, with random signs: its mean is the squared error that
    they cause there, to first order. Against least squared errors of the tensors themselves this gave trained S1s 0.3
    to 2.5 dB.

    Args:
        model: deployed, in eval mode; gives logits or feature maps.
        batches: normalized images (B, C, H, W).
    """
    model = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    counts: dict[tuple[str, str], torch.Tensor] = {}
    for batch in batches:
        values = _record(model, batch.clone().requires_grad_())
        outputs = _flat(values.pop(OUTPUTS))
        signs = torch.randint(0, 2, outputs.shape, generator=generator) * 2.0 - 1
        gradients = torch.autograd.grad((outputs * signs).sum(), list(values.values()))
        for (place, value), gradient in zip(values.items(), gradients, strict=True):
            counts[place] = counts.get(place, 0) + histogram(value.detach(), gradient.square())
    ranges = {place: best_range(found) for place, found in counts.items()}
    return {name: LayerRanges(ranges[name, "input"], ranges[name, "output"]) for name, _ in layers(model)}


OUTPUTS = ("", "")


def _record(model: nn.Module, batch: torch.Tensor) -> dict[tuple[str, str], Any]:
    """What goes into and comes out of each layer, and of the model, with gradients."""
    values: dict[tuple[str, str], Any] = {}

    def taken(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            values[name, "input"] = inputs[0].clone()
            return (values[name, "input"],)

        return hook

    def given(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            values[name, "output"] = output
            return output.clone()  # what follows may add to it in place

        return hook

    hooks = [layer.register_forward_pre_hook(taken(name)) for name, layer in layers(model)]
    hooks += [layer.register_forward_hook(given(name)) for name, layer in layers(model)]
    try:
        values[OUTPUTS] = model(batch)
    finally:
        for each in hooks:
            each.remove()
    return values


# --- the file ---------------------------------------------------------------------------------------------------------


class QuantizedOnnx(NamedTuple):
    """An int8 ONNX model and the ranges that its tensors are rounded between, by name."""

    proto: "ModelProto"
    ranges: dict[str, Range]


def quantize_onnx(proto: "ModelProto", spec: Spec, ranges: Mapping[str, LayerRanges]) -> QuantizedOnnx:
    """Return a float ONNX model with its layers in int8, as QuantizeLinear and DequantizeLinear around them.

    Args:
        proto: the float model; it is left as it is.
        spec: of the new model; its `excluded_layers` stay in float32.
        ranges: of `activation_ranges`, for every layer of the model.

    Raises:
        InputError: the model has layers that are no modules of the PyTorch model.
    """
    import onnx

    nodes = [node for node in proto.graph.node if node.op_type in LAYERS]
    if unknown := [node.name for node in nodes if node.name not in ranges]:
        raise InputError(f"{spec.model} cannot be quantized: {unknown[0]} is no module of it; choose another precision")
    tensors: dict[str, Range] = {}
    for node in nodes:
        if node.op_type not in FLOAT_OUTPUTS:
            tensors[node.output[0]] = ranges[node.name].output
    for node in nodes:
        tensors[node.input[0]] = ranges[node.name].input
    others = [node.name for node in proto.graph.node if node.op_type == "Relu" and node.output[0] not in tensors]
    with quiet(), scratch_folder() as folder:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

        data = {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in tensors.items()
        }
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), folder / "ranges.json")
        quantize_static(
            copy.deepcopy(proto),
            folder / "int8.onnx",
            None,  # the ranges are known
            calibration_cache_path=folder / "ranges.json",
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*LAYERS, "Relu"],  # Relu, so that it is the tensor behind it that is rounded
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*spec.excluded_layers, *others],
            extra_options={"OpTypesToExcludeOutputQuantization": [*FLOAT_OUTPUTS]},
        )
        quantized = onnx.load(folder / "int8.onnx")
    _round_for_layers_alone(quantized, spec.excluded_layers)
    return QuantizedOnnx(quantized, tensors)


def _round_for_layers_alone(proto: Any, kept: Sequence[str]) -> None:
    """Gives whatever is no layer in 8 bits the float32 values themselves: a residual's sum, what the model gives.

    ONNX Runtime's quantizer lets every reader of a rounded tensor have it rounded. What a layer in 8 bits gives stays
    rounded, because that is what its kernel writes.
    """
    makers = {name: node for node in proto.graph.node for name in node.output}
    outputs = {output.name for output in proto.graph.output}

    def in_8_bits(node: Any) -> bool:
        return node.op_type in LAYERS and node.name not in kept

    def is_exact(name: str) -> bool:
        node = makers.get(name)
        if node is not None and node.op_type == "Relu":  # is part of the layer before it
            node = makers.get(node.input[0])
        return node is None or not in_8_bits(node) or node.op_type in FLOAT_OUTPUTS

    for node in [each for each in proto.graph.node if each.op_type == "DequantizeLinear"]:
        rounding = makers.get(node.input[0])
        if rounding is None or not is_exact(exact := rounding.input[0]):  # a weight, or a layer's
            continue
        rounded = node.output[0]
        if rounded in outputs:
            names = {exact: rounded, rounded: exact}
            for each in proto.graph.node:
                each.input[:] = [names.get(name, name) for name in each.input]
                each.output[:] = [names.get(name, name) for name in each.output]
            exact, rounded = rounded, exact
        for each in proto.graph.node:
            if not in_8_bits(each) and each is not rounding:
                each.input[:] = [exact if name == rounded else name for name in each.input]


# --- which layers cost most -------------------------------------------------------------------------------------------


@torch.inference_mode()
def layer_noise(model: nn.Module, batch: torch.Tensor) -> dict[str, float]:
    """What each layer alone adds to the noise of the outputs when it is in int8, worst first.

    Args:
        model: deployed, in eval mode.
        batch: normalized images (B, C, H, W).

    Returns:
        The power of the outputs' change over that of the outputs, by the layer's dotted name.
    """
    reference = _flat(model(batch))
    signal = reference.square().sum()
    noise = {}
    for name, layer in list(layers(model)):
        weight = layer.weight.data
        hook = layer.register_forward_pre_hook(lambda _, inputs: (_rounded(inputs[0]),))
        layer.weight.data = _rounded_weight(weight)  # type: ignore[arg-type]
        try:
            noise[name] = ((_flat(model(batch)) - reference).square().sum() / signal).item()
        finally:
            hook.remove()
            layer.weight.data = weight
    return dict(sorted(noise.items(), key=lambda item: -item[1]))


def _flat(outputs: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    maps = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return torch.cat([each.flatten() / each.square().mean().sqrt().clamp_min(1e-12) for each in maps])


def _rounded(x: torch.Tensor) -> torch.Tensor:
    low, high = best_range(histogram(x, torch.ones_like(x)))
    if high <= low:
        return x
    step = (high - low) / LEVELS
    return torch.fake_quantize_per_tensor_affine(x, step, round(-low / step), 0, LEVELS)


def _rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    step = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / 127
    return torch.fake_quantize_per_channel_affine(weight, step, torch.zeros_like(step, dtype=torch.int32), 0, -127, 127)


def smallest_passing(holds: Callable[[int], bool], limit: int, guess: int = 1) -> int:
    """The smallest number from 1 to `limit` for which `holds`; `limit`, which is then tried, where none does.

    It is tried as if whatever holds for a number held for every larger one: at `guess`, then in steps that double
    until the border lies between two numbers, then by halving. `holds` was true of the number returned when it was
    last asked.
    """
    passing, failing, step = limit + 1, 0, 1
    number = guess
    while passing - failing > 1:
        if holds(number):
            passing, number = number, max(number - step, failing + 1)
        else:
            failing, number = number, min(number + step, limit, passing - 1)
        step *= 2
        if passing <= limit and failing:
            number = (passing + failing) // 2
    return min(passing, limit)
