"""Runs a half-precision file as hardware does that computes in its precision: every operation's result is rounded.

A CPU computes float16, and bfloat16 where it has no instructions for it, in float32, and so hides both rounding and
overflow. Here each operation is computed in float32, as matrix units accumulate, and its result rounded to float16 or
bfloat16 (infinite from 65520 on) before the next one reads it; `mil` does the same for Core ML. The runtimes do the
arithmetic, with conversions between the operations that they do not remove; what they give is the same on every machine
but for the order in which they add.
"""

import functools
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from shvit.errors import InputError, first_line

from ..metadata import INPUT
from .onnx import LAYERS

ROWS = 16  # of a batch at a time, which bounds memory
MOVES = (
    *("Broadcast", "Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Relu"),
    *("Reshape", "Select", "Slice", "Split", "Squeeze", "StridedSlice", "Tile", "Transpose", "Unsqueeze"),
    *("VariadicSplit", "Where"),
)
"""Operators, of ONNX and OpenVINO, that give what they are given, or 0: nothing is left to round."""


class _Rounded:
    """What both kinds of files share.

    Args:
        names: of the operations whose results are rounded, in the order in which they are computed.
    """

    def __init__(self, names: Sequence[str], dtype: torch.dtype, rows: int):
        self.dtype = dtype
        self.rows = rows
        self.largest: dict[str, float] = dict.fromkeys(names, 0.0)
        """Operation → largest absolute value that it gave in all runs so far, before rounding; infinite where a result
        was infinite or NaN. In the order of computation; convolutions and linear layers by their dotted names."""

    @property
    def limit(self) -> float:
        """The largest number of the format: 65504 for float16."""
        return torch.finfo(self.dtype).max

    @property
    def overflow(self) -> str | None:
        """The first operation whose result did not fit the format, in the runs so far."""
        fits = ((name, torch.tensor(value).to(self.dtype).isfinite().item()) for name, value in self.largest.items())
        return next((name for name, each in fits if not each), None)

    def nearest(self, count: int) -> dict[str, float]:
        """The operations with the largest values, of those before the first that overflows; the largest first."""
        names = list(self.largest)
        before = names[: names.index(self.overflow)] if self.overflow in self.largest else names
        order = sorted(before, key=lambda name: self.largest[name], reverse=True)
        return {name: self.largest[name] for name in order[:count]}

    def _see(self, name: str, value: float) -> None:
        self.largest[name] = max(self.largest[name], value if math.isfinite(value) else math.inf)


def _joined(parts: Sequence[Sequence[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Outputs of several batches as those of one."""
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


# --- ONNX -------------------------------------------------------------------------------------------------------------


class RoundedOnnx(_Rounded):
    """A float16 ONNX file, rounded to float16 after each node that gives float16.

    Args:
        proto: the file's; it is left alone.
        threads: of one operator; ONNX Runtime's choice (all cores) where None.

    Raises:
        InputError: ONNX Runtime refuses the graph.
    """

    def __init__(self, proto: Any, threads: int | None = None):
        self.graph, rounded = _rounding_graph(proto)
        self.threads = threads
        self.layers = {node.output[0]: node.name for node in proto.graph.node if node.op_type in LAYERS}
        rows = proto.graph.input[0].type.tensor_type.shape.dim[0]
        super().__init__(list(rounded.values()), torch.float16, rows.dim_value or ROWS)
        self.outputs = [output.name for output in proto.graph.output]
        self.measured = [(name, _measures(value)) for value, name in rounded.items()]
        self.session = self._session(self.graph)

    def run(self, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `spec.feed` makes → all outputs in order."""
        return self._run(self.session, self.outputs, batch)

    def run_layers(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `spec.feed` makes → what each convolution and linear layer gives, by its dotted name."""
        import onnx

        graph = onnx.ModelProto()
        graph.CopyFrom(self.graph)
        graph.graph.output.extend(onnx.ValueInfoProto(name=value) for value in self.layers)
        outputs = self._run(self._session(graph), list(self.layers), batch)
        return dict(zip(self.layers.values(), outputs, strict=True))

    def _run(self, session: Any, outputs: list[str], batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fetched = [*outputs, *(value for _, measures in self.measured for value in measures)]
        parts = []
        for chunk in batch.split(self.rows):
            results = session.run(fetched, {INPUT: chunk.numpy()})
            scalars = iter(map(float, results[len(outputs) :]))
            for (name, _), low, high, total in zip(self.measured, scalars, scalars, scalars, strict=True):
                self._see(name, max(-low, high) if math.isfinite(total) else math.inf)
            parts.append([torch.from_numpy(result).float() for result in results[: len(outputs)]])
        return _joined(parts)

    def _session(self, proto: Any) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exception types are not public
            raise InputError(f"the ONNX file cannot be computed with rounding ({first_line(error)})") from error


MEASURES = ("ReduceMin", "ReduceMax", "ReduceSum")
"""What is taken of each result before rounding; NaN, which may escape the first two, does not escape the sum."""


def _measures(value: str) -> list[str]:
    return [f"{value}/{measure}" for measure in MEASURES]


def _rounding_graph(proto: Any) -> tuple[Any, dict[str, str]]:
    """The graph in float32 throughout, rounding where it said float16, and the rounded values' nodes by value."""
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
            if value not in half or original.op_type in MOVES:
                continue
            rounded[value] = (original.name or original.output[0]) + (f".{index}" if index else "")
            node.output[index] = f"{value}/exact"
            graph.graph.node.extend(_rounding_nodes(value))
            graph.graph.output.extend(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in _measures(value)
            )
    return graph, rounded


def _rounding_nodes(value: str) -> Iterator[Any]:
    """From `value`/exact to `value`, and its measures."""
    from onnx import TensorProto, helper

    exact, half = f"{value}/exact", f"{value}/half"
    yield helper.make_node("Cast", [exact], [half], half, to=TensorProto.FLOAT16)
    yield helper.make_node("Cast", [half], [value], f"{value}/rounded", to=TensorProto.FLOAT)
    for measure, name in zip(MEASURES, _measures(value), strict=True):
        yield helper.make_node(measure, [exact], [name], name, keepdims=0)


def _half_values(proto: Any) -> set[str]:
    """Names of the values that are float16."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise InputError(f"the ONNX file's types cannot be told ({first_line(error)})") from error
    values = (*graph.value_info, *graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}


def _widen(tensor: Any) -> None:
    """Makes a float16 tensor of a file float32, in place."""
    import numpy as np
    import onnx

    if tensor.data_type == onnx.TensorProto.FLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


# --- OpenVINO ---------------------------------------------------------------------------------------------------------

PRODUCTS = ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData", "MatMul")


class RoundedOpenvino(_Rounded):
    """An OpenVINO IR, rounded after each operation; a convolution or linear layer is one with its bias.

    Args:
        model: what `read_openvino` gives; it is left alone.
        dtype: float16 or bfloat16.
        threads: OpenVINO's choice (all cores) where None.

    Raises:
        InputError: OpenVINO refuses the graph.
    """

    def __init__(self, model: Any, dtype: torch.dtype = torch.float16, threads: int | None = None):
        import openvino as ov
        from openvino import properties

        from .openvino import core

        graph = model.clone()
        _round_weights(graph, dtype)
        outputs = [output for op in graph.get_ordered_ops() for output in op.outputs() if _is_rounded(output)]
        rows = graph.inputs[0].partial_shape[0]
        super().__init__([_name(output) for output in outputs], dtype, rows.get_length() if rows.is_static else ROWS)
        self.layers = {_name(output) for output in outputs if _type(output) in ("Add", *PRODUCTS)}
        self.kept: dict[str, torch.Tensor] | None = None
        function = functools.partial(RoundedOpenvino._round, weakref.proxy(self))  # the graph is this object's own
        for output in outputs:
            readers = output.get_target_inputs()
            rounding = _round_op()([output], function, _name(output))
            for reader in readers:
                reader.replace_source_output(rounding.output(0))
        options: dict[Any, Any] = {properties.hint.inference_precision(): ov.Type.f32}
        if threads is not None:
            options[properties.inference_num_threads()] = threads
        try:
            self.compiled = core().compile_model(graph, "CPU", options)
        except RuntimeError as error:
            raise InputError(f"the OpenVINO IR cannot be computed with rounding ({first_line(error)})") from error

    def run(self, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `spec.feed` makes → all outputs in order."""
        results = (self.compiled(chunk.numpy()) for chunk in batch.split(self.rows))
        numbers = range(len(self.compiled.outputs))
        return _joined([[torch.from_numpy(result[number].copy()) for number in numbers] for result in results])

    def run_layers(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `spec.feed` makes → what each convolution and linear layer gives, by its dotted name."""
        parts: list[Mapping[str, torch.Tensor]] = []
        for chunk in batch.split(self.rows):
            self.kept = {}
            self.run(chunk)
            parts.append(self.kept)
        self.kept = None
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _round(self, name: str, exact: torch.Tensor) -> torch.Tensor:
        self._see(name, exact.abs().max().item() if exact.numel() else 0.0)
        rounded = exact.to(self.dtype).float()
        if self.kept is not None and name in self.layers:
            self.kept[name] = rounded
        return rounded


def _name(output: Any) -> str:
    name, index = output.get_node().get_friendly_name(), output.get_index()
    return f"{name}.{index}" if index else name


def _type(output: Any) -> str:
    return output.get_node().get_type_name()


def _is_rounded(output: Any) -> bool:
    """Is computed in floating point, from others than constants, and not to be followed by its own bias."""
    import openvino as ov

    if output.get_element_type() != ov.Type.f32 or _type(output) in (*MOVES, "Result"):
        return False
    readers = list(output.get_target_inputs())
    before_bias = _type(output) in PRODUCTS and len(readers) == 1 and _is_bias(readers[0].get_node())
    return _constant(output.get_node()) is None and not before_bias


def _is_bias(op: Any) -> bool:
    """Adds a constant."""
    return op.get_type_name() == "Add" and any(_constant(value.get_node()) is not None for value in op.input_values())


def _constant(op: Any) -> Any:
    """A constant, or that which a conversion takes from its fewer bits; None of another operation."""
    if op.get_type_name() == "Convert":
        op = op.input_value(0).get_node()
    return op if op.get_type_name() == "Constant" else None


def _round_weights(model: Any, dtype: torch.dtype) -> None:
    """Rounds the weights of products; other constants stay as they are stored, which is how OpenVINO does it."""
    import numpy as np
    import openvino as ov

    for op in model.get_ordered_ops():
        for index in (0, 1) if op.get_type_name() in PRODUCTS else ():
            constant = _constant(op.input_value(index).get_node())
            if constant is not None:
                weights = torch.from_numpy(constant.data.astype(np.float32))
                rounded = ov.op.Constant(weights.to(dtype).float().numpy())
                op.input(index).replace_source_output(rounded.output(0))


@functools.cache
def _round_op() -> Any:
    """An operation that OpenVINO does not know, and so neither removes nor joins with its neighbors."""
    from openvino import Op

    class Round(Op):
        def __init__(self, inputs: Any = None, function: Any = None, name: str = ""):
            super().__init__(self, inputs)
            self.function, self.label = function, name

        def validate_and_infer_types(self) -> None:
            self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

        def clone_with_new_inputs(self, inputs: Any) -> "Round":
            return Round(inputs, self.function, self.label)

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            rounded = self.function(self.label, torch.from_numpy(inputs[0].data))
            outputs[0].data[...] = rounded.numpy()
            return True

    return Round
