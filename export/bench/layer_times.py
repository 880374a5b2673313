"""Time by kind of layer, from each runtime's own profiler."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from shvit.deployment import deploy
from shvit.files import scratch_folder
from shvit.sessions import create_session

from ..backends.onnx_graph import load_onnx
from ..backends.openvino_graph import core
from .cases import BenchModel
from .records import LayerTime
from .runtimes import RUNTIMES, Job

PROFILE_ENDING = re.compile(r"(_token_\d+|_nchwc)?_kernel_time$")  # ONNX Runtime adds it to a node's name
RUNS = 20
WARM_UP = 3  # runs at the beginning that do not count
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("matmul", "softmax", "bmm", "baddbmm", "scaled_dot"),
    "normalization": ("norm", "mvn"),
    "pooling": ("reducemean", "globalaveragepool", "mean", "adaptive_avg_pool"),
    "linear": ("gemm", "fullyconnected", "addmm"),
    "reordering": ("reorder", "transpose", "reshape", "split", "concat", "copy_", "cat", "flatten", "slice", "clone"),
    "rounding to 8 bits": ("quantize", "convert"),
    "element by element": ("add", "mul", "relu", "sigmoid", "subgraph", "eltwise", "sub", "clamp", "hard", "gelu",
                           "div"),
}  # fmt: skip
"""Parts of operators' names, in lower case, by kind; the first match counts."""
Events = list[tuple[str, float]]  # kind and seconds of each operator


def measure_layers(model: BenchModel, runtime: str, batch_size: int) -> list[LayerTime]:
    """Return the time of each kind of layer, longest first, on as many threads as the model's settings say.

    Raises:
        KeyError: a runtime without a profiler here; see `has_profiler`.
    """
    job = RUNTIMES[runtime].job(model, batch_size)
    events = PROFILERS[job["runner"]](model, job, batch_size)
    total = sum(seconds for _, seconds in events)
    kinds: dict[str, float] = defaultdict(float)
    for kind, seconds in events:
        kinds[kind] += seconds
    return [
        LayerTime(model.name, runtime, batch_size, kind, 1e3 * seconds / batch_size, 100 * seconds / total)
        for kind, seconds in sorted(kinds.items(), key=lambda item: -item[1])
    ]


def layer_kind(operator: str) -> str:
    """Return the kind of an operator that is not a convolution."""
    name = operator.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def convolution_kind(weight: Sequence[int]) -> str:
    """Return the kind of a convolution by its weight's shape (outputs, inputs of a group, height, width)."""
    if weight[1] == 1:
        return "depthwise convolution"
    return "1×1 convolution" if tuple(weight[2:]) == (1, 1) else "k×k convolution"


def profile_onnx(model: BenchModel, job: Job, batch_size: int) -> Events:
    """Return kind and median seconds of each node, from ONNX Runtime's profile."""
    with scratch_folder() as folder:
        session = create_session(job["path"], model.settings.threads, profile=folder / "profile")
        batch = {session.get_inputs()[0].name: torch.rand(batch_size, *model.spec.shape).numpy()}
        for _ in range(RUNS):
            session.run(None, batch)
        events = json.loads(Path(session.end_profiling()).read_text())
    weights = _weight_shapes(Path(job["path"]))
    times: dict[int, list[float]] = defaultdict(list)
    kinds: dict[int, str] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        node, operator = int(event["args"]["node_index"]), event["args"]["op_name"]
        times[node].append(event["dur"] / 1e6)
        shapes = [next(iter(each.values())) for each in event["args"]["input_type_shape"]]
        weight = weights.get(PROFILE_ENDING.sub("", event["name"]), shapes[1] if len(shapes) > 1 else ())
        kinds[node] = convolution_kind(weight) if "Conv" in operator and len(weight) == 4 else layer_kind(operator)
    return [(kinds[node], median(seconds[WARM_UP:])) for node, seconds in times.items()]


def _weight_shapes(path: Path) -> dict[str, list[int]]:
    """Return each convolution's weight shape by node name; the profile has none where the runtime packed it."""
    graph = load_onnx(path).graph
    shapes = {each.name: list(each.dims) for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    return {node.name: shapes[node.input[1]] for node in graph.node if node.op_type == "Conv"}


def profile_openvino(model: BenchModel, job: Job, batch_size: int) -> Events:
    """Return kind and median seconds of each node, from OpenVINO's counters."""
    import openvino as ov
    from openvino import properties

    network = core().read_model(job["path"])
    network.reshape([batch_size, *model.spec.shape])
    options = {
        properties.hint.inference_precision(): ov.Type.bf16 if job["bf16"] else ov.Type.f32,
        properties.inference_num_threads(): model.settings.threads,
        properties.enable_profiling(): True,
    }
    request = core().compile_model(network, "CPU", options).create_infer_request()
    batch = torch.rand(batch_size, *model.spec.shape).numpy()
    times: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for _ in range(RUNS):
        request.infer({0: batch})
        for node in request.profiling_info:
            if (seconds := node.real_time.total_seconds()) > 0:
                times[node.node_name].append(seconds)
                kinds[node.node_name] = _openvino_kind(node.node_type, node.exec_type)
    return [(kinds[name], median(seconds[WARM_UP:] or seconds)) for name, seconds in times.items()]


def _openvino_kind(node_type: str, exec_type: str) -> str:
    if node_type == "GroupConvolution":
        return "depthwise convolution"
    if node_type == "Convolution":
        return "1×1 convolution" if "1x1" in exec_type else "k×k convolution"
    return layer_kind(node_type)


def profile_torch(model: BenchModel, job: Job, batch_size: int) -> Events:
    """Return kind and seconds of each operator of eager PyTorch, from torch.profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no message about GPUs on stderr
    dtype = torch.bfloat16 if job["bf16"] else torch.float32
    layout = torch.channels_last if job["channels_last"] else torch.contiguous_format
    deployed = deploy(model.opened[0], model.spec.img_size).to(dtype).to(memory_format=layout)
    batch = torch.rand(batch_size, *model.spec.shape).to(dtype=dtype, memory_format=layout)
    with torch.inference_mode():
        deployed(batch)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for _ in range(RUNS):
                deployed(batch)
    events = []
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.self_cpu_time_total <= 0 or not event.key.startswith(("aten::", "mkldnn")):
            continue
        weights = [shape for shape in event.input_shapes if len(shape) == 4]
        convolution = "conv" in event.key and len(weights) > 1
        kind = convolution_kind(weights[1]) if convolution else layer_kind(event.key)
        events.append((kind, event.self_cpu_time_total / 1e6 / RUNS))
    return events


PROFILERS = {"onnx": profile_onnx, "openvino": profile_openvino, "torch": profile_torch}


def has_profiler(runtime: str) -> bool:
    """Return whether a runtime has a profiler here: not compiled code, GPUs and Core ML."""
    return not any(word in runtime for word in ("compiled", "cuda", "tensorrt", "coreml"))
