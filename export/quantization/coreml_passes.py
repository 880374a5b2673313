"""coremltools' graph passes of ours: names for layers, and 8-bit activations.

Importing this registers them, so it is imported only to convert.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder, types
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass, PassOption
from coremltools.converters.mil.mil.passes.helper import block_context_manager
from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass
from coremltools.converters.mil.mil.scope import ScopeSource
from coremltools.optimize.coreml import OpLinearQuantizerConfig, OptimizationConfig

from shvit.errors import InputError

from ..mil.program import LAYERS, Program
from ..spec import Spec
from .ranges import LEVELS, Range, best_range, histogram

MIN_SCALE = 2.0**-14  # float16's smallest normal number


def pipeline(
    spec: Spec,
    names: Mapping[str, str],
    calibration: Sequence[torch.Tensor],
    keep: Collection[str],
    ranges: dict[str, Range],
) -> Any:
    """coremltools' own passes, then ours, then its quantizer of weights, as `spec.precision` needs them.

    Args:
        names: of the modules that are layers, by their names in what was traced.
        calibration: inputs of the traced graph, (1, C, H, W).
        keep: names of layers that are not quantized.
        ranges: of layers' inputs, by the layer's name; those that are missing are learned and put in.
    """
    passes = ct.PassPipeline.DEFAULT
    passes.append_pass("shvit::name_layers")
    passes.set_options("shvit::name_layers", {"names": names, "keep": frozenset(keep)})
    if spec.precision == "w8a8":
        passes.append_pass("shvit::quantize_activations")
        options = {"calibration": calibration, "keep": frozenset(keep), "ranges": ranges}
        passes.set_options("shvit::quantize_activations", options)
    if spec.precision in ("int8", "w8a8"):
        passes.append_pass("shvit::quantize_weights")
        passes.set_options("shvit::quantize_weights", {"keep": frozenset(keep)})
    return passes


def layers_of(prog: Any) -> list[Any]:
    """The program's convolutions and linear operations."""
    return [op for op in prog.functions["main"].operations if op.op_type in LAYERS]


@register_pass(namespace="shvit")
class name_layers(AbstractGraphPass):  # noqa: N801  (coremltools calls passes as functions)
    """Names each convolution and linear operation after the module whose output it gives, where that is one alone."""

    names: ClassVar[Mapping[str, str]] = {}
    keep: ClassVar[frozenset[str]] = frozenset()

    def apply(self, prog: Any) -> None:
        layers = layers_of(prog)
        modules = [_traced_module(op) for op in layers]
        times = Counter(modules)
        for op, module in zip(layers, modules, strict=True):
            alone = module in self.names and times[module] == 1
            op.name = self.names[module] if alone else written(op.name)
        unknown = sorted(self.keep - {op.name for op in layers})
        if unknown:
            some = ", ".join(op.name for op in layers[:3])
            raise InputError(f"no convolution or linear layer is called {unknown[0]!r}; choose from the model's, "
                             f"such as {some}")  # fmt: skip


def _traced_module(op: Any) -> str:
    """The dotted name of the module whose trace the operation comes from; its scope ends in the node's own name."""
    return ".".join(op.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_NAME, [""])[:-1])


def written(name: str) -> str:
    """Return an operation's name as coremltools writes it."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"op_{plain}" if plain[0].isdigit() else plain


@register_pass(namespace="shvit")
class quantize_activations(AbstractGraphPass):  # noqa: N801
    """Puts `quantize` and `dequantize` (uint8) before each convolution and linear layer.

    A linear layer of a single vector keeps its float input: it is bound by its weights, and gains nothing.
    """

    calibration: ClassVar[Sequence[torch.Tensor]] = ()
    keep: ClassVar[frozenset[str]] = frozenset()
    ranges: ClassVar[dict[str, Range]] = {}

    def apply(self, prog: Any) -> None:
        function = prog.functions["main"]
        layers = [op for op in layers_of(prog) if self._is_wanted(op)]
        if missing := [op for op in layers if op.name not in self.ranges]:
            tensors = list(dict.fromkeys(op.inputs["x"] for op in missing))
            learned = calibrate(Program(function, "the traced model"), tensors, self.calibration)
            self.ranges.update({op.name: learned[op.inputs["x"]] for op in missing})
        if layers:
            _insert(function, layers, [self.ranges[op.name] for op in layers])

    def _is_wanted(self, op: Any) -> bool:
        if op.name in self.keep or op.inputs["x"].val is not None:
            return False
        return op.op_type != "linear" or op.inputs["x"].rank > 2


@block_context_manager
def _insert(block: Any, layers: Sequence[Any], ranges: Sequence[tuple[float, float]]) -> None:
    """Rebuilds each layer on its rounded input; layers of the same input share it."""
    rounded: dict[Any, Any] = {}
    for op, ends in zip(layers, ranges, strict=True):
        source = op.inputs["x"]  # by now a rebuilt layer's, where the input is one's output
        if source not in rounded:
            rounded[source] = _round_trip(source, *ends, before=op)
        inputs = {**op.inputs, "x": rounded[source]}
        new = getattr(Builder, op.op_type)(**inputs, name=op.name, before_op=op)
        new.name = op.outputs[0].name
        block.replace_uses_of_var_after_op(anchor_op=op, old_var=op.outputs[0], new_var=new)
        block.remove_ops([op])


def _round_trip(source: Any, low: float, high: float, before: Any) -> Any:
    """The tensor through 8 bits and back."""
    dtype = np.float16 if source.dtype == types.fp16 else np.float32
    scale = dtype(max((high - low) / LEVELS, MIN_SCALE))
    zero_point = np.uint8(min(round(-low / float(scale)), LEVELS))
    levels = Builder.quantize(input=source, scale=scale, zero_point=zero_point, output_dtype="uint8", before_op=before)
    return Builder.dequantize(input=levels, scale=scale, zero_point=zero_point, before_op=before)


@register_pass(namespace="shvit")
class quantize_weights(AbstractGraphPass):  # noqa: N801
    """Applies coremltools' quantizer, int8 with a scale for each output channel, to the weights of layers.

    They are named to it one by one: by kind of operation it refuses programs in which a norm and a convolution share a
    constant, as they do wherever two are equal.
    """

    keep: ClassVar[frozenset[str]] = frozenset()

    def apply(self, prog: Any) -> None:
        weights: dict[bool, set[str]] = {True: set(), False: set()}
        for op in layers_of(prog):
            weights[op.name in self.keep].add(op.inputs["weight"].op.name)
        int8 = OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=0)
        config = OptimizationConfig(op_name_configs=dict.fromkeys(weights[False] - weights[True], int8))
        quantizer = PASS_REGISTRY["compression::linear_quantize_weights"]
        quantizer.set_options([PassOption("config", config), PassOption("joint_compression", False)])
        quantizer.apply(prog)


def calibrate(
    program: Program, tensors: Sequence[Any], inputs: Sequence[torch.Tensor]
) -> dict[Any, tuple[float, float]]:
    """The range that each of the program's tensors is best cut to (see `ranges`).

    Errors are weighed by the squared gradient of the outputs, with random signs: its mean is the squared error that
    they cause there, to first order.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[Any, torch.Tensor] = {}
    (name,) = program.function.inputs
    for x in inputs:
        values = program.values({name: x.clone().requires_grad_()})
        outputs = [values[_before_softmax(var)] for var in program.function.outputs]
        signs = [torch.randint(0, 2, out.shape, generator=generator) * 2.0 - 1 for out in outputs]
        total = torch.stack([(out * sign).sum() for out, sign in zip(outputs, signs, strict=True)]).sum()
        for var, gradient in zip(tensors, torch.autograd.grad(total, [values[var] for var in tensors]), strict=True):
            found[var] = found.get(var, 0) + histogram(values[var].detach(), gradient.double().square())
    return {var: best_range(counts) for var, counts in found.items()}


def _before_softmax(var: Any) -> Any:
    """Logits, where the output is their softmax, which hardly has a gradient where it is certain."""
    source = var
    while source.op is not None and source.op.op_type in ("cast", "softmax"):
        source = source.op.inputs["x"]
        if source.child_ops[0].op_type == "softmax":
            return source
    return var
