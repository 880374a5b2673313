"""Graphs of LiteRT models (.tflite): read and checked, their weights, scales and notes, and what a delegate leaves."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shvit.errors import InputError
from shvit.files import check_file, open_file
from shvit.terminal import muted

from ..guards import check_elements, check_operators, one_line, run_trial
from .parameters import LayerParameters, Stored, quantized, stored

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_litert.schema_py_generated import ModelT, OperatorT, SubGraphT, TensorT

MAX_BYTES = (1 << 31) - 1  # a flatbuffer's places are 32-bit
SIGNATURE = "serving_default"
LAYER_AXES = {"CONV_2D": (0, 3, 1, 2), "DEPTHWISE_CONV_2D": (3, 0, 1, 2), "FULLY_CONNECTED": (0, 1)}
"""Operators that are a whole layer, and the order of their weight's axes that makes PyTorch's of it."""
NO_ACTIVATION, RELU = 0, 1  # of an operator's fused activation


# --- files ------------------------------------------------------------------------------------------------------------


def read_model(path: Path) -> "ModelT":
    """Return a LiteRT model, which ran once in a process of its own.

    Raises:
        InputError: no such file, not a LiteRT model, or one that does not run.
    """
    check_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: is larger than any .tflite file; export the model again")
    with open_file(path) as file:
        data = file.read()
    if data[4:8] != b"TFL3":
        raise InputError(f"{path}: is not a LiteRT model; export the model again")
    run_trial(path, "litert", [str(path.resolve())], [path])
    with one_line(path, "is not a readable LiteRT model"):
        model = unpack(data)
        if len(model.subgraphs) != 1 or len(model.signatureDefs or ()) != 1:
            raise ValueError("it has no single graph with a single signature")
        check_operators(path, operators(model))
        check_elements(
            path, [(name_of(each), each.shape) for each in graph_of(model).tensors if each.shape is not None]
        )
    return model


def unpack(data: bytes) -> "ModelT":
    """Return a file's content as an object."""
    from ai_edge_litert.tools import flatbuffer_utils

    return flatbuffer_utils.read_model_from_bytearray(data)


def pack(model: "ModelT") -> bytes:
    """Return a model as the content of a file."""
    from ai_edge_litert.tools import flatbuffer_utils

    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def create_interpreter(content: bytes, threads: int | None = None) -> "Interpreter":
    """Return a model ready to run on the CPU."""
    from ai_edge_litert.interpreter import Interpreter

    with muted():
        interpreter = Interpreter(model_content=content, num_threads=threads)
        interpreter.allocate_tensors()
    return interpreter


def notes_of(model: "ModelT") -> dict[str, str]:
    """Return the texts in a model's metadata."""
    notes = {}
    for each in model.metadata or ():
        data = model.buffers[each.buffer].data
        if each.name.startswith(b"shvit.") and data is not None:
            notes[each.name.decode()] = bytes(data).decode()
    return notes


def write_notes(model: "ModelT", notes: Mapping[str, str]) -> None:
    """Put texts into a model's metadata."""
    from ai_edge_litert.schema_py_generated import BufferT, MetadataT

    for key, text in notes.items():
        buffer, entry = BufferT(), MetadataT()
        buffer.data = np.frombuffer(text.encode(), np.uint8)
        entry.name, entry.buffer = key.encode(), len(model.buffers)
        model.buffers.append(buffer)
        model.metadata = [*(model.metadata or ()), entry]


# --- the graph --------------------------------------------------------------------------------------------------------


def graph_of(model: "ModelT") -> "SubGraphT":
    """Return a model's one graph."""
    return model.subgraphs[0]


def name_of(tensor: "TensorT") -> str:
    """Return a tensor's name."""
    return (tensor.name or b"").decode(errors="replace")


def operator_name(model: "ModelT", operator: "OperatorT") -> str:
    """Return what LiteRT calls an operator, as in CONV_2D."""
    from ai_edge_litert.tools import flatbuffer_utils

    return flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex) or "CUSTOM"


def operators(model: "ModelT") -> dict[str, int]:
    """Return the number of each operator, most frequent first."""
    return dict(Counter(operator_name(model, each) for each in graph_of(model).operators).most_common())


def constant(model: "ModelT", index: int) -> np.ndarray[Any, Any] | None:
    """Return the values of a tensor of the file, as they are stored; None where it is computed, or absent (-1)."""
    if index < 0:
        return None
    tensor = graph_of(model).tensors[index]
    data, dtype = model.buffers[tensor.buffer].data, DTYPES().get(tensor.type)
    if data is None or dtype is None:
        return None
    return np.frombuffer(bytes(data), dtype).reshape(tuple(tensor.shape if tensor.shape is not None else ()))


def DTYPES() -> dict[int, np.dtype[Any]]:  # noqa: N802
    """Return NumPy's types by LiteRT's numbers for them."""
    from ai_edge_litert.schema_py_generated import TensorType

    names = ("FLOAT32", "FLOAT16", "INT8", "UINT8", "INT32", "INT64")
    return {getattr(TensorType, name): np.dtype(name.lower()).newbyteorder("<") for name in names}


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a graph, named like its output."""

    name: str
    kind: str  # a key of `LAYER_AXES`
    operator: "OperatorT"
    weight: int  # the tensor that the file holds: behind its DEQUANTIZE where there is one

    @property
    def rectified(self) -> bool:
        """True if the operator ends with an activation."""
        return bool(self.operator.builtinOptions.fusedActivationFunction != NO_ACTIVATION)


def layers_of(model: "ModelT") -> Iterator[Layer]:
    """Yield the convolutions and products with a weight of the file, in the order of computation."""
    graph = graph_of(model)
    widened = {
        each.outputs[0]: each.inputs[0] for each in graph.operators if operator_name(model, each) == "DEQUANTIZE"
    }
    for operator in graph.operators:
        kind = operator_name(model, operator)
        if kind in LAYER_AXES:
            weight = widened.get(operator.inputs[1], operator.inputs[1])
            if constant(model, weight) is not None:
                yield Layer(name_of(graph.tensors[operator.outputs[0]]), kind, operator, weight)


def weight_of(model: "ModelT", layer: Layer) -> np.ndarray[Any, Any]:
    """Return a layer's weight as stored, with PyTorch's order of axes: (outputs, inputs of a group, height, width)."""
    value = constant(model, layer.weight)
    assert value is not None
    return value.transpose(LAYER_AXES[layer.kind])


def scales_of(tensor: "TensorT") -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None:
    """Return the scales and zero points of a tensor in 8 bits; None where it has none."""
    about = tensor.quantization
    if about is None or about.scale is None or len(about.scale) == 0:
        return None
    zeros = about.zeroPoint if about.zeroPoint is not None else [0] * len(about.scale)
    return np.array(about.scale, np.float32), np.array(zeros, np.int64)


# --- weights and scales -----------------------------------------------------------------------------------------------


def layer_parameters(model: "ModelT") -> dict[str, LayerParameters]:
    """Return the weights of each convolution and linear layer, by its name."""
    return {layer.name: LayerParameters(_weight(model, layer), _bias(model, layer)) for layer in layers_of(model)}


def _weight(model: "ModelT", layer: Layer) -> Stored:
    value, scales = weight_of(model, layer), scales_of(graph_of(model).tensors[layer.weight])
    if scales is None or value.dtype.kind == "f":
        return stored(np.ascontiguousarray(value))
    return quantized(value, scales[0])


def _bias(model: "ModelT", layer: Layer) -> Stored | None:
    inputs = layer.operator.inputs
    value = constant(model, inputs[2]) if len(inputs) > 2 else None
    if value is None:
        return None
    scales = scales_of(graph_of(model).tensors[inputs[2]])
    return stored(value) if scales is None or value.dtype.kind == "f" else quantized(value, scales[0])


def steps(model: "ModelT") -> dict[str, tuple[float, float]]:
    """Return the scale and zero point, from 0 to 255, of the inputs and outputs of layers in int8."""
    tensors, found = graph_of(model).tensors, {}
    for layer in layers_of(model):
        for end, index in (("input", layer.operator.inputs[0]), ("output", layer.operator.outputs[0])):
            scales = scales_of(tensors[index])
            if scales is not None:
                found[f"{layer.name}.{end}"] = (float(scales[0][0]), float(scales[1][0]) + 128)
    return found


def bias_faults(model: "ModelT") -> list[str]:
    """Return the layers in int8 whose bias is not counted in the products of its weight's and input's scales."""
    tensors, faults = graph_of(model).tensors, []
    for layer in layers_of(model):
        inputs = layer.operator.inputs
        indices = (inputs[0], layer.weight, inputs[2] if len(inputs) > 2 else -1)
        scales = [scales_of(tensors[index]) if index >= 0 else None for index in indices]
        if all(each is not None for each in scales):
            values, weights, bias = (each[0] for each in scales if each is not None)
            if not np.allclose(bias, values * weights, rtol=1e-4):
                faults.append(f"the bias of {layer.name} is counted in other units than its products")
    return faults


# --- delegation -------------------------------------------------------------------------------------------------------


def delegation(path: Path) -> tuple[int, dict[str, int]]:
    """Return in how many parts XNNPACK computes a model, and the operators that it leaves to LiteRT's own kernels.

    LiteRT lists the operators of the file and, behind them, those that replace them. What is left is what still has
    to be computed for a result that no delegate gives.
    """
    interpreter = create_interpreter(path.read_bytes(), 1)
    details = interpreter._get_ops_details()
    delegates = [each for each in details if each["op_name"] == "DELEGATE"]
    given = {index for each in delegates for index in each["outputs"]}
    needed = {index for each in delegates for index in each["inputs"]}
    needed |= {each["index"] for each in interpreter.get_output_details()}
    outside: Counter[str] = Counter()
    for each in reversed([each for each in details if each["op_name"] != "DELEGATE"]):
        results = set(each["outputs"].tolist())
        if results & needed and not results & given:
            outside[each["op_name"]] += 1
            needed |= {index for index in each["inputs"].tolist() if index >= 0}
    return len(delegates), dict(outside.most_common())


def shape_of(tensor: "TensorT") -> Sequence[int | None]:
    """Return a tensor's declared shape, with None for open lengths."""
    signature = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
    return [None if each < 0 else int(each) for each in (signature if signature is not None else ())]
