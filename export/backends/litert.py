"""LiteRT (formerly TensorFlow Lite): how a .tflite file is written, loaded and run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from shvit.fold import DeployedSHSA
from shvit.terminal import muted

from ..formats.litert import (
    bias_faults,
    create_interpreter,
    delegation,
    graph_of,
    layer_parameters,
    notes_of,
    operators,
    pack,
    read_model,
    shape_of,
    steps,
    unpack,
    write_notes,
)
from ..formats.litert_edits import RoundedLitert, halve, invoke, name_parts, quantize, to_planes, with_layer_outputs
from ..formats.parameters import range_faults
from ..formats.rounding import Outputs, join
from ..guards import Port, check_ports, one_line
from ..metadata import INPUT, SPEC_KEY, describe, labels_from, ranges_from, spec_from
from ..quantization.qdq import LayerRanges
from ..quantization.ranges import Range
from ..spec import Spec
from ..wrappers import ChannelsLast, Normalized, Tupled, with_attention
from .backend import (
    HUGE_PAGES,
    Arm64Build,
    Artifact,
    Backend,
    Delegation,
    FormatOptions,
    ImageInput,
    Job,
    Source,
    Timing,
    Wheel,
    Writer,
    apply_rounding,
    image_input,
    with_pixel_input,
)

if TYPE_CHECKING:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_litert.schema_py_generated import ModelT, TensorMapT


# --- write ------------------------------------------------------------------------------------------------------------


class ChannelsLastSHSA(DeployedSHSA):
    """Attention over (B, N, D), in the order in which LiteRT holds images, with means in place of a LayerNorm.

    Of S1's 37 transpositions one is left, and of 412 operators 313. On a CPU no form is faster (all are within 3 %),
    and it asks no LayerNorm of GPU delegates, of which some compute it wrongly.
    """

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean((1, 2, 3), keepdim=True)
        return x * torch.rsqrt((x * x).mean((1, 2, 3), keepdim=True) + self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x1, x2 = torch.split(x, [self.partial_dim, self.proj.in_channels - self.partial_dim], dim=1)
        # (B, P, H, W) (B, C-P, H, W)
        qkv = self.qkv(self._normalize(x1)).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, 2D+P)
        q, k, v = torch.split(qkv, [self.qk_dim, self.qk_dim, self.partial_dim], dim=2)  # (B, N, D) (B, N, D) (B, N, P)
        attn = (q @ k.transpose(1, 2)).softmax(dim=-1)  # (B, N, N)
        x1 = self._to_grid(attn @ v, x1)  # (B, P, H, W)
        return self.proj(self.act(torch.cat([x1, x2], dim=1)))

    def _to_grid(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Reshape (B, N, P) → (B, P, H, W), as `like` is."""
        H, W = self.grid if self.grid is not None else (like.shape[2], like.shape[3])
        return x.reshape(-1, H, W, self.partial_dim).permute(0, 3, 1, 2)


def create_writer(source: Source, options: "LitertOptions") -> Writer:
    """Return a function that writes files of a model, which is converted once."""
    int8 = source.spec.precision == "int8"
    model = source.unfolded() if int8 else source.deployed()
    content = source.once(("LiteRT", int8, source.spec.uint8_input), lambda: convert(model, source.spec))
    ranges = source.ranges() if int8 else {}
    return lambda path, spec: write_litert(content, path, spec, source.labels, ranges)


def convert(model: nn.Module, spec: Spec) -> bytes:
    """Return a deployed model as the content of a .tflite file in fp32, whose layers have the model's names.

    Raise InputError where it has operations that LiteRT's converter does not take.
    """
    module = with_attention(model, ChannelsLastSHSA)
    if len(spec.outputs) > 1:
        module = Tupled(module)
    if spec.uint8_input:
        module = ChannelsLast(Normalized(module, spec, white=255))
    image = spec.feed(torch.zeros(1, *spec.shape, dtype=torch.uint8))
    with muted(), one_line(spec.model, "cannot be converted to LiteRT"):
        import litert_torch

        content = litert_torch.convert(module.eval(), (image,)).model_content()
    converted = unpack(content)
    name_parts(converted, model, spec.outputs)
    return pack(converted)


def write_litert(
    content: bytes, path: Path, spec: Spec, labels: Sequence[str], ranges: Mapping[str, LayerRanges]
) -> None:
    """Write what `convert` returns, with weights in the spec's precision, and with its description.

    Args:
        ranges: of int8, those of every layer.
    """
    learned: dict[str, Range] = {}
    if spec.precision == "fp16":
        content = halve(content)
    elif spec.precision == "int8":
        content, learned = quantize(content, ranges, spec.excluded_layers)
    model = unpack(content)
    write_notes(model, describe(spec, labels, learned))
    path.write_bytes(pack(model))


# --- run --------------------------------------------------------------------------------------------------------------


def load(path: Path, threads: int | None) -> Artifact:
    """Load a file of `shvit export` in LiteRT."""
    model = read_model(path)
    notes = notes_of(model)
    spec, signature = spec_from(notes, path), model.signatureDefs[0]
    inputs, outputs = (_ports(model, each) for each in (signature.inputs, signature.outputs))
    check_ports(path, spec, inputs, outputs, INPUT)
    return Artifact(
        path=path,
        spec=spec,
        runtime=LITERT.runtime,
        operators=operators(model),
        run=partial(_run, create_interpreter(pack(model), threads), spec.outputs),
        run_layers=partial(_run_layers, model, threads),
        parameters=lambda: layer_parameters(model),
        scale_faults=lambda: bias_faults(model) + range_faults(ranges_from(notes, path), steps(model)),
        labels=labels_from(notes, path),
    )


TYPES = {"FLOAT32": "float32", "FLOAT16": "float16", "FLOAT64": "float64", "UINT8": "uint8"}  # LiteRT's names for types


def _ports(model: "ModelT", mapped: Sequence["TensorMapT"]) -> list[Port]:
    """Return the inputs or outputs of a model's signature as ports, in the order of the graph's."""
    from ai_edge_litert.tools.flatbuffer_utils import type_to_name

    ports = []
    for each in mapped:
        tensor = graph_of(model).tensors[each.tensorIndex]
        dtype = type_to_name(tensor.type)
        ports.append(Port(each.name.decode(), TYPES.get(dtype, dtype), (None, *shape_of(tensor)[1:])))
    return ports


def _run(interpreter: "Interpreter", names: Sequence[str], batch: torch.Tensor) -> Outputs:
    """Return all outputs; a file takes one image after the other."""
    runner = interpreter.get_signature_runner()
    parts = []
    for image in batch.split(1):
        outputs = runner(**{INPUT: image.numpy()})
        parts.append([outputs[name] for name in names])
    return join(parts)


def _run_layers(model: "ModelT", threads: int | None, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    content, names = with_layer_outputs(model)
    interpreter = create_interpreter(content, threads)
    outputs = join([invoke(interpreter, image) for image in batch.split(1)])
    return {name: to_planes(output) for name, output in zip(names, outputs, strict=True)}


def load_rounded(artifact: Artifact, threads: int | None) -> Artifact:
    """Return a half-precision artifact that rounds after each operator."""
    return apply_rounding(artifact, RoundedLitert(read_model(artifact.path), threads))


def inspect(path: Path) -> ImageInput:
    """Return the image input of any .tflite file."""
    model = read_model(path)
    notes = notes_of(model)
    precision = spec_from(notes, path).precision if SPEC_KEY in notes else "fp32"
    graph = graph_of(model)
    return image_input(path, [shape_of(graph.tensors[index]) for index in graph.inputs], precision)


# --- the backend ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LitertOptions(FormatOptions):
    """Options of LiteRT's files, which take one image."""

    raw_pixels: bool = False
    """Take RGB pixels, uint8 (1, H, W, C), and normalize them inside; a normalized float32 (1, C, H, W) by default."""

    def complete(self, spec: Spec) -> Spec:
        return with_pixel_input(spec, self.raw_pixels)


def job(path: Path, batch_size: int, precision: str, compute_units: str) -> Job:
    """Return how the worker opens a file in LiteRT, which computes the images of a batch one after the other."""
    return {"runner": "litert", "path": str(path)}


ARM64 = Wheel("ai-edge-litert", "2.3.0", {
    "3.11": "853fc608f96da87bd5f3458465dfb9abbf18d5ae6b94eceacead407146f175ae",
    "3.12": "9891611b23a87cc2ace60e4b5ee9a2ee6f0fb7f395f009470961ae6e6310e1b8",
    "3.13": "2ab71e4f5dfa65b3882634b42755f455f3e7415630d720200bd792733e15e257",
})  # fmt: skip

LITERT = Backend(
    name="litert",
    title="LiteRT",
    suffix=".tflite",
    help="Write a verified LiteRT (TensorFlow Lite) file for Android and iOS.",
    timings={
        "litert": Timing("the file of `shvit export litert` in LiteRT", "fp32", "fp32"),
        "litert-int8": Timing("the same in int8", "int8", "int8"),
    },
    job=job,
    delegation=lambda path: Delegation(*delegation(path)),
    packages=("ai_edge_litert", "litert_torch", "ai_edge_quantizer"),
    extra="litert",
    precisions=("fp32", "fp16", "int8"),
    precision_help="Weight and compute precision. fp16 halves the file: phones' GPUs compute in float16, and CPUs in "
    "float32 unless they are asked for float16.",
    compared=("fp32", "fp16", "int8"),
    calibrated="int8",
    options=LitertOptions,
    all_options=LitertOptions(),
    create_writer=create_writer,
    load=load,
    load_rounded=load_rounded,
    inspect=inspect,
    float_stem=True,
    environment=HUGE_PAGES,
    arm64=Arm64Build((ARM64,), "ai_edge_litert.interpreter"),
)
