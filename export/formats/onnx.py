"""Graphs of ONNX files: how they are read, checked and computed with rounding, and their weights."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shvit.errors import InputError, first_line
from shvit.files import check_file, is_file
from shvit.sessions import create_session

from ..guards import check_elements, check_operators
from ..metadata import INPUT
from ..quantization.qdq import LAYERS
from .parameters import LayerParameters, Stored, quantized, stored
from .rounding import EXACT_OPERATORS, ROWS, Outputs, Rounded, join

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession


def load_onnx(path: Path) -> "ModelProto":
    """Return an ONNX file's protobuf; raise InputError where it is missing or not ONNX."""
    import onnx
    from google.protobuf.message import DecodeError

    check_file(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: {size / 1e9:.1f} GB is more than the {MAX_BYTES / 1e9:.1f} GB of one ONNX file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable ONNX file") from error
    _check_external(proto, path)
    return proto


MAX_BYTES = (2 << 30) - 1  # limit of protobuf, in which ONNX is written


def _graphs(proto: "ModelProto") -> Iterator[Any]:
    """Yield the graph, the graphs in its nodes' attributes at any depth, and the bodies of functions."""
    import onnx

    left = [proto.graph, *proto.functions]
    while left:
        graph = left.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    left.append(attribute.g)
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    left.extend(attribute.graphs)


def external_files(proto: "ModelProto") -> list[str]:
    """Return the names of further files that hold a model's weights, in order; none where it is one file."""
    import onnx

    names: dict[str, None] = {}
    for graph in _graphs(proto):
        tensors = list(getattr(graph, "initializer", ()))
        for sparse in getattr(graph, "sparse_initializer", ()):
            tensors += [sparse.values, sparse.indices]
        for node in graph.node:
            for attribute in node.attribute:
                tensors += [attribute.t, *attribute.tensors]
                tensors += [attribute.sparse_tensor.values, attribute.sparse_tensor.indices]
        for tensor in tensors:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                names[next((each.value for each in tensor.external_data if each.key == "location"), "")] = None
    return list(names)


def _check_external(proto: "ModelProto", path: Path) -> None:
    """Raise InputError where weights are to be read from elsewhere than from files in the model's own folder."""
    folder = path.resolve().parent
    for name in external_files(proto):
        where = folder / name
        if not name or Path(name).is_absolute() or "\\" in name or not where.resolve().is_relative_to(folder):
            raise InputError(f"{path}: has weights in {name!r}, outside of its own folder; save the model as one file")
        if not is_file(where):
            raise InputError(f"{path}: has weights in {name}, which is not beside it")


def check_graph(proto: "ModelProto", path: Path) -> None:
    """Raise InputError for what no file of `shvit export` has, and what could take this machine with it.

    That is weights in other files (no hash of the artifact covers them), loops, and tensors that are too large, as far
    as shapes can be told without running the model.
    """
    import onnx

    if names := external_files(proto):
        raise InputError(f"{path}: keeps weights in another file, {names[0]}; an artifact is one file, export it again")
    operators = {node.op_type for graph in _graphs(proto) for node in graph.node}
    check_operators(path, operators)
    light = onnx.ModelProto()  # shapes do not depend on what is in large tensors
    light.CopyFrom(proto)
    for tensor in light.graph.initializer:
        if len(tensor.raw_data) > MAX_SHAPE_BYTES:
            tensor.ClearField("raw_data")
    graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    values = [(each.name, each.type.tensor_type.shape) for each in (*graph.value_info, *graph.output)]
    check_elements(path, [(name, [dim.dim_value or None for dim in shape.dim]) for name, shape in values])
    check_elements(path, [(tensor.name, list(tensor.dims)) for tensor in graph.initializer])


MAX_SHAPE_BYTES = 4096  # of a tensor whose values may be a shape


def metadata(proto: "ModelProto") -> dict[str, str]:
    """Return an ONNX file's metadata."""
    return {prop.key: prop.value for prop in proto.metadata_props}


def operators(proto: "ModelProto") -> dict[str, int]:
    """Return the number of each operator in an ONNX file, most frequent first."""
    return dict(Counter(node.op_type for node in proto.graph.node).most_common())


def precision_of(proto: "ModelProto") -> str:
    """Return the precision of a third-party model, by its operators and the types of its weights."""
    import onnx

    if {"QuantizeLinear", "QLinearConv", "DynamicQuantizeLinear"} & set(operators(proto)):
        return "int8"
    halves = sum(each.data_type == onnx.TensorProto.FLOAT16 for each in proto.graph.initializer)
    return "fp16" if 2 * halves > len(proto.graph.initializer) else "fp32"


# --- weights ----------------------------------------------------------------------------------------------------------


def onnx_parameters(proto: "ModelProto") -> dict[str, LayerParameters]:
    """Return the weights of an ONNX file, by its layers' names."""
    tensors = _OnnxTensors(proto)
    parameters = {}
    for node in proto.graph.node:
        if node.op_type not in LAYERS or (weight := tensors.constant(node.input[1])) is None:
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "Gemm" and not attributes.get("transB"):
            weight = Stored(weight.value.T, weight.rounding.T if weight.rounding.dim() == 2 else weight.rounding)
        bias = tensors.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        parameters[node.name] = LayerParameters(weight, bias)
    return parameters


class _OnnxTensors:
    """A graph's constants, and the nodes that compute its other tensors."""

    def __init__(self, proto: "ModelProto"):
        self.initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.makers = {name: node for node in proto.graph.node for name in node.output}

    def array(self, name: str) -> np.ndarray:
        import onnx

        return onnx.numpy_helper.to_array(self.initializers[name])

    def constant(self, name: str) -> Stored | None:
        """Return a constant, 8-bit ones multiplied by their scale; None for what is computed."""
        if name in self.initializers:
            return stored(self.array(name))
        node = self.makers.get(name)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self.initializers:
            return None
        levels, scale = self.array(node.input[0]), self.array(node.input[1])
        zero_point = self.array(node.input[2]) if len(node.input) > 2 else np.zeros(())
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        return quantized(levels, scale, zero_point, axis if levels.ndim > axis else 0)


def onnx_scale_faults(proto: "ModelProto") -> list[str]:
    """Return the scales and zero points of an ONNX file that do not belong together, each as a sentence.

    What QuantizeLinear divides by DequantizeLinear multiplies with; a bias has the product of its layer's two scales,
    as ONNX Runtime's kernels take for granted.
    """
    tensors, faults = _OnnxTensors(proto), []
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            source = tensors.makers.get(node.input[0])
            if source is not None and source.op_type == "QuantizeLinear":
                pairs = zip(source.input[1:], node.input[1:], strict=False)
                if not all(np.array_equal(tensors.array(a), tensors.array(b)) for a, b in pairs):
                    faults.append(f"{source.input[0]} is rounded with another scale or zero point than it is read with")
        elif node.op_type in LAYERS and len(node.input) > 2:
            makers = [tensors.makers.get(name) for name in node.input[:3]]
            if all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers):
                x, weight, bias = (tensors.array(maker.input[1]) for maker in makers)  # type: ignore[union-attr]
                if not np.allclose(x * weight, bias, rtol=1e-3, atol=0):
                    faults.append(f"the bias of {node.name} has another scale than its input and weights")
    return faults


def onnx_steps(proto: "ModelProto") -> dict[str, tuple[float, float]]:
    """Return the scale and zero point that each rounded tensor of an ONNX file is read with."""
    tensors, steps = _OnnxTensors(proto), {}
    for node in proto.graph.node:
        source = tensors.makers.get(node.input[0])
        if node.op_type != "DequantizeLinear" or source is None or source.op_type != "QuantizeLinear":
            continue
        constants = [tensors.array(value) for value in node.input[1:] if value in tensors.initializers]
        if len(constants) == 2 and all(value.size == 1 for value in constants):
            scale, zero_point = (value.item() for value in constants)
            steps[source.name.removesuffix("_QuantizeLinear")] = (float(scale), float(zero_point))
    return steps


# --- rounding ---------------------------------------------------------------------------------------------------------


class RoundedOnnx(Rounded):
    """A float16 ONNX file, rounded to float16 after each node that gives float16; `proto` is not changed.

    Raises:
        InputError: ONNX Runtime refuses the graph.
    """

    def __init__(self, proto: "ModelProto", threads: int | None = None):
        self.graph, rounded = _rounding_graph(proto)
        self.threads = threads
        self.layers = {node.output[0]: node.name for node in proto.graph.node if node.op_type in LAYERS}
        rows = proto.graph.input[0].type.tensor_type.shape.dim[0]
        super().__init__(list(rounded.values()), torch.float16, rows.dim_value or ROWS)
        self.outputs = [output.name for output in proto.graph.output]
        self.measured = [(name, _measures(value)) for value, name in rounded.items()]
        self.session = self._session(self.graph)

    def run(self, batch: torch.Tensor) -> Outputs:
        """Return all outputs in order for what `Spec.feed` returns."""
        return self._run(self.session, self.outputs, batch)

    def run_layers(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the output of each convolution and linear layer, by its dotted name, for what `Spec.feed` returns."""
        import onnx

        graph = onnx.ModelProto()
        graph.CopyFrom(self.graph)
        graph.graph.output.extend(onnx.ValueInfoProto(name=value) for value in self.layers)
        outputs = self._run(self._session(graph), list(self.layers), batch)
        return dict(zip(self.layers.values(), outputs, strict=True))

    def _run(self, session: "InferenceSession", outputs: list[str], batch: torch.Tensor) -> Outputs:
        fetched = [*outputs, *(value for _, measures in self.measured for value in measures)]
        parts = []
        for chunk in batch.split(self.rows):
            results = session.run(fetched, {INPUT: chunk.numpy()})
            scalars = iter(map(float, results[len(outputs) :]))
            for (name, _), low, high, total in zip(self.measured, scalars, scalars, scalars, strict=True):
                self.record(name, max(-low, high) if math.isfinite(total) else math.inf)
            parts.append([torch.from_numpy(result).float() for result in results[: len(outputs)]])
        return join(parts)

    def _session(self, proto: "ModelProto") -> "InferenceSession":
        try:
            return create_session(proto.SerializeToString(), self.threads)
        except Exception as error:  # onnxruntime's own exception types are not public
            raise InputError(f"the ONNX file cannot be computed with rounding ({first_line(error)})") from error


MEASURES = ("ReduceMin", "ReduceMax", "ReduceSum")
"""Figures of each result before rounding; NaN, which may escape the first two, does not escape the sum."""


def _measures(value: str) -> list[str]:
    return [f"{value}/{measure}" for measure in MEASURES]


def _rounding_graph(proto: "ModelProto") -> tuple[Any, dict[str, str]]:
    """Return the graph in float32, rounding where it had float16, and the names of rounded values' nodes by value."""
    import onnx
    from onnx import TensorProto, helper

    half = _half_values(proto)
    graph = onnx.ModelProto()
    graph.CopyFrom(proto)
    del graph.graph.node[:], graph.graph.value_info[:]
    for tensor in graph.graph.initializer:
        _widen(tensor)
    for value in (*graph.graph.input, *graph.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    rounded: dict[str, str] = {}
    for original in proto.graph.node:
        node = graph.graph.node.add()
        node.CopyFrom(original)
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
        for index, value in enumerate(original.output):
            if value not in half or original.op_type in EXACT_OPERATORS:
                continue
            rounded[value] = (original.name or original.output[0]) + (f".{index}" if index else "")
            node.output[index] = f"{value}/exact"
            graph.graph.node.extend(_rounding_nodes(value))
            graph.graph.output.extend(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in _measures(value)
            )
    return graph, rounded


def _rounding_nodes(value: str) -> Iterator[Any]:
    """Yield the nodes from `value`/exact to `value`, and its measures."""
    from onnx import TensorProto, helper

    exact, half = f"{value}/exact", f"{value}/half"
    yield helper.make_node("Cast", [exact], [half], half, to=TensorProto.FLOAT16)
    yield helper.make_node("Cast", [half], [value], f"{value}/rounded", to=TensorProto.FLOAT)
    for measure, name in zip(MEASURES, _measures(value), strict=True):
        yield helper.make_node(measure, [exact], [name], name, keepdims=0)


def _half_values(proto: "ModelProto") -> set[str]:
    """Return the names of the values that are float16."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"the ONNX file's types cannot be inferred ({first_line(error)})") from error
    values = (*graph.value_info, *graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}


def _widen(tensor: Any) -> None:
    """Convert a float16 tensor of a file to float32, in place."""
    import onnx

    if tensor.data_type == onnx.TensorProto.FLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
