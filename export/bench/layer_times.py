"""Time by kind of layer, from each runtime's own profiler."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from shvit.deployment import deploy

from ..backends.backend import PROFILED_RUNS, Job, OperatorTime
from ..backends.registry import BACKENDS
from .cases import BenchModel
from .records import LayerTime
from .runtimes import RUNTIMES

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


def measure_layers(model: BenchModel, name: str, batch_size: int) -> list[LayerTime]:
    """Return the time of each kind of layer, longest first, on as many threads as the model's settings say.

    Args:
        name: a runtime with a profiler; see `Runtime.has_profiler`.
    """
    runtime = RUNTIMES[name]
    job = runtime.job(model, batch_size)
    if runtime.backend is None:
        operators = profile_torch(model, job, batch_size)
    else:
        batch = torch.rand(batch_size, *model.spec.shape)
        measure = BACKENDS[runtime.backend].profile
        assert measure is not None
        operators = measure(Path(job["path"]), batch, model.settings.threads, runtime.precision)
    total = sum(each.seconds for each in operators)
    kinds: dict[str, float] = defaultdict(float)
    for each in operators:
        kinds[convolution_kind(each.weight) if each.weight else layer_kind(each.operator)] += each.seconds
    return [
        LayerTime(model.name, name, batch_size, kind, 1e3 * seconds / batch_size, 100 * seconds / total)
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


def profile_torch(model: BenchModel, job: Job, batch_size: int) -> list[OperatorTime]:
    """Return the time of each operator of eager PyTorch, from torch.profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no message about GPUs on stderr
    dtype = torch.bfloat16 if job["bf16"] else torch.float32
    layout = torch.channels_last if job["channels_last"] else torch.contiguous_format
    deployed = deploy(model.opened[0], model.spec.img_size).to(dtype).to(memory_format=layout)
    batch = torch.rand(batch_size, *model.spec.shape).to(dtype=dtype, memory_format=layout)
    with torch.inference_mode():
        deployed(batch)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for _ in range(PROFILED_RUNS):
                deployed(batch)
    events = []
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.self_cpu_time_total <= 0 or not event.key.startswith(("aten::", "mkldnn")):
            continue
        shapes = [shape for shape in event.input_shapes if len(shape) == 4]
        weight = shapes[1] if "conv" in event.key and len(shapes) > 1 else ()
        events.append(OperatorTime(event.key, weight, event.self_cpu_time_total / 1e6 / PROFILED_RUNS))
    return events
