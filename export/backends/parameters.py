"""The weights that a file computes with, held against its model's: one wrong weight hardly shows in any output.

They are read as each format stores them, 8-bit ones multiplied out, together with the largest error that rounding to
the format can have made of each. For 8 bits the scales that belong together are compared too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from shvit.shvit import SHViT

from ..quantization.ranges import LEVELS, Range
from ..wrappers import layers

ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}
"""Largest relative error of a value rounded to each format."""
SMALLEST = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
"""Largest absolute error near zero, half of the smallest number."""
FOLDING = 1e-5
"""What folding norms in float32 may differ by from one processor to another, as a share of a tensor's largest value."""
GAIN_SIGMAS = 6.0


class Stored(NamedTuple):
    """A tensor of a file."""

    value: torch.Tensor
    """float32, what it stands for."""
    rounding: torch.Tensor
    """The largest error that rounding made, of the same shape or one that can be spread to it."""


@dataclass(frozen=True)
class LayerParameters:
    """A convolution or linear layer of a file."""

    weight: Stored
    """(out, in / groups, …)."""
    bias: Stored | None


def stored(value: Any, dtype: torch.dtype | None = None) -> Stored:
    """A tensor of floats; `dtype` is what it was rounded to where that is not its own type."""
    value = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
    kind = dtype or value.dtype
    value = value.float()
    return Stored(value, (value.abs() * ROUNDING[kind]).clamp_min(SMALLEST.get(kind, 0.0)))


def quantized(levels: Any, scale: Any, zero_point: Any = 0, axis: int = 0) -> Stored:
    """A tensor of integers with a scale for each index of `axis`, or one for all; scales may be float16 themselves."""
    step = stored(np.array(scale))
    levels = torch.from_numpy(np.array(levels, dtype=np.float32))
    zero_point = torch.from_numpy(np.array(zero_point, dtype=np.float32))
    shape = [1] * levels.dim()
    if step.value.dim() == 1 and len(step.value) > 1:
        shape[axis] = len(step.value)
    size, error = step.value.reshape(shape), step.rounding.reshape(shape)
    counts = levels - (zero_point.reshape(shape) if zero_point.numel() == size.numel() else zero_point)
    error = error + size * FOLDING
    # A scale in float16 is rounded, and so were the weights before; what a scale rounded down cannot reach is cut.
    return Stored(counts * size, size / 2 + (3 * counts.abs() + 1) * error)


# --- compared ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faults:
    """What the comparison found."""

    compared: int
    """Layers of the file that are layers of the model."""
    worst: float
    """The largest error over the largest that rounding explains, of weights, biases and scales; above 1 is a fault."""
    faults: tuple[str, ...]
    """What is wrong, the worst first; empty for a sound file."""


def compare_parameters(found: Mapping[str, LayerParameters], model: nn.Module) -> Faults:
    """Compares a file's weights with those of its deployed model.

    Every weight and bias may be off by what rounding to its format makes of it. Rounding errors have no direction: the
    whole of a layer's weights, and of all layers', may not be larger or smaller by more than chance lets them be. Of
    other models than SHViT a converter may have multiplied a channel's weights by a scale that followed.
    """
    exact = holds_shvit(model)
    worst: list[tuple[float, str]] = []
    gains, compared = [], 0
    for name, layer in layers(model):
        parameters = found.get(name)
        if parameters is None or parameters.weight.value.shape != layer.weight.shape:
            continue
        compared += 1
        weight = torch.as_tensor(layer.weight).detach().float()
        if not exact:
            weight = weight * _channel_gains(weight, parameters.weight.value)
        worst.append((_excess(weight, parameters.weight), f"a weight of {name}"))
        gain, sigma = _gain(weight, parameters.weight)
        gains.append((gain, sigma))
        worst.append((abs(gain) / (GAIN_SIGMAS * sigma), f"the scale of {name}'s weights"))
        bias = layer.bias
        if exact and isinstance(bias, torch.Tensor):
            if parameters.bias is None:
                if bias.detach().abs().max() > 0:
                    worst.append((math.inf, f"the bias of {name}, which is missing,"))
            else:
                worst.append((_excess(bias.detach().float(), parameters.bias), f"a bias of {name}"))
    worst.append((_joint_gain(gains), "the scale of all weights"))
    wrong = sorted((each for each in worst if each[0] > 1), key=lambda each: -each[0])
    faults = tuple(f"{what} is {_times(excess)} what rounding explains" for excess, what in wrong)
    return Faults(compared, max(excess for excess, _ in worst), faults)


def holds_shvit(model: nn.Module) -> bool:
    """Whether a file's weights are those of the deployed model one by one."""
    return any(isinstance(module, SHViT) for module in model.modules())


def _times(excess: float) -> str:
    return "off by more than" if math.isinf(excess) else f"off by {excess:.1f} times"


def _excess(expected: torch.Tensor, got: Stored) -> float:
    """The largest error over the largest that rounding explains."""
    if expected.shape != got.value.shape:
        return math.inf
    allowed = 1.02 * got.rounding + FOLDING * (expected.abs() + 0.1 * expected.abs().max())
    error = (expected - got.value).abs()
    return (error / allowed.clamp_min(1e-30)).max().item() if error.numel() else 0.0


def _gain(expected: torch.Tensor, got: Stored) -> tuple[float, float]:
    """By how much the file's weights are larger than the model's as a whole, and what chance makes of it."""
    power = expected.double().square().sum().clamp_min(1e-300)
    gain = ((got.value.double() - expected.double()) * expected.double()).sum() / power
    rounding = got.rounding.double().expand(expected.shape)
    sigma = (rounding.square() * expected.double().square()).sum().div(3).sqrt() / power
    return gain.item(), max(sigma.item(), 0.0) + FOLDING / GAIN_SIGMAS


def _joint_gain(gains: list[tuple[float, float]]) -> float:
    """All layers' gains together, over what chance makes of them."""
    if not gains:
        return 0.0
    precision = sum(1 / sigma**2 for _, sigma in gains)
    mean = sum(gain / sigma**2 for gain, sigma in gains) / precision
    return abs(mean) / (GAIN_SIGMAS / math.sqrt(precision) + FOLDING)


def _channel_gains(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """The factor between each output channel's weights, (out, 1, …)."""
    flat, other = expected.flatten(1).double(), got.flatten(1).double()
    gains = (flat * other).sum(1) / flat.square().sum(1).clamp_min(1e-300)
    return gains.float().reshape(-1, *[1] * (expected.dim() - 1))


MIN_STEP = 2.0**-14
"""Core ML's least scale: finer ones say nothing of a range."""


def range_faults(learned: Mapping[str, Range], found: Mapping[str, tuple[float, float]]) -> list[str]:
    """8-bit tensors whose scales and zero points do not stand for the ranges that were learned for them.

    Args:
        learned: what the file says of itself; nothing is known of other tensors.
        found: scale and zero point that each tensor is read with.
    """
    faults = []
    for name in learned.keys() & found.keys():
        (low, high), (scale, zero_point) = learned[name], found[name]
        step = (high - low) / LEVELS
        if step < MIN_STEP:
            continue
        if abs(scale / step - 1) > 2 * ROUNDING[torch.float16] or abs(zero_point + low / scale) > 0.51:
            ends = f"{-zero_point * scale:.4g} to {(LEVELS - zero_point) * scale:.4g}"
            faults.append(f"{name} is rounded between {ends} in place of {low:.4g} to {high:.4g}")
    return sorted(faults)


# --- ONNX -------------------------------------------------------------------------------------------------------------


def onnx_parameters(proto: Any) -> dict[str, LayerParameters]:
    """Those of an ONNX file, by its layers' names."""
    from .onnx import LAYERS

    tensors = _OnnxTensors(proto)
    found = {}
    for node in proto.graph.node:
        if node.op_type not in LAYERS or (weight := tensors.constant(node.input[1])) is None:
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "Gemm" and not attributes.get("transB"):
            weight = Stored(weight.value.T, weight.rounding.T if weight.rounding.dim() == 2 else weight.rounding)
        bias = tensors.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        found[node.name] = LayerParameters(weight, bias)
    return found


class _OnnxTensors:
    """A graph's constants, and what makes its other tensors."""

    def __init__(self, proto: Any):
        self.initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.makers = {name: node for node in proto.graph.node for name in node.output}

    def array(self, name: str) -> np.ndarray:
        import onnx

        return onnx.numpy_helper.to_array(self.initializers[name])

    def constant(self, name: str) -> Stored | None:
        """A constant, or integers that are multiplied out; None for what is computed."""
        if name in self.initializers:
            return stored(self.array(name))
        node = self.makers.get(name)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self.initializers:
            return None
        levels, scale = self.array(node.input[0]), self.array(node.input[1])
        zero_point = self.array(node.input[2]) if len(node.input) > 2 else np.zeros(())
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        return quantized(levels, scale, zero_point, axis if levels.ndim > axis else 0)


def onnx_scale_faults(proto: Any) -> list[str]:
    """Scales and zero points of an ONNX file that do not belong together.

    What QuantizeLinear divides by DequantizeLinear multiplies with; a bias has the product of its layer's two scales,
    as ONNX Runtime's kernels take for granted.
    """
    from .onnx import LAYERS

    tensors, faults = _OnnxTensors(proto), []
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            source = tensors.makers.get(node.input[0])
            if source is not None and source.op_type == "QuantizeLinear":
                same = all(
                    np.array_equal(tensors.array(a), tensors.array(b))
                    for a, b in zip(source.input[1:], node.input[1:], strict=False)
                )
                if not same:
                    faults.append(f"{source.input[0]} is rounded with another scale or zero point than it is read with")
        elif node.op_type in LAYERS and len(node.input) > 2:
            makers = [tensors.makers.get(name) for name in node.input[:3]]
            if all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers):
                x, weight, bias = (tensors.array(maker.input[1]) for maker in makers)  # type: ignore[union-attr]
                if not np.allclose(x * weight, bias, rtol=1e-3, atol=0):
                    faults.append(f"the bias of {node.name} has another scale than its input and weights")
    return faults


def onnx_steps(proto: Any) -> dict[str, tuple[float, float]]:
    """Scale and zero point that each rounded tensor of an ONNX file is read with."""
    tensors, found = _OnnxTensors(proto), {}
    for node in proto.graph.node:
        source = tensors.makers.get(node.input[0])
        if node.op_type != "DequantizeLinear" or source is None or source.op_type != "QuantizeLinear":
            continue
        constants = [tensors.array(value) for value in node.input[1:] if value in tensors.initializers]
        if len(constants) == 2 and all(value.size == 1 for value in constants):
            scale, zero_point = (value.item() for value in constants)
            found[source.name.removesuffix("_QuantizeLinear")] = (float(scale), float(zero_point))
    return found


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


def openvino_parameters(model: Any) -> dict[str, LayerParameters]:
    """Those of an OpenVINO IR, by its layers' names."""
    layers = {
        op.get_friendly_name().removesuffix("/WithoutBiases"): (op, _unshaped(_input(op, 1)), _bias(op))
        for op in model.get_ordered_ops()
        if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul") and _is_constant(_input(op, 1))
    }
    values = _evaluate([node for _, weight, bias in layers.values() for node in (weight, bias) if node is not None])
    found = {}
    for name, (op, weight, bias) in layers.items():
        value = _as_stored(weight, values)
        if op.get_type_name() == "MatMul" and not op.get_attributes()["transpose_b"]:
            value = Stored(value.value.T, value.rounding.T)
        if value.value.dim() == 5:  # (groups, out / groups, …)
            value = Stored(value.value.flatten(0, 1), value.rounding.flatten(0, 1))
        found[name] = LayerParameters(value, None if bias is None else _flat(_as_stored(bias, values)))
    return found


def _bias(op: Any) -> Any:
    """The constant that is added to what an operation gives, if nothing else is done with that."""
    users = [each.get_node() for each in op.output(0).get_target_inputs()]
    if len(users) != 1 or users[0].get_type_name() != "Add" or not _is_constant(_input(users[0], 1)):
        return None
    return _unshaped(_input(users[0], 1))


def _unshaped(node: Any) -> Any:
    """What a constant was before it was given the shape that the operation wants."""
    return _unshaped(_input(node, 0)) if node.get_type_name() == "Reshape" else node


def _flat(tensor: Stored) -> Stored:
    return Stored(tensor.value.flatten(), tensor.rounding.flatten())


def _input(op: Any, index: int) -> Any:
    return op.input_value(index).get_node()


def _is_constant(op: Any) -> bool:
    inputs = op.input_values()
    return op.get_type_name() == "Constant" or (bool(inputs) and all(_is_constant(each.get_node()) for each in inputs))


def _evaluate(nodes: list[Any]) -> dict[str, np.ndarray]:
    """What constant parts of a graph give, by the operation's unique name."""
    import openvino as ov

    from .openvino import core

    if not nodes:
        return {}
    results = [ov.opset13.result(node) for node in nodes]
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core().compile_model(ov.Model(results, [], "constants"), "CPU", options)
    outputs = compiled({})
    return {node.get_name(): np.array(outputs[index]) for index, node in enumerate(nodes)}


def _as_stored(node: Any, values: Mapping[str, np.ndarray]) -> Stored:
    """A constant part of a graph, with the rounding of the narrowest type in it; integers have a scale beside them."""
    value = torch.from_numpy(values[node.get_name()].astype(np.float32))
    types = {each.get_element_type().get_type_name() for each in _constants(node)}
    if node.get_type_name() == "Multiply" and types & {"i8", "u8", "i32"}:
        half = torch.from_numpy(np.array(_input(node, 1).data, dtype=np.float32)) / 2
        return Stored(value, half + value.abs() * ROUNDING[torch.float16])
    kinds = {"f16": torch.float16, "bf16": torch.bfloat16}
    return stored(value, next((kinds[each] for each in kinds if each in types), torch.float32))


def _constants(node: Any) -> list[Any]:
    if node.get_type_name() == "Constant":
        return [node]
    return [each for source in node.input_values() for each in _constants(source.get_node())]


def openvino_scale_faults(model: Any) -> list[str]:
    """FakeQuantize operations of an IR whose levels do not stand for what was rounded to them."""
    faults = []
    for op in model.get_ordered_ops():
        if op.get_type_name() == "FakeQuantize" and all(_is_constant(_input(op, index)) for index in (1, 2, 3, 4)):
            low_in, high_in, low_out, high_out = (np.array(_input(op, index).data).ravel() for index in (1, 2, 3, 4))
            span = np.abs(high_in - low_in).max()
            if max(np.abs(low_in - low_out).max(), np.abs(high_in - high_out).max()) > 1e-3 * span:
                faults.append(f"{op.get_friendly_name()} rounds to another range than it reads with")
    return faults


def openvino_steps(model: Any) -> dict[str, tuple[float, float]]:
    """Scale and zero point that each rounded tensor of an IR is read with, by the name that it had in ONNX."""
    found = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() == "FakeQuantize" and all(_is_constant(_input(op, index)) for index in (3, 4)):
            low, high = (np.array(_input(op, index).data, dtype=np.float64).ravel() for index in (3, 4))
            if len(low) == len(high) == 1 and high > low:
                scale = float(high[0] - low[0]) / LEVELS
                found[op.get_friendly_name().removesuffix("_DequantizeLinear")] = (scale, float(-low[0]) / scale)
    return found


# --- Core ML ----------------------------------------------------------------------------------------------------------


def coreml_parameters(package: Any) -> dict[str, LayerParameters]:
    """Those of a Core ML package opened by `mil`, by its layers' names."""
    from ..mil.program import LAYERS

    found = {}
    for op in package.program.function.operations:
        if op.op_type in LAYERS and (weight := _mil_constant(op.inputs.get("weight"))) is not None:
            found[op.name] = LayerParameters(weight, _mil_constant(op.inputs.get("bias")))
    return found


def _mil_constant(var: Any) -> Stored | None:
    op = None if var is None else var.op
    if op is None:
        return None
    if op.op_type == "const":
        return stored(np.asarray(var.val))
    if op.op_type == "constexpr_affine_dequantize":
        values = {name: np.asarray(op.inputs[name].val) for name in ("quantized_data", "scale", "zero_point", "axis")}
        return quantized(values["quantized_data"], values["scale"], values["zero_point"], int(values["axis"]))
    return None


def coreml_scale_faults(package: Any) -> list[str]:
    """Tensors of a package that are rounded with another scale or zero point than they are read with."""
    faults = []
    for op in package.program.function.operations:
        source = op.inputs["input"].op if op.op_type == "dequantize" else None
        if source is not None and source.op_type == "quantize":
            pairs = [(source.inputs.get(name), op.inputs.get(name)) for name in ("scale", "zero_point")]
            if any(a is not None and b is not None and not np.array_equal(a.val, b.val) for a, b in pairs):
                faults.append(f"{source.inputs['x' if 'x' in source.inputs else 'input'].name} is rounded with another "
                              "scale or zero point than it is read with")  # fmt: skip
    return faults


def coreml_steps(package: Any) -> dict[str, tuple[float, float]]:
    """Scale and zero point that each layer's input is read with, by the layer's name."""
    from ..mil.program import LAYERS

    found = {}
    for op in package.program.function.operations:
        source = op.inputs["x"].op if op.op_type in LAYERS else None
        if source is not None and source.op_type == "dequantize":
            zero_point = source.inputs.get("zero_point")
            found[op.name] = (float(source.inputs["scale"].val), 0.0 if zero_point is None else float(zero_point.val))
    return found
