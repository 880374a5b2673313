"""OpenVINO: how an IR (F.xml, the graph, and F.bin beside it, the weights) is written, loaded and run."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from shvit.files import scratch_folder
from shvit.terminal import quiet

from ..formats.onnx import load_onnx, metadata
from ..formats.openvino import (
    SECTION,
    RoundedOpenvino,
    check_model,
    core,
    lengths,
    load_openvino,
    openvino_parameters,
    openvino_scale_faults,
    openvino_steps,
    operators,
)
from ..formats.parameters import range_faults
from ..formats.rounding import HALVES, Outputs, join
from ..guards import Port, check_ports, one_line
from ..metadata import INPUT, SPEC_KEY, describe, labels_from, ranges_from, spec_from
from ..spec import Spec
from . import onnx
from .backend import (
    HUGE_PAGES,
    PROFILED_RUNS,
    UNSTEADY_RUNS,
    Artifact,
    Backend,
    GraphOptions,
    ImageInput,
    Job,
    OperatorTime,
    Source,
    Timing,
    Writer,
    apply_rounding,
    image_input,
)

if TYPE_CHECKING:
    from openvino import CompiledModel, Model, Output


def create_writer(source: Source, options: GraphOptions) -> Writer:
    """Return a function that writes IRs of a model, each from an ONNX file."""
    write_onnx = onnx.create_writer(source, options)

    def write(path: Path, spec: Spec) -> None:
        with scratch_folder() as folder:
            between = folder / "model.onnx"
            write_onnx(between, replace(spec, precision="int8" if spec.precision == "int8" else "fp32"))
            write_openvino(between, path, spec, source.labels)

    return write


def write_openvino(source: Path, path: Path, spec: Spec, labels: Sequence[str] = ()) -> None:
    """Convert an ONNX file of ours, which for int8 is quantized already.

    With fp16 and bf16 the weights are stored in float16. An IR cannot ask for bf16 arithmetic: `shvit`, and others who
    read the file's spec, ask the runtime for it. Names of layers are those of the ONNX file.

    Args:
        source: the ONNX file.
        path: the .xml; the caller moves both files into place.
    """
    import openvino as ov

    with quiet(), one_line(spec.model, "cannot be converted to OpenVINO"):
        model = ov.convert_model(source)
        ranges = ranges_from(metadata(load_onnx(source)), source)
        for key, value in describe(spec, labels, ranges).items():
            model.set_rt_info(value, [SECTION, key])
        ov.save_model(model, path, compress_to_fp16=spec.precision in ("fp16", "bf16"))


def compile_openvino(
    model: "Model", precision: str, threads: int | None = None, whole: bool = True, exact: bool = True
) -> "CompiledModel":
    """Compile an IR for this machine's CPU: arithmetic in bfloat16 where `precision` says so, in float32 otherwise.

    A CPU without bfloat16 instructions computes it slowly, or falls back to float32. On one whose 8-bit sums saturate
    int8 is computed in float32 (see `saturates`), unless `exact` is False.

    Args:
        whole: let the plugin move 8-bit scales from layer to layer, which is what makes int8 fast; outputs of layers
            between are then out of scale.
        exact: compute int8 in float32 where the processor's 8-bit kernels are wrong.
    """
    import openvino as ov
    from openvino import properties

    arithmetic = ov.Type.bf16 if precision == "bf16" else ov.Type.f32
    options: dict[Any, Any] = {properties.hint.inference_precision(): arithmetic}
    if not whole or (precision == "int8" and exact and saturates()):
        options["LP_TRANSFORMS_MODE"] = "NO"
    if threads is not None:
        options[properties.inference_num_threads()] = threads
    return core().compile_model(model, "CPU", options)


@cache
def saturates() -> bool:
    """Return whether OpenVINO's 8-bit kernels lose what is above 32767 in a sum of two products, without VNNI or AMX.

    It is measured by a convolution of the largest values: older x86 instructions add up pairs of products in 16 bits.
    Source: OpenVINO's and oneDNN's notes on 8-bit inference, "saturation (overflow) issue".
    """
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    chans, top = 64, 255.0
    ends = [np.float32(0), np.float32(top)] * 2
    image = ops.parameter([1, chans, 8, 8], ov.Type.f32)
    levels = ops.fake_quantize(image, *map(ops.constant, ends), levels=256)
    weight = ops.multiply(
        ops.convert(ops.constant(np.full((chans, chans, 1, 1), 127, np.int8)), "f32"), np.float32(1 / 127)
    )
    sums = ops.convolution(levels, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    again = ops.fake_quantize(sums, *map(ops.constant, [np.float32(0), np.float32(top * chans)] * 2), levels=256)
    model = ov.Model([ops.result(again)], [image], "saturation")
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled(np.full((1, chans, 8, 8), top, np.float32))[0]
    return bool(np.abs(outputs / (top * chans) - 1).max() > 0.05)


# --- run --------------------------------------------------------------------------------------------------------------


def load(path: Path, threads: int | None) -> Artifact:
    """Load an IR of `shvit export` in OpenVINO."""
    model, notes = load_openvino(path)
    spec = spec_from(notes, path)
    check_model(model, path)
    check_ports(path, spec, _ports(model.inputs), _ports(model.outputs), INPUT)

    def scale_faults() -> list[str]:
        whole, _ = load_openvino(path)
        return [*openvino_scale_faults(whole), *range_faults(ranges_from(notes, path), openvino_steps(whole))]

    def run_with_defaults(batch: torch.Tensor) -> Outputs:
        return _run(compile_openvino(model, spec.precision, threads, exact=False), batch)

    return Artifact(
        path=path,
        spec=spec,
        runtime=OPENVINO.runtime,
        operators=operators(model),
        run=partial(_run, compile_openvino(model, spec.precision, threads)),
        run_layers=partial(_run_layers, path, spec, threads),
        parameters=lambda: openvino_parameters(load_openvino(path)[0]),
        scale_faults=scale_faults,
        labels=labels_from(notes, path),
        run_with_defaults=run_with_defaults if spec.precision == "int8" and saturates() else None,
    )


def load_rounded(artifact: Artifact, threads: int | None) -> Artifact:
    """Return a half-precision artifact that rounds after each operation."""
    model, _ = load_openvino(artifact.path)
    return apply_rounding(artifact, RoundedOpenvino(model, HALVES[artifact.spec.precision], threads))


TYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "u8": "uint8"}  # OpenVINO's names for types


def _ports(outputs: Sequence["Output"]) -> list[Port]:
    """Return a model's inputs or outputs as ports."""
    ports = []
    for each in outputs:
        dtype, shape = each.element_type.get_type_name(), lengths(each)
        name = each.any_name if each.names else each.node.get_friendly_name()
        ports.append(Port(name, TYPES.get(dtype, dtype), None if shape is None else tuple(shape)))
    return ports


def _run(compiled: "CompiledModel", batch: torch.Tensor) -> Outputs:
    """Return all outputs; a file with a fixed batch of 1 is fed one image after the other."""
    rows = compiled.input(0).partial_shape[0]
    chunks = batch.split(1) if rows.is_static and rows.get_length() == 1 else (batch,)
    numbers = range(len(compiled.outputs))
    results = (compiled(chunk.numpy()) for chunk in chunks)
    return join([[result[number].copy() for number in numbers] for result in results])


def _run_layers(path: Path, spec: Spec, threads: int | None, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the layers' outputs, bias included: the last operation that a layer became bears its name."""
    model, _ = load_openvino(path)
    for op in model.get_ordered_ops():
        if op.get_type_name() in ("Add", "Convolution", "GroupConvolution"):
            model.add_outputs(op.output(0))
    names = [output.get_node().input_value(0).get_node().get_friendly_name() for output in model.outputs]
    outputs = _run(compile_openvino(model, spec.precision, threads, whole=False), batch)
    return dict(zip(names, outputs, strict=True))


def inspect(path: Path) -> ImageInput:
    """Return the image input of any IR."""
    model, notes = load_openvino(path)
    precision = spec_from(notes, path).precision if SPEC_KEY in notes else "fp32"
    return image_input(path, [lengths(port) or () for port in model.inputs], precision)


# --- timing -----------------------------------------------------------------------------------------------------------


def job(path: Path, batch_size: int, precision: str, compute_units: str) -> Job:
    """Return how the worker opens an IR or ONNX file in OpenVINO, compiled for the batch size."""
    return {"runner": "openvino", "path": str(path), "bf16": precision == "bf16", "batch_size": batch_size}


def profile(path: Path, batch: torch.Tensor, threads: int, precision: str) -> list[OperatorTime]:
    """Return the median time of each node, from OpenVINO's counters."""
    from openvino import properties

    model, _ = load_openvino(path)
    model.reshape(list(batch.shape))
    weights = _weight_shapes(model)
    options: dict[str, Any] = {properties.inference_num_threads(): threads, properties.enable_profiling(): True}
    options[properties.hint.inference_precision()] = precision if precision == "bf16" else "f32"
    request = core().compile_model(model, "CPU", options).create_infer_request()
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(PROFILED_RUNS):
        request.infer({0: batch.numpy()})
        for node in request.profiling_info:
            if (seconds := node.real_time.total_seconds()) > 0:
                times[node.node_name, node.node_type].append(seconds)
    return [
        OperatorTime(operator, weights.get(name, ()), median(each[UNSTEADY_RUNS:] or each))
        for (name, operator), each in times.items()
    ]


def _weight_shapes(model: "Model") -> dict[str, list[int]]:
    """Return the shape of each convolution's weight (outputs, inputs of a group, height, width) by the node's name."""
    shapes = {}
    for node in model.get_ops():
        if node.get_type_name() in ("Convolution", "GroupConvolution"):
            *groups, inputs, height, width = node.input(1).get_shape()  # of groups first: (groups, outputs of each)
            shapes[node.get_friendly_name()] = [math.prod(groups), inputs, height, width]
    return shapes


OPENVINO = Backend(
    name="openvino",
    title="OpenVINO",
    suffix=".xml",
    companions=(".bin",),
    help="Write a verified OpenVINO IR, F.xml and F.bin.",
    timings={
        "openvino": Timing("the file of `shvit export openvino` in OpenVINO", "fp32", "fp32"),
        "openvino-bf16": Timing("the same in bfloat16 arithmetic", "bf16", "fp32"),
        "openvino-int8": Timing("the same in int8", "int8", "int8"),
    },
    job=job,
    profile=profile,
    packages=("openvino",),
    extra="openvino",
    precisions=("fp32", "fp16", "bf16", "int8"),
    precision_help="Weight and compute precision. fp16 halves the file, and a CPU still computes in float32; bf16 also "
    "asks for bfloat16 arithmetic.",
    compared=("fp32", "bf16", "int8"),
    calibrated="int8",
    options=GraphOptions,
    all_options=GraphOptions(dynamic_batch=True),
    create_writer=create_writer,
    load=load,
    load_rounded=load_rounded,
    inspect=inspect,
    environment=HUGE_PAGES,
    overflow_advice="compile with LP_TRANSFORMS_MODE=NO, which computes in float32, or take another precision",
)
