"""Computes an ExecuTorch program in PyTorch as its graphs say: each value is seen, and each is rounded to its type.

XNNPACK shows no value between a graph's inputs and outputs, and on a processor without float16 arithmetic it need not
round where the graph does. Here each operation is computed in float32 and its result rounded to the type of its value.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .executorch import DTYPES, LAYERS, NOTHING, Graph, Node, Program, Value, layer_parameters
from .rounding import Outputs, Rounded, join

Tensor = torch.Tensor


class UnknownOperation(ValueError):
    """An operation that is not evaluated here."""


# --- XNNPACK's operations ---------------------------------------------------------------------------------------------


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _padded(fields: Mapping[str, Any], x: Tensor, value: float = 0.0) -> Tensor:
    """Return (B, H, W, C) as (B, C, H, W) with the operation's padding."""
    sides = [fields[f"padding_{side}"] for side in ("left", "right", "top", "bottom")]
    return F.pad(_channels_first(x), sides, value=value)


def _pool(fields: Mapping[str, Any], x: Tensor, largest: bool) -> Tensor:
    size, stride = ((fields[f"{name}_height"], fields[f"{name}_width"]) for name in ("pooling", "stride"))
    if largest:
        dilation = (fields["dilation_height"], fields["dilation_width"])
        return _channels_last(F.max_pool2d(_padded(fields, x, -math.inf), size, stride, dilation=dilation))
    return _channels_last(F.avg_pool2d(_padded(fields, x), size, stride))


def _slice(fields: Mapping[str, Any], x: Tensor) -> Tensor:
    for dim, (start, length) in enumerate(zip(fields["offsets"], fields["sizes"], strict=True)):
        x = x.narrow(dim, int(start), int(length))
    return x


def _pad(fields: Mapping[str, Any], x: Tensor) -> Tensor:
    pairs = zip(fields["pre_paddings"][::-1], fields["post_paddings"][::-1], strict=True)
    return F.pad(x, [int(each) for pair in pairs for each in pair], value=fields["padding_value"])


def _cat(fields: Mapping[str, Any], *parts: Tensor) -> Tensor:
    return torch.cat(parts, fields["axis"])


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "XNNAdd": lambda _, a, b: a + b,
    "XNNSubtract": lambda _, a, b: a - b,
    "XNNMultiply": lambda _, a, b: a * b,
    "XNNDiv": lambda _, a, b: a / b,
    "XNNMinimum": lambda _, a, b: torch.minimum(a, b),
    "XNNMaximum": lambda _, a, b: torch.maximum(a, b),
    "XNNBatchMatrixMultiply": lambda _, a, b: a @ b,
    "XNNPReLU": lambda _, x, slope: torch.where(x < 0, x * slope, x),
    "XNNSoftmax": lambda _, x: x.softmax(-1),
    "XNNSigmoid": lambda _, x: x.sigmoid(),
    "XNNClamp": lambda _, x: x,
    "XNNConvert": lambda _, x: x,
    "XNNCopy": lambda _, x: x,
    "XNNFloor": lambda _, x: x.floor(),
    "XNNCeiling": lambda _, x: x.ceil(),
    "XNNSquareRoot": lambda _, x: x.sqrt(),
    "XNNReciprocalSquareRoot": lambda _, x: x.rsqrt(),
    "XNNSquare": lambda _, x: x * x,
    "XNNHardswish": lambda _, x: F.hardswish(x),
    "XNNLeakyReLU": lambda fields, x: F.leaky_relu(x, fields["negative_slope"]),
    "XNNELU": lambda fields, x: F.elu(x, fields["alpha"]),
    "XNNNegate": lambda _, x: -x,
    "XNNAbs": lambda _, x: x.abs(),
    "XNNLog": lambda _, x: x.log(),
    "XNNExp": lambda _, x: x.exp(),
    "XNNSin": lambda _, x: x.sin(),
    "XNNCos": lambda _, x: x.cos(),
    "XNNTanh": lambda _, x: x.tanh(),
    "XNNGelu": lambda _, x: F.gelu(x),
    "XNNGlobalAvgPooling2d": lambda _, x: x.mean((1, 2), keepdim=True),
    "XNNAvgPooling2d": lambda fields, x: _pool(fields, x, largest=False),
    "XNNMaxPooling2d": lambda fields, x: _pool(fields, x, largest=True),
    "XNNStaticReshape": lambda _, x: x,  # every result takes the shape of its value
    "XNNStaticTranspose": lambda fields, x: x.permute(fields["perm"].tolist()),
    "XNNStaticSlice": _slice,
    "XNNStaticConstantPad": _pad,
    **{f"XNNConcatenate{count}": _cat for count in range(2, 6)},
}
EXACT = (
    *("XNNClamp", "XNNCopy", "XNNStaticReshape", "XNNStaticTranspose", "XNNStaticSlice", "XNNStaticConstantPad"),
    *("XNNMaxPooling2d", "XNNMinimum", "XNNMaximum", "XNNConvert", "XNNAbs", "XNNNegate"),
    *(f"XNNConcatenate{count}" for count in range(2, 6)),
)
"""Operations whose results are among their inputs, or 0."""


def _layer(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a convolution or linear layer gives, before its activation."""
    if node.kind == "XNNFullyConnected":
        return F.linear(x, weight, bias)
    fields = node.fields
    stride = (fields["subsampling_height"], fields["subsampling_width"])
    dilation = (fields["dilation_height"], fields["dilation_width"])
    return _channels_last(F.conv2d(_padded(fields, x), weight, bias, stride, 0, dilation, fields["groups"]))


def _round(value: Value, x: Tensor) -> Tensor:
    """Return a result as its value holds it."""
    if value.is_int8 and value.scale is not None:
        return torch.fake_quantize_per_tensor_affine(x, value.scale.item(), value.zero_point, -128, 127)
    return x.half().float() if value.datatype == "fp16" else x


# --- programs ---------------------------------------------------------------------------------------------------------


class Evaluator(Rounded):
    """A program of one image, computed in PyTorch.

    Args:
        program: checked by `read_program`.
        names: the convolutions and linear layers in the order of computation; empty where one is none of the model's.

    Raises:
        UnknownOperation: when it is run, where there is an operation that is not evaluated here.
    """

    def __init__(self, program: Program, names: Sequence[str]):
        self.program, self.names = program, names
        self.weights = {
            id(node): layer_parameters(node, weight, bias, None)
            for graph in program.graphs for node, weight, bias in graph.layer_weights()
        }  # fmt: skip
        super().__init__([], torch.float16, 1)
        self.layers: dict[str, Tensor] = {}

    def run(self, batch: Tensor) -> Outputs:
        """Return all outputs in order for what `Spec.feed` returns."""
        return join([self._run(image) for image in batch.split(1)])

    def run_layers(self, batch: Tensor) -> dict[str, Tensor]:
        """Return the output of each convolution and linear layer, by its dotted name, for what `Spec.feed` returns."""
        parts = []
        for image in batch.split(1):
            self._run(image)
            parts.append(self.layers)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.inference_mode()
    def _run(self, image: Tensor) -> list[Tensor]:
        plan = self.program.method()
        values: dict[int, Any] = {int(plan["inputs"][0]): image.float()}
        self.layers, left = {}, iter(self.names)
        for kind, call in self.program.calls():
            arguments = [int(each) for each in call["args"]] if "args" in call else []
            if kind == "DelegateCall":
                self._run_graph(self.program.graphs[call["delegate_index"]], arguments, values, left)
            elif kind == "KernelCall":
                self._run_kernel(plan, plan["operators"][call["op_index"]], arguments, values)
        return [values[int(index)] for index in plan["outputs"]]

    def _run_graph(self, graph: Graph, arguments: Sequence[int], values: dict[int, Any], left: Any) -> None:
        plan, inner = self.program.method(), dict[int, Tensor]()
        outputs = {node.fields["output_id"] for node in graph.nodes}
        for number, value in graph.values.items():
            if value.constant is not None and value.datatype in ("fp32", "fp16", "qint8"):
                inner[number] = value.stored().value
            elif value.external is not None and number not in outputs:
                inner[number] = self._argument(plan, arguments[value.external], values).reshape(value.dims)
        for count, node in enumerate(graph.nodes):
            value = graph.values[node.fields["output_id"]]
            inner[node.fields["output_id"]] = self._compute(node, f"{node.kind[3:]} {count}", value, inner, left)
        for number, value in graph.values.items():
            if value.external is not None and number in outputs:
                values[arguments[value.external]] = inner[number]

    def _compute(self, node: Node, name: str, value: Value, inner: Mapping[int, Tensor], left: Any) -> Tensor:
        inputs = [inner[number] for number in node.inputs]
        if node.kind in LAYERS:
            kept = self.weights[id(node)]
            x = _layer(node, inputs[0], kept.weight.value, None if kept.bias is None else kept.bias.value)
            if layer := next(left, ""):
                self.layers[layer] = (x if node.kind == "XNNFullyConnected" else _channels_first(x)).contiguous()
                name = layer
        elif node.kind in OPERATIONS:
            x = OPERATIONS[node.kind](node.fields, *inputs)
        else:
            raise UnknownOperation(f"the operation {node.kind} is not evaluated here")
        if value.datatype == "fp16" and node.kind not in EXACT:
            self.record(name, x.abs().max().item())
        return _round(value, x.clamp(node.low, node.high)).reshape(value.dims)

    def record(self, name: str, value: float) -> None:
        """Take note of the largest absolute value of an operation's result."""
        self.largest.setdefault(name, 0.0)
        super().record(name, value)

    # --- kernels of PyTorch's operators outside of delegates ---

    def _run_kernel(
        self, plan: Mapping[str, Any], operator: Mapping[str, str], arguments: Sequence[int], values: dict[int, Any]
    ) -> None:
        name = operator["name"]
        if name in CONVERSIONS:
            places, results = [arguments[-1]], (self._argument(plan, arguments[0], values),)
        else:
            function, given, outs = _kernel(name, operator["overload"])
            read = {argument.name: self._argument(plan, index, values)
                    for argument, index in zip(given, arguments, strict=False)}  # fmt: skip
            keywords = {argument.name: read.pop(argument.name) for argument in given if argument.kwarg_only}
            results = function(*read.values(), **{key: each for key, each in keywords.items() if key != "dtype"})
            results = (results,) if isinstance(results, Tensor) else results
            indices = arguments[len(given) : len(given) + outs]
            places = [place for index in indices for place in self._places(plan, index)]
        for place, result in zip(places, results, strict=True):
            values[place] = self._typed(plan, place, name, result)

    def _typed(self, plan: Mapping[str, Any], place: int, name: str, result: Tensor) -> Tensor:
        """Return a kernel's result as its tensor holds it."""
        kind, tensor = plan["values"][place]["val"]
        if kind != "Tensor" or DTYPES.get(tensor["scalar_type"]) != "float16":
            return result
        if name not in CONVERSIONS and not name.endswith("_copy"):
            self.record(f"{name.removeprefix('aten::')} {place}", result.abs().max().item())
        return result.half().float()

    def _places(self, plan: Mapping[str, Any], index: int) -> list[int]:
        """Return the numbers of the tensors that an argument names: one, or those of a list."""
        kind, content = plan["values"][index]["val"]
        return content["items"].tolist() if kind == "TensorList" else [index]

    def _argument(self, plan: Mapping[str, Any], index: int, values: Mapping[int, Any]) -> Any:
        if index in values:
            return values[index]
        kind, content = plan["values"][index]["val"] or NOTHING
        if kind == "Null":
            return None
        if kind in ("Int", "Bool", "Double", "String"):
            value = content[f"{kind.lower()}_val"]
            return bool(value) if kind == "Bool" else value
        if kind == "IntList":  # of places of numbers
            return [self._argument(plan, int(each), values) for each in content["items"]]
        if kind in ("BoolList", "DoubleList"):
            return content["items"].tolist()
        if kind == "TensorList":
            return [self._argument(plan, int(each), values) for each in content["items"]]
        if kind == "Tensor" and content["data_buffer_idx"]:
            return self._constant(content)
        raise UnknownOperation(f"an argument of the kind {kind} is not read here")

    def _constant(self, tensor: Mapping[str, Any]) -> Tensor:
        dtype = DTYPES.get(tensor["scalar_type"], "")
        if dtype not in ("float16", "float32", "float64", "int32", "int64", "bool"):
            raise UnknownOperation("a constant of another type is not read here")
        data = np.frombuffer(self.program.constant(tensor["data_buffer_idx"]), dtype, math.prod(tensor["sizes"]))
        value = torch.from_numpy(data.copy()).reshape(tensor["sizes"].tolist())
        return value.float() if value.is_floating_point() else value


CONVERSIONS = ("aten::_to_copy", "aten::clone", "dim_order_ops::_to_dim_order_copy", "dim_order_ops::_clone_dim_order")
"""Kernels that change a tensor's type or layout."""


def _kernel(name: str, overload: str) -> tuple[Any, Sequence[Any], int]:
    """Return the operator that a kernel computes, its arguments and how many results follow them.

    Only operators without side effects are run: those of PyTorch's core set, and copies of views.
    """
    space, _, operator = name.partition("::")
    packet = getattr(torch.ops.aten, operator, None) if space == "aten" and operator.isidentifier() else None
    overloads = {each: getattr(packet, each) for each in packet.overloads()} if packet is not None else {}
    is_core = any(torch.Tag.core in each.tags for each in overloads.values())
    if overload in overloads and (is_core or operator.endswith("_copy")):
        arguments = overloads[overload]._schema.arguments
        given = [each for each in arguments if not each.is_out]
        taken = _signature(given)  # types too: `other` is a tensor in eq.Tensor and a number in eq.Scalar
        for each in overloads.values():
            if _signature(each._schema.arguments) == taken:
                return each, given, len(arguments) - len(given)
    raise UnknownOperation(f"the kernel {name[:60]} is not evaluated here")


def _signature(arguments: Sequence[Any]) -> list[tuple[str, str]]:
    """Return names and types of arguments, but for those that a result which is given decides."""
    decided = ("dtype", "layout", "device", "pin_memory")
    return [(each.name, str(each.type)) for each in arguments if each.name not in decided]
