"""int8 for ONNX Runtime and OpenVINO: quantized convolutions and linear layers in a float ONNX file.

Activations are unsigned 8-bit with a range for each tensor, weights signed 8-bit with a scale for each output channel.
What lies between the layers (additions, attention's softmax and products, norms, gates) stays in float32 and reads
values that are not rounded: quantizing these too cost 0.8 to 2 dB on trained models, and a signal that is rounded
wherever a layer reads it, with rounded logits at the end, 4 to 8 dB.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from shvit.errors import InputError
from shvit.files import scratch_folder
from shvit.terminal import quiet

from ..spec import Spec
from ..wrappers import layers
from .ranges import Range, flat_outputs, learn_ranges

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LAYERS = ("Conv", "Gemm")  # ONNX operators that are a whole module, bias included
FLOAT_OUTPUTS = ("Gemm",)
"""Operators whose 8-bit kernels give float32: logits are not rounded, nor cut at the range of those seen."""


class LayerRanges(NamedTuple):
    """The ranges of a layer's input and output."""

    input: Range
    output: Range


class Unfolded(nn.Module):
    """x + (W - δ)∗x in place of W∗x, where δ is 1 at each kernel's center: the identity's part is not rounded."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = copy.deepcopy(conv)
        with torch.no_grad():
            self.conv.weight[_center(conv)] -= 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


def unfold_identities(model: nn.Module) -> nn.Module:
    """Return a copy with the identity taken out of depthwise convolutions wherever that leaves smaller weights.

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


def _center(conv: nn.Conv2d) -> tuple[slice, int, int, int]:
    return (slice(None), 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)


# --- ranges -----------------------------------------------------------------------------------------------------------


def activation_ranges(
    model: nn.Module, batches: Iterable[torch.Tensor], symmetric: bool = False
) -> dict[str, LayerRanges]:
    """Return the ranges of each layer's input and output that disturb the model's outputs least (see `ranges`).

    Against least squared errors of the tensors themselves this gave trained S1s 0.3 to 2.5 dB.

    Args:
        model: deployed, in eval mode; gives logits or feature maps.
        batches: normalized images (B, C, H, W).
        symmetric: as in `best_range`.
    """
    model = copy.deepcopy(model).requires_grad_(False)

    def evaluate(batch: torch.Tensor) -> tuple[list[torch.Tensor], dict[tuple[str, str], torch.Tensor]]:
        outputs, values = _record(model, batch)
        return [flat_outputs(outputs)], values

    ranges = learn_ranges(evaluate, batches, symmetric)
    return {name: LayerRanges(ranges[name, "input"], ranges[name, "output"]) for name, _ in layers(model)}


def _record(
    model: nn.Module, batch: torch.Tensor
) -> tuple[torch.Tensor | Sequence[torch.Tensor], dict[tuple[str, str], torch.Tensor]]:
    """Return the model's outputs, and the input and output of each layer, with gradients."""
    values: dict[tuple[str, str], torch.Tensor] = {}

    def record_input(name: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            values[name, "input"] = inputs[0].clone()
            return (values[name, "input"],)

        return hook

    def record_output(name: str) -> Callable[..., torch.Tensor]:
        def hook(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            values[name, "output"] = output
            return output.clone()  # the next operation may add to it in place

        return hook

    hooks = [layer.register_forward_pre_hook(record_input(name)) for name, layer in layers(model)]
    hooks += [layer.register_forward_hook(record_output(name)) for name, layer in layers(model)]
    try:
        return model(batch), values
    finally:
        for each in hooks:
            each.remove()


# --- the file ---------------------------------------------------------------------------------------------------------


class QuantizedOnnx(NamedTuple):
    """An int8 ONNX model and the ranges that its tensors are rounded between, by name."""

    proto: "ModelProto"
    ranges: dict[str, Range]


def quantize_onnx(proto: "ModelProto", spec: Spec, ranges: Mapping[str, LayerRanges]) -> QuantizedOnnx:
    """Return a float ONNX model with its layers in int8, as QuantizeLinear and DequantizeLinear around them.

    Args:
        proto: the float model; it is left as it is.
        spec: spec of the new model; its `excluded_layers` stay in float32.
        ranges: result of `activation_ranges`, for every layer of the model.

    Raises:
        InputError: the model has layers that are no modules of the PyTorch model.
    """
    tensors = _tensor_ranges(proto, spec, ranges)
    others = [node.name for node in proto.graph.node if node.op_type == "Relu" and node.output[0] not in tensors]
    quantized = _quantize(copy.deepcopy(proto), tensors, [*spec.excluded_layers, *others])
    _restore_exact_inputs(quantized, spec.excluded_layers)
    return QuantizedOnnx(quantized, tensors)


def _tensor_ranges(proto: "ModelProto", spec: Spec, ranges: Mapping[str, LayerRanges]) -> dict[str, Range]:
    """Return the ranges of the layers' inputs and outputs by the tensors' names; an input's where a tensor is both."""
    nodes = [node for node in proto.graph.node if node.op_type in LAYERS]
    if unknown := [node.name for node in nodes if node.name not in ranges]:
        raise InputError(f"{spec.model} cannot be quantized: {unknown[0]} is no module of it; choose another precision")
    outputs = {node.output[0]: ranges[node.name].output for node in nodes if node.op_type not in FLOAT_OUTPUTS}
    return outputs | {node.input[0]: ranges[node.name].input for node in nodes}


def _quantize(proto: "ModelProto", tensors: Mapping[str, Range], excluded: list[str]) -> "ModelProto":
    """Return what ONNX Runtime's quantizer makes of a model with these ranges, without calibration of its own."""
    import onnx

    with quiet(), scratch_folder() as folder:
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

        data = {
            name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in tensors.items()
        }
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), folder / "ranges.json")
        quantize_static(
            proto,
            folder / "int8.onnx",
            None,  # the ranges are known
            calibration_cache_path=folder / "ranges.json",
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*LAYERS, "Relu"],  # with Relu it is the tensor behind it that is rounded
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
            extra_options={"OpTypesToExcludeOutputQuantization": [*FLOAT_OUTPUTS]},
        )
        return onnx.load(folder / "int8.onnx")


def _restore_exact_inputs(proto: "ModelProto", excluded: Collection[str]) -> None:
    """Let every operator but quantized layers read exact values, and the model give them: residual sums, say.

    ONNX Runtime's quantizer gives rounded values to every reader of a tensor that one layer reads in 8 bits. The output
    of a quantized layer stays rounded, because that is what its kernel writes.
    """
    makers = {name: node for node in proto.graph.node for name in node.output}
    outputs = {output.name for output in proto.graph.output}

    def is_quantized(node: "NodeProto") -> bool:
        return node.op_type in LAYERS and node.name not in excluded

    def is_exact(name: str) -> bool:
        node = makers.get(name)
        if node is not None and node.op_type == "Relu":  # is part of the layer before it
            node = makers.get(node.input[0])
        return node is None or not is_quantized(node) or node.op_type in FLOAT_OUTPUTS

    for node in [each for each in proto.graph.node if each.op_type == "DequantizeLinear"]:
        rounding = makers.get(node.input[0])
        if rounding is None or not is_exact(exact := rounding.input[0]):  # a weight, or a layer's output
            continue
        rounded = node.output[0]
        if rounded in outputs:
            _swap(proto, exact, rounded)
            exact, rounded = rounded, exact
        for each in proto.graph.node:
            if not is_quantized(each) and each is not rounding:
                each.input[:] = [exact if name == rounded else name for name in each.input]


def _swap(proto: "ModelProto", one: str, other: str) -> None:
    """Exchange the names of two tensors."""
    names = {one: other, other: one}
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
