"""An ExecuTorch program (F.pte): its methods, the graphs that XNNPACK gets, and their weights, read without a runtime.

A program holds methods, each a list of calls: of kernels, and of delegates, whose graphs are opaque to ExecuTorch.
XNNPACK's values are channels last; its schema and the program's are those that the installed package brings.
"""

import importlib.util
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shvit.errors import InputError
from shvit.files import check_file, open_file
from shvit.terminal import muted

from ..guards import Port, check_elements, check_operators, one_line
from .flatbuffer import Decoder, Schema
from .parameters import LayerParameters, Stored, quantized, stored

if TYPE_CHECKING:
    from executorch.extension.pybindings._C import ExecuTorchModule

MAX_BYTES = 2 << 30
FORWARD, NOTES = "forward", "shvit"  # methods of ours: the model, and what the file says of itself
XNNPACK = "XnnpackBackend"
DTYPES = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool"}
"""PyTorch's numbers of scalar types."""
NOTHING: tuple[str, dict[str, Any]] = ("Null", {})  # a union without an alternative


@cache
def schema(*files: str) -> Schema:
    """Return the schema in files of the installed package, of which nothing is imported."""
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("executorch is not installed", name="executorch")
    roots = [Path(place) for place in spec.submodule_search_locations]
    texts = [next(root / file for root in roots if (root / file).exists()).read_text() for file in files]
    return Schema.parse("\n".join(texts))


def program_schema() -> Schema:
    """Return the schema of programs."""
    return schema("exir/_serialize/scalar_type.fbs", "exir/_serialize/program.fbs")


def graph_schema() -> Schema:
    """Return the schema of XNNPACK's graphs."""
    return schema("backends/xnnpack/serialization/schema.fbs")


# --- graphs -----------------------------------------------------------------------------------------------------------

LAYERS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNFullyConnected")
DATATYPES = {1: "fp32", 2: "fp16", 3: "qint8", 5: "qint32", 6: "qcint8", 7: "qcint32"}
"""XNNPACK's numbers of the types that exports of ours have."""
NUMPY = {"fp32": "<f4", "fp16": "<f2", "qint8": "i1", "qcint8": "i1", "qint32": "<i4", "qcint32": "<i4"}


@dataclass(frozen=True)
class Value:
    """A tensor of a graph."""

    dims: tuple[int, ...]
    datatype: str  # fp32, fp16, or of integers: qint8, qcint8, qint32, qcint32
    external: int | None  # its place among the delegate's arguments, of those that are given from outside or returned
    constant: bytes | None
    scale: np.ndarray | None  # one, or one for each channel
    zero_point: int

    @property
    def is_int8(self) -> bool:
        """True for an activation in 8 bits."""
        return self.datatype == "qint8" and self.constant is None

    def levels(self) -> np.ndarray:
        """Return a constant's numbers as the file has them."""
        assert self.constant is not None
        return np.frombuffer(self.constant, NUMPY[self.datatype], math.prod(self.dims)).reshape(self.dims)

    def stored(self, dtype: torch.dtype | None = None, axis: int = 0) -> Stored:
        """Return a constant, integers multiplied out along the channels on `axis`."""
        if self.scale is None:
            return stored(self.levels().astype(np.float32), dtype)
        return quantized(self.levels(), self.scale.squeeze(), self.zero_point, axis)


@dataclass(frozen=True)
class Node:
    """An operation of a graph."""

    kind: str  # XNNConv2d …
    fields: Mapping[str, Any]
    low: float
    high: float
    """Its result is cut to between these: an activation that became part of it."""

    @property
    def inputs(self) -> list[int]:
        """The values that it reads, without weights."""
        names = ("input_id", *(f"input{number}_id" for number in range(1, 6)))
        found = [self.fields[name] for name in names if name in self.fields]
        count = int(self.kind[-1]) if self.kind.startswith("XNNConcatenate") else len(found)
        return found[:count]


@dataclass(frozen=True)
class Graph:
    """What XNNPACK gets of one delegate."""

    nodes: Sequence[Node]
    values: Mapping[int, Value]

    def layer_weights(self) -> Iterator[tuple[Node, Value, Value | None]]:
        """Yield each convolution and linear layer with its weight and bias."""
        for node in self.nodes:
            if node.kind in LAYERS:
                yield node, self.values[node.fields["filter_id"]], self.values.get(node.fields["bias_id"])


def layer_parameters(node: Node, weight: Value, bias: Value | None, dtype: torch.dtype | None) -> LayerParameters:
    """Return a layer's weights as PyTorch has them.

    Args:
        dtype: what the weights were rounded to before they were written in float32; None for nothing.
    """
    depthwise = node.kind == "XNNDepthwiseConv2d"  # (1, height, width, outputs), and (outputs, height, width, inputs)
    kept = weight.stored(dtype, axis=len(weight.dims) - 1 if depthwise else 0)
    order = {"XNNDepthwiseConv2d": (3, 0, 1, 2), "XNNConv2d": (0, 3, 1, 2)}.get(node.kind)
    if order is not None:
        kept = Stored(*(each.permute(order) if each.dim() == len(order) else each for each in kept))
    return LayerParameters(kept, None if bias is None else bias.stored(dtype))


def program_parameters(program: "Program", dtype: torch.dtype | None = None) -> list[LayerParameters]:
    """Return the weights of each convolution and linear layer in the order of computation.

    Args:
        dtype: as in `layer_parameters`.
    """
    return [layer_parameters(*each, dtype) for graph in program.graphs for each in graph.layer_weights()]


def input_steps(program: "Program") -> list[tuple[float, float] | None]:
    """Return the scale and zero point, counted from 0, of each layer's input in this order; None where it is float."""
    values = [graph.values[node.inputs[0]] for graph in program.graphs for node, *_ in graph.layer_weights()]
    return [(value.scale.item(), value.zero_point + 128.0) if value.is_int8 and value.scale is not None else None
            for value in values]  # fmt: skip


# --- programs ---------------------------------------------------------------------------------------------------------


class Program:
    """A program, decoded.

    Raises:
        ValueError: it is none, or contradicts itself. The decoder's own errors are those of `Decoder`.
    """

    def __init__(self, data: bytes):
        if data[4:8] != b"ET12" or data[8:12] != b"eh00":
            raise ValueError("is not an ExecuTorch program with segments")
        self.data, self.base = data, int.from_bytes(data[24:32], "little")
        self.table = Decoder(program_schema(), data).decode("Program")
        self.methods = {plan["name"]: plan for plan in self.table["execution_plan"] or ()}
        self.named = {each["key"]: each["segment_index"] for each in self.table["named_data"] or ()}

    def method(self, name: str = FORWARD) -> dict[str, Any]:
        """Return a method; raise ValueError where there is none of this name."""
        if name not in self.methods:
            raise ValueError(f"has no method {name}")
        return self.methods[name]

    def note(self) -> str | None:
        """Return the text that the method `NOTES` gives; None where there is none."""
        plan = self.methods.get(NOTES)
        if plan is None or plan["outputs"] is None or len(plan["outputs"]) != 1:
            return None
        kind, content = self._value(plan, int(plan["outputs"][0]))
        return content["string_val"] if kind == "String" else None

    def calls(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Return the instructions of the model in order, each its kind and fields."""
        (chain,) = self.method()["chains"] or [None]
        return [each["instr_args"] for each in chain["instructions"] or ()]

    def ports(self, which: str) -> list[tuple[str, tuple[int, ...]]]:
        """Return the type and shape of each of the model's `inputs` or `outputs`."""
        plan, ports = self.method(), []
        for index in plan[which] if plan[which] is not None else ():
            kind, tensor = self._value(plan, int(index))
            if kind != "Tensor":
                raise ValueError(f"has {which} that are no tensors")
            ports.append((DTYPES.get(tensor["scalar_type"], "another type"), tuple(map(int, tensor["sizes"]))))
        return ports

    def delegates(self) -> list[str]:
        """Return the name of each delegate that the model calls, in order."""
        return [each["id"] for each in self.method()["delegates"] or ()]

    def kernels(self) -> dict[str, int]:
        """Return the number of calls of each kernel: what is computed outside of delegates."""
        names = [each["name"] for each in self.method()["operators"] or ()]
        return dict(Counter(names[call["op_index"]] for kind, call in self.calls() if kind == "KernelCall"))

    @cached_property
    def graphs(self) -> list[Graph]:
        """XNNPACK's graph of each delegate."""
        return [self._graph(each["processed"]) for each in self.method()["delegates"] or ()]

    def operators(self) -> dict[str, int]:
        """Return the number of each operation, most frequent first: XNNPACK's, other kernels, and delegates."""
        counts = Counter(node.kind.removeprefix("XNN") for graph in self.graphs for node in graph.nodes)
        return dict((counts + Counter(self.kernels()) + Counter(self.delegates())).most_common())

    def constant(self, index: int) -> bytes:
        """Return what follows the start of a constant tensor, by the number of its buffer."""
        place = self.table["constant_segment"]
        return self._segment(place["segment_index"])[int(place["offsets"][index]) :]

    def _value(self, plan: Mapping[str, Any], index: int) -> tuple[str, Mapping[str, Any]]:
        values = plan["values"] or []
        if not 0 <= index < len(values):
            raise ValueError("reads a value that it does not hold")
        return values[index]["val"] or NOTHING

    def _segment(self, index: int) -> bytes:
        segments = self.table["segments"] or []
        if not 0 <= index < len(segments):
            raise ValueError("reads a segment that it does not hold")
        start, size = self.base + segments[index]["offset"], segments[index]["size"]
        if start + size > len(self.data):
            raise ValueError("ends within its weights")
        return self.data[start : start + size]

    def _graph(self, processed: Mapping[str, Any]) -> Graph:
        inline = processed["location"] == 0
        blobs = self.table["backend_delegate_data"] or []
        blob = blobs[processed["index"]]["data"].tobytes() if inline else self._segment(processed["index"])
        if blob[4:8] != b"XH00":
            raise ValueError("holds a delegate in a form that is not read here")
        start, size = (int.from_bytes(blob[place : place + 4], "little") for place in (10, 14))
        content = Decoder(graph_schema(), blob[start : start + size]).decode("XNNGraph")
        constants = [self._constant(each) for each in content["constant_data"] or ()]
        values = {}
        for each in content["xvalues"] or ():
            kind, union = each["xvalue_union"] or NOTHING
            tensor = union["tensor_value"] if kind == "XNNQuantizedTensorValue" else union
            params = union.get("quant_params") if kind == "XNNQuantizedTensorValue" else None
            values[tensor["id_out"]] = _value(tensor, params, constants)
        return Graph([_node(each) for each in content["xnodes"] or ()], values)

    def _constant(self, entry: Mapping[str, Any]) -> bytes:
        if not entry["named_key"]:
            return b""
        if entry["named_key"] not in self.named:
            raise ValueError("has weights that are not in the file")
        return self._segment(self.named[entry["named_key"]])[: entry["size"]]


NO_EXTERNAL = 2**32 - 1


def _value(tensor: Mapping[str, Any], params: tuple[str, Mapping[str, Any]] | None, constants: list[bytes]) -> Value:
    number = tensor["constant_buffer_idx"]
    datatype = DATATYPES.get(tensor["datatype"])
    if datatype is None:
        raise ValueError(f"holds numbers of a type that is not read here ({tensor['datatype']})")
    scale, zero_point = None, 0
    if params is not None:
        kind, fields = params
        if kind == "PerTensorQuant":
            scale, zero_point = np.array([fields["scale"]], np.float32), fields["zero_point"]
        elif kind == "PerChannelQuant":
            own = fields["scale"]
            of_buffer = constants[fields["scale_buffer_idx"]]
            scale = own if own is not None and len(own) else np.frombuffer(of_buffer, "<f4", fields["num_scales"])
        else:
            raise ValueError(f"rounds by {kind}, which is not read here")
    dims = tuple(map(int, tensor["dims"])) if tensor["dims"] is not None else ()
    external = None if tensor["external_id"] == NO_EXTERNAL else tensor["external_id"]
    return Value(dims, datatype, external, constants[number] if number else None, scale, zero_point)


def _node(entry: Mapping[str, Any]) -> Node:
    if entry["xnode_union"] is None:
        raise ValueError("holds an operation without a kind")
    kind, fields = entry["xnode_union"]
    ends = entry["output_min_max"] or {"output_min": -math.inf, "output_max": math.inf}
    return Node(kind, fields, ends["output_min"], ends["output_max"])


def read_program(path: Path) -> Program:
    """Return a program, checked as far as that is possible without running it.

    Raises:
        InputError: no such file, or not a program of image models.
    """
    check_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: is larger than {MAX_BYTES / 1e9:.1f} GB; export a smaller model")
    with open_file(path) as opened:
        data = opened.read()
    with one_line(path, "is not a readable ExecuTorch program"):
        program = Program(data)
        kinds = {kind for kind, _ in program.calls()}
        tensors = [(f"{number} of {name}", content["sizes"].tolist())
                   for name, plan in program.methods.items() for number, value in enumerate(plan["values"] or ())
                   for kind, content in [value["val"] or NOTHING]
                   if kind == "Tensor" and content["sizes"] is not None]  # fmt: skip
        planned = [int(size) for plan in program.methods.values() for size in plan["non_const_buffer_sizes"]]
    check_elements(path, [*tensors, *(("that all share", [size // 4]) for size in planned)])
    check_operators(path, {"Loop"} if kinds & {"JumpFalseCall", "MoveCall"} else set())
    return program


def check_delegates(path: Path, program: Program) -> None:
    """Raise InputError where a program needs a delegate that is not run here."""
    if others := sorted(set(program.delegates()) - {XNNPACK}):
        raise InputError(f"{path}: is written for {', '.join(others)[:80]}, which is not run here; verify the file for "
                         "XNNPACK that was exported beside it")  # fmt: skip


def ports(program: Program, which: str, names: Sequence[str]) -> list[Port]:
    """Return the model's `inputs` or `outputs`, which have no names in the file, as ports."""
    declared = program.ports(which)
    numbered = [*names, *(f"{which[:-1]} {number}" for number in range(len(names), len(declared)))]
    return [Port(name, dtype, shape) for name, (dtype, shape) in zip(numbered, declared, strict=False)]


# --- run --------------------------------------------------------------------------------------------------------------


def open_module(path: Path, threads: int | None = None) -> "ExecuTorchModule":
    """Return a program in ExecuTorch's runtime; threads are those of the whole process."""
    with muted():  # it says what it cannot read of the processor
        from executorch.extension.pybindings import _C  # PyTorch, which it needs, is loaded; portable_lib takes seconds

        _C._threadpool_get_thread_count()  # starts the threads, which the first image would do
        if threads is not None:
            _C._unsafe_reset_threadpool(threads)
        return _C._load_for_executorch(str(path))
