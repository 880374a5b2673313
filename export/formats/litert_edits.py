"""What is changed in LiteRT's graphs: names, 8-bit and 16-bit weights, layers' outputs, rounding after each operator.

Weights are rounded by LiteRT's own quantizer (ai-edge-quantizer), to ranges that are given to it.
"""

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from shvit.terminal import muted

from ..metadata import INPUT
from ..quantization.qdq import LayerRanges
from ..quantization.ranges import Range
from ..wrappers import layers
from .litert import (
    LAYER_AXES,
    NO_ACTIVATION,
    RELU,
    Layer,
    constant,
    create_interpreter,
    graph_of,
    layers_of,
    name_of,
    operator_name,
    pack,
    scales_of,
    unpack,
    weight_of,
)
from .rounding import Outputs, Rounded, join

if TYPE_CHECKING:
    from ai_edge_litert.schema_py_generated import ModelT, OperatorT, TensorT

SAME = 1e-5  # of a layer's largest weight: folding may have moved it by that
FLOAT_OUTPUT = "FULLY_CONNECTED"
"""An operator whose input is rounded by its own range as it runs, and whose output is float32: logits stay exact."""


# --- names ------------------------------------------------------------------------------------------------------------


def name_parts(model: "ModelT", module: nn.Module, outputs: Sequence[str]) -> None:
    """Give each layer's output the layer's name in the PyTorch model, told by its weight, and the ports their names."""
    left = list(layers(module))
    for layer in list(layers_of(model)):
        weight = torch.from_numpy(weight_of(model, layer).copy())
        for place, (name, each) in enumerate(left):
            own = torch.as_tensor(each.weight).detach().float()
            if (
                own.numel() == weight.numel()
                and (own.flatten() - weight.flatten()).abs().max() <= SAME * own.abs().max()
            ):
                graph_of(model).tensors[layer.operator.outputs[0]].name = name.encode()
                del left[place]
                break
    graph, signature = graph_of(model), model.signatureDefs[0]
    graph.tensors[graph.inputs[0]].name = INPUT.encode()
    signature.inputs[0].name = INPUT.encode()
    signature.outputs.sort(key=lambda port: int(port.name.decode().removeprefix("output_")))
    graph.outputs = [port.tensorIndex for port in signature.outputs]
    for port, name in zip(signature.outputs, outputs, strict=True):
        port.name = name.encode()


# --- weights ----------------------------------------------------------------------------------------------------------


def halve(content: bytes) -> bytes:
    """Return a float model with the weights of its layers in float16."""
    from ai_edge_quantizer import qtyping, quantizer
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    half = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
    config = qtyping.OpQuantizationConfig(weight_tensor_config=half, explicit_dequantize=True)
    work = quantizer.Quantizer(content)
    for kind in LAYER_AXES:
        work.update_quantization_recipe(".*", qtyping.TFLOperationName(kind), config, AlgorithmName.FLOAT_CASTING)
    with muted():
        return bytes(work.quantize(enable_progress_report=False).quantized_model)


def quantize(
    content: bytes, ranges: Mapping[str, LayerRanges], excluded: Collection[str]
) -> tuple[bytes, dict[str, Range]]:
    """Return a float model with its layers in int8, and the ranges of their inputs and outputs, by NAME.input ….

    Every other operator reads and writes float32. A tensor that one layer writes and another reads has one range, that
    of its reader.

    Args:
        ranges: result of `activation_ranges`, for every layer of the model.
        excluded: layers that stay in float32.
    """
    from ai_edge_quantizer import qtyping, quantizer

    model = unpack(content)
    chosen = [each for each in layers_of(model) if each.name in ranges and each.name not in excluded]
    tensors = _tensor_ranges(model, chosen, ranges)
    chosen = [each for each in chosen if all(high > low for low, high in _ends(each, tensors).values())]
    work = quantizer.Quantizer(content)
    for each in chosen:
        operation = qtyping.TFLOperationName(each.kind)
        own = f"^{re.escape(each.name)};?$"
        if each.kind == FLOAT_OUTPUT:
            work.add_dynamic_config(own, operation, num_bits=8)
        else:
            work.add_static_config(own, operation, activation_num_bits=8, weight_num_bits=8)
    names = {index: name_of(tensor) for index, tensor in enumerate(graph_of(model).tensors)}
    known = {names[index]: {"min": np.float32(low), "max": np.float32(high)} for index, (low, high) in tensors.items()}
    with muted():
        quantized = bytes(work.quantize(known, enable_progress_report=False).quantized_model)
    learned = {f"{each.name}.{end}": span for each in chosen if each.kind != FLOAT_OUTPUT
               for end, span in _ends(each, tensors).items()}  # fmt: skip
    return quantized, learned


def _tensor_ranges(model: "ModelT", chosen: Sequence[Layer], ranges: Mapping[str, LayerRanges]) -> dict[int, Range]:
    """Return the ranges of the layers' inputs and outputs by the tensors' numbers."""
    outputs = {}
    for each in chosen:
        low, high = ranges[each.name].output
        outputs[int(each.operator.outputs[0])] = (0.0 if each.rectified else low, high)
    return outputs | {int(each.operator.inputs[0]): ranges[each.name].input for each in chosen}


def _ends(layer: Layer, tensors: Mapping[int, Range]) -> dict[str, Range]:
    return {"input": tensors[layer.operator.inputs[0]], "output": tensors[layer.operator.outputs[0]]}


# --- layers' outputs --------------------------------------------------------------------------------------------------


def with_layer_outputs(model: "ModelT") -> tuple[bytes, list[str]]:
    """Return a model that gives the output of each layer, before its activation, and the layers' names.

    In int8 a layer whose activation cuts its output is left out: without it the output would be another one.
    """
    model = copy.deepcopy(model)
    graph, names, results = graph_of(model), [], []
    for layer in list(layers_of(model)):
        index = int(layer.operator.outputs[0])
        if layer.rectified:
            if (
                scales_of(graph.tensors[index]) is not None
                or layer.operator.builtinOptions.fusedActivationFunction != RELU
            ):
                continue
            index = _separate_activation(model, layer.operator)
        names.append(layer.name)
        results.append(index)
    graph.outputs, model.signatureDefs = results, []
    return pack(model), names


def _separate_activation(model: "ModelT", operator: "OperatorT") -> int:
    """Put an operator's ReLU behind it; return the tensor between them, which bears the name of both before."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator

    graph = graph_of(model)
    after = graph.tensors[operator.outputs[0]]
    before = _add_tensor(model, after)
    graph.tensors[before].name, after.name = after.name, after.name + b"/activation"
    place = graph.operators.index(operator)
    graph.operators.insert(place + 1, _create_operator(model, BuiltinOperator.RELU, before, operator.outputs[0]))
    operator.outputs, operator.builtinOptions.fusedActivationFunction = [before], NO_ACTIVATION
    return before


def _add_tensor(model: "ModelT", like: "TensorT", dtype: int | None = None) -> int:
    """Add a tensor that is computed, of a type and shape of another; return its number."""
    tensors = graph_of(model).tensors
    tensor = copy.deepcopy(like)
    tensor.name, tensor.buffer = f"{name_of(like)}/{len(tensors)}".encode(), 0
    tensor.type = like.type if dtype is None else dtype
    tensors.append(tensor)
    return len(tensors) - 1


def _create_operator(model: "ModelT", code: int, source: int, result: int, options: Any = None) -> "OperatorT":
    """Return an operator of one input and one output."""
    from ai_edge_litert.schema_py_generated import BuiltinOptions, OperatorCodeT, OperatorT

    kind, operator = OperatorCodeT(), OperatorT()
    kind.builtinCode, kind.deprecatedBuiltinCode, kind.version = code, min(code, 127), 1
    model.operatorCodes.append(kind)
    operator.opcodeIndex = len(model.operatorCodes) - 1
    operator.inputs, operator.outputs = [source], [result]
    if options is not None:
        operator.builtinOptions, operator.builtinOptionsType = options, BuiltinOptions.CastOptions
    return operator


# --- rounding ---------------------------------------------------------------------------------------------------------

EXACT = (
    *("CONCATENATION", "DEQUANTIZE", "EXPAND_DIMS", "GATHER", "MAX_POOL_2D", "PACK", "PAD", "PADV2", "RELU", "RESHAPE"),
    *("SLICE", "SPLIT", "SQUEEZE", "STRIDED_SLICE", "TILE", "TRANSPOSE", "UNPACK"),
)
"""Operators whose results are among their inputs, or 0."""


class RoundedLitert(Rounded):
    """A LiteRT model whose values are rounded to float16 after each operator, by casts in its graph."""

    def __init__(self, model: "ModelT", threads: int | None):
        model = copy.deepcopy(model)
        graph = graph_of(model)
        for layer in list(layers_of(model)):
            if layer.operator.builtinOptions.fusedActivationFunction == RELU:
                _separate_activation(model, layer.operator)
        _round_constants(model)
        self.outputs = len(graph.outputs)
        self.layers = {int(each.operator.outputs[0]): each.name for each in layers_of(model)}
        exact = dict(_round_results(model))
        super().__init__(list(exact.values()), torch.float16, 1)
        graph.outputs = [*graph.outputs, *exact]
        self.exact, self.model = exact, model
        model.signatureDefs = []
        self.interpreter = create_interpreter(pack(model), threads)

    def run(self, batch: torch.Tensor) -> Outputs:
        """Return all outputs in order for what `Spec.feed` returns."""
        return join([self._run(image)[0] for image in batch.split(1)])

    def run_layers(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the output of each convolution and linear layer, by its dotted name, for what `Spec.feed` returns."""
        parts = [self._run(image)[1] for image in batch.split(1)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _run(self, image: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        results = invoke(self.interpreter, image)
        named = dict(zip(self.exact.values(), results[self.outputs :], strict=True))
        for name, value in named.items():
            self.record(name, value.abs().max().item() if value.numel() else 0.0)
        names = set(self.layers.values())
        return results[: self.outputs], {
            name: to_planes(value).half().float() for name, value in named.items() if name in names
        }


def _round_constants(model: "ModelT") -> None:
    """Round the constants of a graph that are float32 to what float16 has."""
    for index, tensor in enumerate(graph_of(model).tensors):
        value = constant(model, index)
        if value is not None and value.dtype == np.float32:
            half = value.astype(np.float16).astype(np.float32)
            model.buffers[tensor.buffer].data = np.frombuffer(half.tobytes(), np.uint8)


def _round_results(model: "ModelT") -> Iterator[tuple[int, str]]:
    """Put a cast to float16 and one back behind the input and each operator; yield exact results and their names."""
    from ai_edge_litert.schema_py_generated import TensorType

    graph = graph_of(model)
    placed: list[OperatorT] = []
    for index in graph.inputs:
        if graph.tensors[index].type == TensorType.FLOAT32:
            rounded = _add_tensor(model, graph.tensors[index])
            for operator in graph.operators:
                operator.inputs = [rounded if each == index else each for each in operator.inputs]
            placed += _casts(model, index, rounded)
    for operator in graph.operators:
        placed.append(operator)
        if operator_name(model, operator) in EXACT:
            continue
        results = list(operator.outputs)
        for place, index in enumerate(results):
            if graph.tensors[index].type == TensorType.FLOAT32:
                exact = _add_tensor(model, graph.tensors[index])
                results[place] = exact
                placed += _casts(model, exact, index)
                yield exact, name_of(graph.tensors[index])
        operator.outputs = results
    graph.operators = placed


def _casts(model: "ModelT", source: int, result: int) -> list["OperatorT"]:
    """Return the operators that give `result` the values of `source`, rounded to float16."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator, CastOptionsT, TensorType

    half = _add_tensor(model, graph_of(model).tensors[source], TensorType.FLOAT16)
    operators = []
    for first, second, types in ((source, half, ("FLOAT32", "FLOAT16")), (half, result, ("FLOAT16", "FLOAT32"))):
        options = CastOptionsT()
        options.inDataType, options.outDataType = (getattr(TensorType, each) for each in types)
        operators.append(_create_operator(model, BuiltinOperator.CAST, first, second, options))
    return operators


# --- run --------------------------------------------------------------------------------------------------------------


def invoke(interpreter: Any, image: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of a graph for one image, 8-bit ones as the values that they stand for."""
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image.numpy())
    interpreter.invoke()
    results = []
    for each in interpreter.get_output_details():
        value = torch.from_numpy(interpreter.get_tensor(each["index"]))
        scales, zeros = each["quantization_parameters"]["scales"], each["quantization_parameters"]["zero_points"]
        results.append((value.float() - float(zeros[0])) * float(scales[0]) if len(scales) else value)
    return results


def to_planes(value: torch.Tensor) -> torch.Tensor:
    """Return (B, H, W, C), as LiteRT's convolutions give it, as (B, C, H, W); anything else as it is."""
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value
