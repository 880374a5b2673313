"""A deployed model as an OpenVINO IR: F.xml, the graph, and F.bin beside it, the weights."""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shvit.errors import InputError
from shvit.files import is_file
from shvit.terminal import quiet

from ..guards import check_elements, check_operators, one_line
from ..metadata import describe, ranges_from
from ..spec import Spec
from .onnx import metadata, read_onnx

SECTION = "shvit"  # of the IR's runtime information


@cache
def core() -> Any:
    """OpenVINO itself, one for the whole process and never given up.

    Its CPU plugin gives the thread that loads it a stack for signal handlers, and frees that when it is unloaded. Where
    another thread lets go of the last reference, the first thread is left with freed memory, and the next signal that
    Python handles (Ctrl-C, a loader's worker that ends) is a segmentation fault. Seen with OpenVINO 2026.4.
    """
    import openvino as ov

    return ov.Core()


def write_openvino(source: Path, path: Path, spec: Spec, labels: Sequence[str] = ()) -> None:
    """Converts an ONNX file of ours, which for int8 is quantized already.

    With fp16 and bf16 the weights are stored in float16; bf16 is then a wish that `shvit` and whoever reads the file's
    spec passes on to the runtime, since an IR cannot hold it. Names of layers are those of the ONNX file.

    Args:
        source: the ONNX file.
        path: of the .xml; the caller moves both files into place.
    """
    import openvino as ov

    with quiet():
        model = ov.convert_model(source)
        ranges = ranges_from(metadata(read_onnx(source)), source)
        for key, value in describe(spec, labels, ranges).items():
            model.set_rt_info(value, [SECTION, key])
        ov.save_model(model, path, compress_to_fp16=spec.precision in ("fp16", "bf16"))


def read_openvino(path: Path) -> tuple[Any, dict[str, str]]:
    """An IR and what it says of itself.

    Raises:
        InputError: one of its two files is not there or damaged.
    """
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


def check_model(model: Any, path: Path) -> None:
    """Raise InputError for loops, and for tensors that are too large, as far as shapes can be told."""
    check_operators(path, operators(model))
    for op in model.get_ops():
        shapes = [each.partial_shape for each in map(op.output, range(op.get_output_size()))]
        lengths = [[dim.get_length() if dim.is_static else None for dim in shape]
                   for shape in shapes if shape.rank.is_static]  # fmt: skip
        check_elements(path, [(op.get_friendly_name(), each) for each in lengths])


def compile_openvino(
    model: Any, precision: str, threads: int | None = None, whole: bool = True, exact: bool = True
) -> Any:
    """The IR for the CPU of this machine: arithmetic in bfloat16 where `precision` says so, in float32 otherwise.

    A CPU without bfloat16 instructions computes it slowly, or falls back to float32. On one whose 8-bit sums saturate
    int8 is computed in float32 (see `saturates`), unless `exact` is False.

    Args:
        whole: let the plugin move 8-bit scales from layer to layer, which is what makes int8 fast; what a layer
            between gives is then out of scale.
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
    """Whether OpenVINO's 8-bit kernels lose what is above 32767 in a sum of two products, as without VNNI or AMX.

    Found out by a convolution with the largest values: x86's older instructions add up pairs of products in 16 bits.
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
    found = compiled(np.full((1, chans, 8, 8), top, np.float32))[0]
    return bool(np.abs(found / (top * chans) - 1).max() > 0.05)


def operators(model: Any) -> dict[str, int]:
    """How many of each operation, most frequent first; constants, inputs and outputs are not counted."""
    plumbing = {"Constant", "Parameter", "Result"}
    return dict(Counter(t for op in model.get_ops() if (t := op.get_type_name()) not in plumbing).most_common())
