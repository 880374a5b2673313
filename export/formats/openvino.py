"""Graphs of OpenVINO IRs: how they are read, checked and computed with rounding, and their weights."""

import functools
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shvit.errors import InputError, first_line
from shvit.files import is_file

from ..guards import check_elements, check_operators, one_line
from ..quantization.ranges import LEVELS
from .parameters import ROUNDING, LayerParameters, Stored, stored
from .rounding import EXACT_OPERATORS, ROWS, Outputs, Rounded, join

if TYPE_CHECKING:
    from openvino import Core, Model, Node, Output

SECTION = "shvit"  # of the IR's runtime information


@functools.cache
def core() -> "Core":
    """Return the process's one OpenVINO core, which is never released.

    Its CPU plugin gives the thread that loads it a stack for signal handlers, and frees that when it is unloaded. Where
    another thread lets go of the last reference, the first thread is left with freed memory, and the next signal that
    Python handles (Ctrl-C, a loader's worker that ends) is a segmentation fault. Seen with OpenVINO 2026.4.
    """
    import openvino as ov

    return ov.Core()


def load_openvino(path: Path) -> tuple["Model", dict[str, str]]:
    """Return an IR and its metadata; raise InputError where one of its two files is missing or damaged."""
    for file in (path, path.with_suffix(".bin")):
        if not is_file(file):
            raise InputError(f"{file}: no such file; an OpenVINO IR is an .xml and a .bin of the same name")
    if (size := path.stat().st_size) > MAX_XML_BYTES:
        raise InputError(f"{path}: {size / 1e6:.0f} MB is more than the {MAX_XML_BYTES / 1e6:.0f} MB of a graph")
    with one_line(path, "not a readable OpenVINO IR"):
        model = core().read_model(path)
        if not model.has_rt_info([SECTION]):
            return model, {}
        return model, {key: model.get_rt_info([SECTION, key]).astype(str) for key in model.get_rt_info([SECTION]).value}


MAX_XML_BYTES = 64 << 20  # S4's is 0.4 MB; weights are in the other file


def check_model(model: "Model", path: Path) -> None:
    """Raise InputError for loops, and for tensors that are too large, as far as shapes can be told."""
    check_operators(path, operators(model))
    for op in model.get_ops():
        shapes = map(lengths, op.outputs())
        check_elements(path, [(op.get_friendly_name(), shape) for shape in shapes if shape is not None])


def lengths(port: "Output") -> list[int | None] | None:
    """Return a port's lengths, None for an open one; None where not even the rank is declared."""
    shape = port.partial_shape
    return [dim.get_length() if dim.is_static else None for dim in shape] if shape.rank.is_static else None


def operators(model: "Model") -> dict[str, int]:
    """Return the number of each operation, most frequent first, without constants, inputs and outputs."""
    plumbing = {"Constant", "Parameter", "Result"}
    return dict(Counter(t for op in model.get_ops() if (t := op.get_type_name()) not in plumbing).most_common())


# --- weights ----------------------------------------------------------------------------------------------------------


def openvino_parameters(model: "Model") -> dict[str, LayerParameters]:
    """Return the weights of an OpenVINO IR, by its layers' names."""
    layers = {
        op.get_friendly_name().removesuffix("/WithoutBiases"): (op, _unshaped(_input(op, 1)), _bias(op))
        for op in model.get_ordered_ops()
        if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul") and _is_constant(_input(op, 1))
    }
    values = _evaluate([node for _, weight, bias in layers.values() for node in (weight, bias) if node is not None])
    parameters = {}
    for name, (op, weight, bias) in layers.items():
        value = _as_stored(weight, values)
        if op.get_type_name() == "MatMul" and not op.get_attributes()["transpose_b"]:
            value = Stored(value.value.T, value.rounding.T)
        if value.value.dim() == 5:  # (groups, out / groups, …)
            value = Stored(value.value.flatten(0, 1), value.rounding.flatten(0, 1))
        parameters[name] = LayerParameters(value, None if bias is None else _flat(_as_stored(bias, values)))
    return parameters


def _bias(op: "Node") -> Any:
    """Return the constant that is added to an operation's result, if nothing else is done with that."""
    users = [each.get_node() for each in op.output(0).get_target_inputs()]
    if len(users) != 1 or users[0].get_type_name() != "Add" or not _is_constant(_input(users[0], 1)):
        return None
    return _unshaped(_input(users[0], 1))


def _unshaped(node: "Node") -> Any:
    """Return a constant as it was before it was given the shape that the operation takes."""
    return _unshaped(_input(node, 0)) if node.get_type_name() == "Reshape" else node


def _flat(tensor: Stored) -> Stored:
    return Stored(tensor.value.flatten(), tensor.rounding.flatten())


def _input(op: "Node", index: int) -> Any:
    return op.input_value(index).get_node()


def _is_constant(op: "Node") -> bool:
    inputs = op.input_values()
    return op.get_type_name() == "Constant" or (bool(inputs) and all(_is_constant(each.get_node()) for each in inputs))


def _evaluate(nodes: list[Any]) -> dict[str, np.ndarray]:
    """Return the values of constant parts of a graph, by the operation's unique name."""
    import openvino as ov

    if not nodes:
        return {}
    results = [ov.opset13.result(node) for node in nodes]
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core().compile_model(ov.Model(results, [], "constants"), "CPU", options)
    outputs = compiled({})
    return {node.get_name(): np.array(outputs[index]) for index, node in enumerate(nodes)}


def _as_stored(node: "Node", values: Mapping[str, np.ndarray]) -> Stored:
    """Return a constant part of a graph with the rounding of its narrowest type; integers have a scale beside them."""
    value = torch.from_numpy(values[node.get_name()].astype(np.float32))
    types = {each.get_element_type().get_type_name() for each in _constants(node)}
    if node.get_type_name() == "Multiply" and types & {"i8", "u8", "i32"}:
        half = torch.from_numpy(np.array(_input(node, 1).data, dtype=np.float32)) / 2
        return Stored(value, half + value.abs() * ROUNDING[torch.float16])
    halves = {"f16": torch.float16, "bf16": torch.bfloat16}
    return stored(value, next((halves[each] for each in halves if each in types), torch.float32))


def _constants(node: "Node") -> list[Any]:
    if node.get_type_name() == "Constant":
        return [node]
    return [each for source in node.input_values() for each in _constants(source.get_node())]


def openvino_scale_faults(model: "Model") -> list[str]:
    """Return the FakeQuantize operations of an IR whose input and output ranges differ, each as a sentence."""
    faults = []
    for op in model.get_ordered_ops():
        if op.get_type_name() == "FakeQuantize" and all(_is_constant(_input(op, index)) for index in (1, 2, 3, 4)):
            low_in, high_in, low_out, high_out = (np.array(_input(op, index).data).ravel() for index in (1, 2, 3, 4))
            span = np.abs(high_in - low_in).max()
            if max(np.abs(low_in - low_out).max(), np.abs(high_in - high_out).max()) > 1e-3 * span:
                faults.append(f"{op.get_friendly_name()} rounds to another range than it reads with")
    return faults


def openvino_steps(model: "Model") -> dict[str, tuple[float, float]]:
    """Return the scale and zero point that each rounded tensor of an IR is read with, by its name in ONNX."""
    steps = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() == "FakeQuantize" and all(_is_constant(_input(op, index)) for index in (3, 4)):
            low, high = (np.array(_input(op, index).data, dtype=np.float64).ravel() for index in (3, 4))
            if len(low) == len(high) == 1 and high > low:
                scale = float(high[0] - low[0]) / LEVELS
                steps[op.get_friendly_name().removesuffix("_DequantizeLinear")] = (scale, float(-low[0]) / scale)
    return steps


# --- rounding ---------------------------------------------------------------------------------------------------------


PRODUCTS = ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData", "MatMul")


class RoundedOpenvino(Rounded):
    """An OpenVINO IR, which is not changed, rounded after each operation; a layer is one operation with its bias.

    Raises:
        InputError: OpenVINO refuses the graph.
    """

    def __init__(self, model: "Model", dtype: torch.dtype = torch.float16, threads: int | None = None):
        import openvino as ov
        from openvino import properties

        graph = model.clone()
        _round_weights(graph, dtype)
        outputs = [output for op in graph.get_ordered_ops() for output in op.outputs() if _is_rounded(output)]
        rows = graph.inputs[0].partial_shape[0]
        super().__init__([_name(output) for output in outputs], dtype, rows.get_length() if rows.is_static else ROWS)
        self.layers = {_name(output) for output in outputs if _type(output) in ("Add", *PRODUCTS)}
        self.layer_outputs: dict[str, torch.Tensor] | None = None
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

    def run(self, batch: torch.Tensor) -> Outputs:
        """Return all outputs in order for what `Spec.feed` returns."""
        results = (self.compiled(chunk.numpy()) for chunk in batch.split(self.rows))
        numbers = range(len(self.compiled.outputs))
        return join([[torch.from_numpy(result[number].copy()) for number in numbers] for result in results])

    def run_layers(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the output of each convolution and linear layer, by its dotted name, for what `Spec.feed` returns."""
        parts: list[Mapping[str, torch.Tensor]] = []
        for chunk in batch.split(self.rows):
            self.layer_outputs = {}
            self.run(chunk)
            parts.append(self.layer_outputs)
        self.layer_outputs = None
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _round(self, name: str, exact: torch.Tensor) -> torch.Tensor:
        self.record(name, exact.abs().max().item() if exact.numel() else 0.0)
        rounded = exact.to(self.dtype).float()
        if self.layer_outputs is not None and name in self.layers:
            self.layer_outputs[name] = rounded
        return rounded


def _name(output: "Output") -> str:
    name, index = output.get_node().get_friendly_name(), output.get_index()
    return f"{name}.{index}" if index else name


def _type(output: "Output") -> str:
    return output.get_node().get_type_name()


def _is_rounded(output: "Output") -> bool:
    """Return whether an output is a floating-point result, and no product whose bias still follows."""
    import openvino as ov

    if output.get_element_type() != ov.Type.f32 or _type(output) in (*EXACT_OPERATORS, "Result"):
        return False
    readers = list(output.get_target_inputs())
    before_bias = _type(output) in PRODUCTS and len(readers) == 1 and _is_bias(readers[0].get_node())
    return _constant(output.get_node()) is None and not before_bias


def _is_bias(op: "Node") -> bool:
    """Return whether an operation adds a constant."""
    return op.get_type_name() == "Add" and any(_constant(value.get_node()) is not None for value in op.input_values())


def _constant(op: "Node") -> Any:
    """Return a constant, or the one that a conversion widens; None for another operation."""
    if op.get_type_name() == "Convert":
        op = op.input_value(0).get_node()
    return op if op.get_type_name() == "Constant" else None


def _round_weights(model: "Model", dtype: torch.dtype) -> None:
    """Round the weights of products; other constants stay as they are stored, which is how OpenVINO does it."""
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
    """Return a class of operations that OpenVINO does not know, and so neither removes nor fuses."""
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
