"""Graph passes for coremltools: names for layers, 8-bit activations and 8-bit weights.

Importing this module registers them, so it is imported only to convert.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Block, Builder, Function, Operation, Program, Var, types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass, PassOption
from coremltools.converters.mil.mil.passes.helper import block_context_manager
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass
from coremltools.converters.mil.mil.scope import ScopeSource
from coremltools.optimize.coreml import OpLinearQuantizerConfig, OptimizationConfig

from shvit.errors import InputError

from ..spec import Spec
from ..wrappers import MIL_LAYERS
from .ranges import LEVELS, Range, learn_ranges

MIN_SCALE = 2.0**-14  # float16's smallest normal number
Evaluator = Callable[[Function], Callable[[torch.Tensor], Mapping[Var, torch.Tensor]]]
"""Takes a function with one input; returns a callable from an input to the values of all variables, with gradients."""


class Calibration(NamedTuple):
    """Inputs and evaluator that ranges are learned with."""

    inputs: Sequence[torch.Tensor]  # inputs of the traced graph, (1, C, H, W)
    evaluator: Evaluator  # runs the traced graph on them


def pipeline(
    spec: Spec, names: Mapping[str, str], calibration: Calibration, ranges: dict[str, Range]
) -> ct.PassPipeline:
    """Return coremltools' own passes followed by ours, as `spec.precision` needs them.

    Args:
        names: names of the modules that are layers, by their names in the traced graph.
        calibration: used where ranges are missing.
        ranges: ranges of layers' inputs, by the layer's name; missing ones are learned and added.
    """
    excluded = frozenset(spec.excluded_layers)
    passes = ct.PassPipeline.DEFAULT
    passes.append_pass("shvit::name_layers")
    passes.set_options("shvit::name_layers", {"names": names, "excluded": excluded})
    if spec.precision == "w8a8":
        passes.append_pass("shvit::quantize_activations")
        options = {"calibration": calibration, "excluded": excluded, "ranges": ranges}
        passes.set_options("shvit::quantize_activations", options)
    if spec.precision in ("int8", "w8a8"):
        passes.append_pass("shvit::quantize_weights")
        passes.set_options("shvit::quantize_weights", {"excluded": excluded})
    return passes


def layers_of(prog: Program) -> list[Operation]:
    """Return the program's convolutions and linear operations."""
    return [op for op in prog.functions["main"].operations if op.op_type in MIL_LAYERS]


@register_pass(namespace="shvit")
class name_layers(AbstractGraphPass):  # noqa: N801  (coremltools calls passes as functions)
    """Name each convolution and linear operation after the module whose output it gives, where that is one alone."""

    names: ClassVar[Mapping[str, str]] = {}
    excluded: ClassVar[frozenset[str]] = frozenset()

    def apply(self, prog: Program) -> None:
        layers = layers_of(prog)
        modules = [_traced_module(op) for op in layers]
        times = Counter(modules)
        for op, module in zip(layers, modules, strict=True):
            alone = module in self.names and times[module] == 1
            op.name = self.names[module] if alone else written(op.name)
        if unknown := sorted(self.excluded - {op.name for op in layers}):
            some = ", ".join(op.name for op in layers[:3])
            raise InputError(f"no convolution or linear layer is called {unknown[0]!r}; choose from the model's, "
                             f"such as {some}")  # fmt: skip


def _traced_module(op: Operation) -> str:
    """Return the dotted name of the module that the operation was traced in; its scope ends in the node's own name."""
    return ".".join(op.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_NAME, [""])[:-1])


def written(name: str) -> str:
    """Return an operation's name as coremltools writes it."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"op_{plain}" if plain[0].isdigit() else plain


@register_pass(namespace="shvit")
class quantize_activations(AbstractGraphPass):  # noqa: N801
    """Insert `quantize` and `dequantize` (uint8) before each convolution and linear layer.

    A linear layer of a single vector keeps its float input: its time is that of reading its weights.
    """

    calibration: ClassVar[Calibration | None] = None
    excluded: ClassVar[frozenset[str]] = frozenset()
    ranges: ClassVar[dict[str, Range]] = {}

    def apply(self, prog: Program) -> None:
        function = prog.functions["main"]
        layers = [op for op in layers_of(prog) if self._is_quantized(op)]
        if missing := [op for op in layers if op.name not in self.ranges]:
            assert self.calibration is not None
            tensors = list(dict.fromkeys(op.inputs["x"] for op in missing))
            learned = calibrate(function, tensors, self.calibration)
            self.ranges.update({op.name: learned[op.inputs["x"]] for op in missing})
        if layers:
            _insert(function, layers, [self.ranges[op.name] for op in layers])

    def _is_quantized(self, op: Operation) -> bool:
        if op.name in self.excluded or op.inputs["x"].val is not None:
            return False
        return op.op_type != "linear" or op.inputs["x"].rank > 2


@block_context_manager
def _insert(block: Block, layers: Sequence[Operation], ranges: Sequence[Range]) -> None:
    """Rebuild each layer on its rounded input; layers of the same input share it."""
    rounded: dict[Var, Var] = {}
    for op, ends in zip(layers, ranges, strict=True):
        source = op.inputs["x"]  # by now a rebuilt layer's, where the input is one's output
        if source not in rounded:
            rounded[source] = _round_trip(source, *ends, before=op)
        inputs = {**op.inputs, "x": rounded[source]}
        new = getattr(Builder, op.op_type)(**inputs, name=op.name, before_op=op)
        new.name = op.outputs[0].name
        block.replace_uses_of_var_after_op(anchor_op=op, old_var=op.outputs[0], new_var=new)
        block.remove_ops([op])


def _round_trip(source: Var, low: float, high: float, before: Operation) -> Var:
    """Return the tensor rounded to 8 bits and back."""
    dtype = np.float16 if source.dtype == types.fp16 else np.float32
    scale = dtype(max((high - low) / LEVELS, MIN_SCALE))
    zero_point = np.uint8(min(round(-low / float(scale)), LEVELS))
    levels = Builder.quantize(input=source, scale=scale, zero_point=zero_point, output_dtype="uint8", before_op=before)
    return Builder.dequantize(input=levels, scale=scale, zero_point=zero_point, before_op=before)


@register_pass(namespace="shvit")
class quantize_weights(AbstractGraphPass):  # noqa: N801
    """Apply coremltools' quantizer, int8 with a scale for each output channel, to the weights of layers.

    It is given their names one by one: by type of operation it refuses programs in which a norm and a convolution
    share a constant, as they do wherever two are equal.
    """

    excluded: ClassVar[frozenset[str]] = frozenset()

    def apply(self, prog: Program) -> None:
        weights: dict[bool, set[str]] = {True: set(), False: set()}
        for op in layers_of(prog):
            weights[op.name in self.excluded].add(op.inputs["weight"].op.name)
        int8 = OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=0)
        config = OptimizationConfig(op_name_configs=dict.fromkeys(weights[False] - weights[True], int8))
        quantizer = PASS_REGISTRY["compression::linear_quantize_weights"]
        quantizer.set_options([PassOption("config", config), PassOption("joint_compression", False)])
        quantizer.apply(prog)


def calibrate(function: Function, tensors: Sequence[Var], calibration: Calibration) -> dict[Var, Range]:
    """Return the range that each of the function's tensors is best cut to (see `learn_ranges`)."""
    values_of = calibration.evaluator(function)

    def evaluate(x: torch.Tensor) -> tuple[list[torch.Tensor], dict[Var, torch.Tensor]]:
        values = values_of(x)
        return [values[_logits(var)] for var in function.outputs], {var: values[var] for var in tensors}

    return learn_ranges(evaluate, calibration.inputs)


PROBABILITIES = ("softmax", "sigmoid")  # operations that make them of logits


def _logits(var: Var) -> Var:
    """Return the logits of an output that is made of them, whose gradient vanishes where it is certain."""
    source = var
    while source.op is not None and source.op.op_type in ("cast", *PROBABILITIES):
        source = source.op.inputs["x"]
        if source.child_ops[0].op_type in PROBABILITIES:
            return source
    return var
