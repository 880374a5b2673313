"""ONNX: how a file is written from a deployed model, and how ONNX Runtime loads and runs it."""

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

from shvit import sessions
from shvit.errors import InputError, first_line
from shvit.files import check_file, scratch_folder
from shvit.sessions import create_session
from shvit.terminal import quiet

from ..formats.onnx import (
    RoundedOnnx,
    check_graph,
    load_onnx,
    metadata,
    onnx_parameters,
    onnx_scale_faults,
    onnx_steps,
    operators,
    precision_of,
)
from ..formats.parameters import range_faults
from ..formats.rounding import Outputs, join
from ..guards import Port, check_ports, one_line
from ..metadata import INPUT, SPEC_KEY, Ranges, describe, labels_from, ranges_from, spec_from
from ..quantization.qdq import LAYERS, LayerRanges, quantize_onnx
from ..spec import Spec
from ..wrappers import ChannelsLast, Half, Normalized, layer_name
from .backend import (
    HUGE_PAGES,
    PROFILED_RUNS,
    UNSTEADY_RUNS,
    Arm64Build,
    Artifact,
    Backend,
    GraphOptions,
    ImageInput,
    Job,
    OperatorTime,
    Source,
    Timing,
    Wheel,
    Writer,
    apply_rounding,
    image_input,
)

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession, NodeArg

OPSET = 20  # the newest that ONNX Runtime, OpenVINO and onnxruntime-web of the last two years all read
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes from which module a node came


def create_writer(source: Source, options: GraphOptions) -> Writer:
    """Return a function that writes ONNX files of a model; what all of them share is computed once."""
    if source.spec.precision == "int8":
        return create_int8_writer(source.unfolded(), source.spec, source.ranges(), options.dynamic_batch, source.labels)
    return lambda path, spec: write_onnx(source.deployed(), path, spec, options.dynamic_batch, source.labels)


def create_int8_writer(
    unfolded: nn.Module,
    spec: Spec,
    ranges: Mapping[str, LayerRanges],
    dynamic_batch: bool = False,
    labels: Sequence[str] = (),
) -> Writer:
    """Return a function that writes int8 ONNX files, whose excluded layers stay in float32.

    Args:
        unfolded: deployed and with its identities unfolded, in eval mode.
        ranges: result of `activation_ranges`.
    """
    with scratch_folder() as folder:
        path = folder / "float.onnx"
        write_onnx(unfolded, path, spec, dynamic_batch)
        proto = load_onnx(path)

    def write(path: Path, spec: Spec) -> None:
        quantized = quantize_onnx(proto, spec, ranges)
        save_onnx(quantized.proto, path, spec, labels, quantized.ranges)

    return write


def write_onnx(
    model: nn.Module, path: Path, spec: Spec, dynamic_batch: bool = False, labels: Sequence[str] = ()
) -> None:
    """Export a deployed model with input `image` and the outputs that `spec` names, float32.

    The input is (B, C, H, W) float32, normalized; or (B, H, W, C) uint8 where `spec.uint8_input`. With
    `spec.precision` fp16 weights and arithmetic are float16; with any other they are float32. Convolutions and linear
    layers are named as their modules in `model`. The file carries its `Spec`, labels and the versions that made it,
    and has passed onnx.checker with full shape inference.

    Args:
        model: in eval mode.
        path: where to write; the caller moves it into place.
        dynamic_batch: leave B open; 1 otherwise.
        labels: names of the classes, for the file's metadata.
    """
    if spec.precision == "fp16":
        model = Half(model).eval()
    batch = spec.blank(2 if dynamic_batch else 1)
    if spec.uint8_input:
        model = ChannelsLast(Normalized(model, spec, white=255)).eval()
        batch = batch.permute(0, 2, 3, 1).to(torch.uint8)
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    with torch.no_grad(), quiet(), one_line(spec.model, "cannot be converted to ONNX"):
        program = torch.onnx.export(
            model,
            (batch,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(spec.outputs),
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _name_layers(proto)
    _strip(proto)
    save_onnx(proto, path, spec, labels)


def save_onnx(
    proto: "ModelProto", path: Path, spec: Spec, labels: Sequence[str] = (), ranges: Ranges | None = None
) -> None:
    """Write an ONNX file with its metadata, after onnx.checker with full shape inference.

    Args:
        ranges: ranges of an int8 file's tensors, by name.
    """
    import onnx

    del proto.metadata_props[:]
    for key, value in describe(spec, labels, ranges).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def _name_layers(proto: "ModelProto") -> None:
    """Name each node after the module that it came from, as far as the exporter noted it."""
    seen: Counter[str] = Counter()
    for node in proto.graph.node:
        scopes = {prop.key: prop.value for prop in node.metadata_props}.get(SCOPES)
        path = layer_name(["", *ast.literal_eval(scopes)[:-1]][-1]) if scopes else ""
        if node.op_type not in LAYERS:
            path = f"{path}.{node.op_type}" if path else node.op_type
        node.name = f"{path}.{seen[path]}" if seen[path] else path
        seen[path] += 1


def _strip(proto: "ModelProto") -> None:
    """Remove the exporter's notes on each node, among them source paths of the machine that exported."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        del value.metadata_props[:]


# --- run --------------------------------------------------------------------------------------------------------------


def load(path: Path, threads: int | None) -> Artifact:
    """Load an ONNX file of `shvit export` in ONNX Runtime."""
    proto = load_onnx(path)
    notes = metadata(proto)
    spec = spec_from(notes, path)
    check_graph(proto, path)
    session = onnx_session(path, threads)
    check_ports(path, spec, _ports(session.get_inputs()), _ports(session.get_outputs()), INPUT)

    def run_with_defaults(batch: torch.Tensor) -> Outputs:
        return _run(onnx_session(path, threads, exact=False), batch)

    return Artifact(
        path=path,
        spec=spec,
        runtime=ONNX.runtime,
        operators=operators(proto),
        run=partial(_run, session),
        run_layers=partial(_run_layers, path, threads),
        parameters=partial(onnx_parameters, proto),
        scale_faults=lambda: onnx_scale_faults(proto) + range_faults(ranges_from(notes, path), onnx_steps(proto)),
        labels=labels_from(notes, path),
        run_with_defaults=run_with_defaults if spec.precision == "int8" else None,
    )


def load_rounded(artifact: Artifact, threads: int | None) -> Artifact:
    """Return a half-precision artifact that rounds after each operation."""
    return apply_rounding(artifact, RoundedOnnx(load_onnx(artifact.path), threads))


def onnx_session(source: Path | bytes, threads: int | None = None, exact: bool = True) -> "InferenceSession":
    """Return an ONNX Runtime session on the CPU, by default with exact 8-bit sums; see `create_session`.

    Raise InputError where the file is not there or ONNX Runtime refuses it.
    """
    name = source if isinstance(source, Path) else "the ONNX file"
    if isinstance(source, Path):
        check_file(source)
    try:
        return create_session(source, threads, exact=exact)
    except Exception as error:  # onnxruntime's own exception types are not public
        raise InputError(f"{name}: ONNX Runtime cannot open it ({first_line(error)})") from error


ONNX_TYPES = {"float": "float32", "double": "float64"}  # types for which ONNX Runtime has other names than PyTorch


def _ports(arguments: Sequence["NodeArg"]) -> list[Port]:
    """Return a session's inputs or outputs as ports."""
    ports = []
    for each in arguments:
        dtype = each.type.removeprefix("tensor(").removesuffix(")") if each.type.startswith("tensor(") else each.type
        lengths = tuple(length if isinstance(length, int) else None for length in each.shape)
        ports.append(Port(each.name, ONNX_TYPES.get(dtype, dtype), lengths or None))
    return ports


def _run(session: "InferenceSession", batch: torch.Tensor) -> Outputs:
    """Return all outputs; a file with a fixed batch of 1 is fed one image after the other."""
    chunks = batch.split(1) if session.get_inputs()[0].shape[0] == 1 else (batch,)
    outputs = []
    for chunk in chunks:
        outputs.append(session.run(None, {INPUT: chunk.numpy()}))  # noqa: PERF401  (one frame less)
    return join(outputs)


def _run_layers(path: Path, threads: int | None, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    import onnx

    proto = load_onnx(path)
    names = {node.output[0]: node.name for node in proto.graph.node if node.op_type in LAYERS}
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    outputs = _run(onnx_session(proto.SerializeToString(), threads), batch)
    return {name: output.float() for name, output in zip(names.values(), outputs, strict=True)}


INPUT_TYPES = ("tensor(float)", "tensor(float16)", "tensor(uint8)")  # types that a benchmark creates inputs of


def inspect(path: Path) -> ImageInput:
    """Return the image input of any ONNX file."""
    proto = load_onnx(path)
    notes = metadata(proto)
    inputs = onnx_session(path, 1).get_inputs()
    precision = spec_from(notes, path).precision if SPEC_KEY in notes else precision_of(proto)
    result = image_input(path, [each.shape for each in inputs], precision)
    if inputs[0].type not in INPUT_TYPES:
        raise InputError(f"{path}: takes {inputs[0].type}; only {', '.join(INPUT_TYPES)} are timed here")
    return result


# --- timing -----------------------------------------------------------------------------------------------------------

TIMED_NAME = re.compile(r"(_token_\d+|_nchwc)?_kernel_time$")  # what ONNX Runtime adds to a node's name


def job(path: Path, batch_size: int, precision: str, compute_units: str) -> Job:
    """Return how the worker opens a file in ONNX Runtime."""
    return {"runner": "onnx", "path": str(path), "provider": "cpu", "sessions": sessions.__file__}


def profile(path: Path, batch: torch.Tensor, threads: int, precision: str) -> list[OperatorTime]:
    """Return the median time of each node, from ONNX Runtime's profile."""
    with scratch_folder() as folder:
        session = create_session(path, threads, profile=folder / "profile")
        inputs = {session.get_inputs()[0].name: batch.numpy()}
        for _ in range(PROFILED_RUNS):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    weights = _weight_shapes(path)
    times: dict[int, list[float]] = defaultdict(list)
    nodes: dict[int, tuple[str, Sequence[int]]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        number, operator = int(event["args"]["node_index"]), event["args"]["op_name"]
        times[number].append(event["dur"] / 1e6)
        shapes = [next(iter(each.values())) for each in event["args"]["input_type_shape"]]
        weight = weights.get(TIMED_NAME.sub("", event["name"]), shapes[1] if len(shapes) > 1 else ())
        nodes[number] = (operator, weight if "Conv" in operator and len(weight) == 4 else ())
    return [OperatorTime(*nodes[number], median(each[UNSTEADY_RUNS:])) for number, each in times.items()]


def _weight_shapes(path: Path) -> dict[str, list[int]]:
    """Return each convolution's weight shape by node name; the profile has none where the runtime packed it."""
    graph = load_onnx(path).graph
    shapes = {each.name: list(each.dims) for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    return {node.name: shapes[node.input[1]] for node in graph.node if node.op_type == "Conv"}


ARM64 = Wheel("onnxruntime", "1.32.0", {
    "3.11": "2303372a85299b6757b0e11e1cbf13e410ddf7e10c37f4b37e99d1c90e7daf7c",
    "3.12": "e36c187006e7a7c8b8d6d57f1a209dd63f52430dca6c282b177718ad6b841054",
    "3.13": "54d02baff2df38777b4c3cc7af326406fe8b8a48f54720f4c446d2d327920a79",
})  # fmt: skip

ONNX = Backend(
    name="onnx",
    title="ONNX",
    suffix=".onnx",
    help="Write a verified ONNX file.",
    timings={
        "onnxruntime": Timing("the file of `shvit export onnx` in ONNX Runtime", "fp32", "fp32"),
        "onnxruntime-int8": Timing("the same in int8", "int8", "int8"),
        "onnxruntime-cuda": Timing(
            "the ONNX file on a GPU, CUDA provider", "fp32", "fp32", {"provider": "cuda"}, on_cpu=False
        ),
        "onnxruntime-tensorrt": Timing(
            "the ONNX file on a GPU, TensorRT provider", "fp32", "fp32", {"provider": "tensorrt"}, on_cpu=False
        ),
    },
    job=job,
    profile=profile,
    packages=("onnx", "onnxruntime", "onnxscript"),
    precisions=("fp32", "fp16", "int8"),
    precision_help="Weight and compute precision.",
    compared=("fp32", "fp16", "int8"),
    calibrated="int8",
    options=GraphOptions,
    all_options=GraphOptions(dynamic_batch=True),
    create_writer=create_writer,
    load=load,
    load_rounded=load_rounded,
    inspect=inspect,
    float_stem=True,
    environment=HUGE_PAGES,
    arm64=Arm64Build((ARM64,), "onnxruntime"),
    overflow_advice="set the session's option session.x64quantprecision to 1",
)
