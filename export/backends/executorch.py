"""ExecuTorch: how a program for XNNPACK (F.pte) is written, loaded and run. It holds its spec and labels itself."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from shvit.documents import parse_json, parse_model, to_json
from shvit.errors import InputError, refuse
from shvit.fold import DeployedSHSA
from shvit.terminal import quiet

from ..formats.executorch import (
    NOTES,
    Program,
    check_delegates,
    input_steps,
    open_module,
    ports,
    program_parameters,
    read_program,
)
from ..formats.executorch_evaluator import Evaluator, UnknownOperation
from ..formats.parameters import LayerParameters, range_faults
from ..formats.rounding import HALVES, Outputs, join
from ..guards import check_ports, one_line, run_trial
from ..metadata import INPUT, SPEC_KEY, describe, labels_from, ranges_from, spec_from
from ..quantization.pt2 import layer_names, quantize_program
from ..quantization.qdq import LayerRanges
from ..quantization.ranges import Range
from ..spec import Spec
from ..wrappers import ChannelsLast, Half, Normalized, Tupled, layers, with_attention
from .backend import (
    HUGE_PAGES,
    Arm64Build,
    Artifact,
    Backend,
    Delegation,
    FormatOptions,
    ImageInput,
    Job,
    Library,
    Source,
    Timing,
    Wheel,
    Writer,
    apply_rounding,
    image_input,
    with_pixel_input,
)

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner
    from executorch.extension.pybindings._C import ExecuTorchModule
    from torch.export import ExportedProgram

AGAIN = "export the model again"
Delegate = Literal["xnnpack", "coreml", "vulkan"]
LAYERS_KEY = "executorch.layers"  # names of the convolutions and linear layers in the order of computation
SAME = 1e-5  # of a layer's largest weight: folding may have moved it by that


# --- write ------------------------------------------------------------------------------------------------------------


class XnnpackSHSA(DeployedSHSA):
    """Attention of operators that XNNPACK has, so that the whole network is one delegate.

    It has no LayerNorm and no split, and takes means over the last two dimensions of four alone.
    """

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 1, self.partial_dim, x.shape[2] * x.shape[3])  # (B, 1, P, N)
        flat = flat - flat.mean((2, 3), keepdim=True)
        flat = flat * torch.rsqrt((flat * flat).mean((2, 3), keepdim=True) + self.eps)
        return flat.reshape(x.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        P, D = self.partial_dim, self.qk_dim
        x1, x2 = x[:, :P], x[:, P:]  # (B, P, H, W) (B, C-P, H, W)
        qkv = self.qkv(self._normalize(x1))
        q, k, v = (part.flatten(2) for part in (qkv[:, :D], qkv[:, D : 2 * D], qkv[:, 2 * D :]))
        # (B, D, N) (B, D, N) (B, P, N)
        attn = torch.bmm(q.transpose(1, 2), k).softmax(dim=-1)  # (B, N, N)
        x1 = self._to_grid(torch.bmm(v, attn.transpose(1, 2)), x1)  # (B, P, H, W)
        return self.proj(self.act(torch.cat([x1, x2], dim=1)))


class Pixels(ChannelsLast):
    """The model behind (B, H, W, C) uint8, converted and transposed so that all that follows is contiguous."""

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        return self.model(x.float().permute(0, 3, 1, 2).contiguous())


def create_writer(source: Source, options: "ExecutorchOptions") -> Writer:
    """Return a function that writes programs."""
    int8 = source.spec.precision == "int8"
    model = source.unfolded() if int8 else source.deployed()
    ranges = source.ranges() if int8 else {}
    return lambda path, spec: write_executorch(model, path, spec, source.labels, ranges)


def write_executorch(
    model: nn.Module,
    path: Path,
    spec: Spec,
    labels: Sequence[str] = (),
    ranges: Mapping[str, LayerRanges] | None = None,
) -> None:
    """Write a deployed model as a program, which takes one image.

    With fp16 arithmetic is float16, behind a float32 input and output; XNNPACK's weights are in float32 even so.

    Args:
        path: the caller moves it into place.
        ranges: of int8, those of each layer.

    Raises:
        InputError: the model cannot be exported.
    """
    program = _trace(model, spec)
    names = layer_names(program.graph)
    learned = {name: each for name, each in (ranges or {}).items() if name not in spec.excluded_layers}
    rounded: dict[str, Range] = {}
    if spec.precision == "int8":
        program, rounded = quantize_program(program, learned)
    for _ in range(2):  # partitions may be in another order than the operations were traced in
        notes = {**describe(spec, labels, rounded), LAYERS_KEY: to_json(names)}
        path.write_bytes(_lower(program, to_json(notes), spec))
        found = _match(read_program(path), model, spec)
        if found == names:
            return
        names = found


def _trace(model: nn.Module, spec: Spec) -> "ExportedProgram":
    from torch.export import export

    model = with_attention(model, XnnpackSHSA)
    batch = spec.blank()
    if spec.precision == "fp16":
        model = Half(model)
    if len(spec.outputs) > 1:
        model = Tupled(model)
    if spec.uint8_input:
        model = Pixels(Normalized(model, spec, white=255))
        batch = batch.permute(0, 2, 3, 1).contiguous().to(torch.uint8)  # as apps give it
    with torch.no_grad(), quiet(), one_line(spec.model, "cannot be converted to ExecuTorch"):
        return export(model.eval(), (batch,))


def _lower(program: "ExportedProgram", note: str, spec: Spec, delegate: Delegate = "xnnpack") -> bytes:
    """Return the program's file, with what the delegate can compute in its graphs."""
    with quiet(), one_line(spec.model, f"cannot be converted to ExecuTorch for {delegate}"):
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[_partitioner(delegate, spec)],
            compile_config=config,
            constant_methods={NOTES: note},
        )
        return bytes(edge.to_executorch().buffer)


def _partitioner(delegate: Delegate, spec: Spec) -> "Partitioner":
    half = spec.precision == "fp16"
    if delegate == "coreml":
        import coremltools as ct
        from executorch.backends.apple.coreml.compiler import CoreMLBackend
        from executorch.backends.apple.coreml.partition import CoreMLPartitioner

        precision = ct.precision.FLOAT16 if half else ct.precision.FLOAT32
        compile_specs = CoreMLBackend.generate_compile_specs(
            compute_precision=precision, minimum_deployment_target=ct.target.iOS16
        )
        return CoreMLPartitioner(compile_specs=compile_specs)
    if delegate == "vulkan":
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

        return VulkanPartitioner({"force_fp16": half})
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


def create_extras(source: Source, options: "ExecutorchOptions") -> dict[str, Callable[[Path], str]]:
    """Return what writes the programs for other delegates, F.coreml.pte and F.vulkan.pte."""
    return {f".{delegate}.pte": partial(write_delegated, source.deployed(), source.spec, source.labels, delegate)
            for delegate in options.also}  # fmt: skip


def write_delegated(model: nn.Module, spec: Spec, labels: Sequence[str], delegate: Delegate, path: Path) -> str:
    """Write a program for a delegate that is not run here, and return what is computed where."""
    single = replace(spec, precision="fp32")  # the delegate itself computes in float16 where that is asked for
    path.write_bytes(_lower(_trace(model, single), to_json(describe(spec, labels)), spec, delegate))
    program = read_program(path)
    delegates = ", ".join(f"{count} {name}" for name, count in Counter(program.delegates()).items()) or "no delegate"
    kernels = ", ".join(f"{count} {name}" for name, count in program.kernels().items()) or "nothing"
    return f"{delegates}; outside of it {kernels}"


def _match(program: Program, model: nn.Module, spec: Spec) -> list[str]:
    """Return the model's name of each layer of a file, told by its weights; empty for those that are none of it."""
    left, names = list(layers(model)), []
    for parameters in program_parameters(program, HALVES.get(spec.precision)):
        place = next((place for place, (_, module) in enumerate(left) if _same(parameters, module)), None)
        names.append("" if place is None else left.pop(place)[0])
    return names


def _same(parameters: LayerParameters, module: nn.Module) -> bool:
    own, (value, rounding) = torch.as_tensor(module.weight).detach().float(), parameters.weight
    return own.shape == value.shape and bool(((own - value).abs() <= 1.02 * rounding + SAME * own.abs().max()).all())


# --- run --------------------------------------------------------------------------------------------------------------


def load(path: Path, threads: int | None) -> Artifact:
    """Load a program of `shvit export` in ExecuTorch."""
    program = read_program(path)
    notes = _notes(program, path)
    spec = spec_from(notes, path)
    check_ports(path, spec, ports(program, "inputs", [INPUT]), ports(program, "outputs", spec.outputs), INPUT)
    check_delegates(path, program)
    dtype, operators = HALVES.get(spec.precision), program.operators()  # which reads all graphs
    names = _names(notes, program, path)
    run_trial(path, "executorch", [str(path.resolve())], [path])
    return Artifact(
        path=path,
        spec=spec,
        runtime=EXECUTORCH.runtime,
        operators=operators,
        run=partial(_run, open_module(path, threads)),
        run_layers=partial(_run_layers, program, names),
        parameters=lambda: dict(zip(names, program_parameters(program, dtype), strict=True)),
        scale_faults=lambda: _scale_faults(ranges_from(notes, path), program, names),
        labels=labels_from(notes, path),
    )


def _scale_faults(learned: Mapping[str, Range], program: Program, names: Sequence[str]) -> list[str]:
    """Return what contradicts the learned ranges, as sentences."""
    steps = {name: each for name, each in zip(names, input_steps(program), strict=True) if name and each is not None}
    unrounded = [f"the input of {name} is not rounded" for name in sorted(learned.keys() - steps.keys())]
    return [*unrounded, *range_faults(learned, steps)]


def load_rounded(artifact: Artifact, threads: int | None) -> Artifact:
    """Return a half-precision artifact that rounds after each operation."""
    program = read_program(artifact.path)
    evaluator = Evaluator(program, _names(_notes(program, artifact.path), program, artifact.path))
    return apply_rounding(artifact, evaluator)


def _notes(program: Program, path: Path) -> dict[str, str]:
    """Return what a program says of itself; nothing where it is not one of ours."""
    note = program.note()
    return {} if note is None else parse_model(dict[str, str], parse_json(note, str(path)), str(path), AGAIN)


def _names(notes: Mapping[str, str], program: Program, path: Path) -> list[str]:
    names = parse_model(list[str], parse_json(notes.get(LAYERS_KEY, "[]"), str(path)), str(path), AGAIN)
    if len(names) != (count := len(input_steps(program))):
        raise InputError(f"{path}: names {len(names)} layers, and has {count}; {AGAIN}")
    return names


def _run(module: "ExecuTorchModule", batch: torch.Tensor) -> Outputs:
    """Return all outputs; a program takes one image at a time."""
    outputs = (module.forward([image.contiguous()]) for image in batch.split(1))
    return join([[each.float() for each in image] for image in outputs])


def _run_layers(program: Program, names: Sequence[str], batch: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Return the layers' outputs as our evaluator computes them; none where it lacks an operation of the file."""
    try:
        return Evaluator(program, names).run_layers(batch)
    except UnknownOperation:
        return {}


def inspect(path: Path) -> ImageInput:
    """Return the image input of any program."""
    program = read_program(path)
    check_delegates(path, program)
    notes = _notes(program, path)
    precision = spec_from(notes, path).precision if SPEC_KEY in notes else "fp32"
    shapes = [shape for _, shape in program.ports("inputs")]
    if program.ports("inputs") and program.ports("inputs")[0][0] not in ("uint8", "float16", "float32"):
        raise InputError(f"{path}: takes {program.ports('inputs')[0][0]}; only images are timed here")
    return image_input(path, shapes, precision)


# --- the backend ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExecutorchOptions(FormatOptions):
    """Options of ExecuTorch's programs, which take one image."""

    raw_pixels: bool = False
    """Take RGB pixels, uint8 (1, H, W, C), and normalize them inside; a normalized float32 (1, C, H, W) by default."""

    also: tuple[Literal["coreml", "vulkan"], ...] = ()
    """Further delegates to write programs for, F.coreml.pte and F.vulkan.pte.
    They are not run here: the certificate is that of F.pte alone, and names what each delegate takes."""

    def complete(self, spec: Spec) -> Spec:
        if spec.precision == "int8":
            refuse("int8 is rounded in the form that XNNPACK takes", also=self.also)
        if "coreml" in self.also:
            refuse("Core ML's delegate takes no uint8", raw_pixels=self.raw_pixels)
        return with_pixel_input(spec, self.raw_pixels)


def job(path: Path, batch_size: int, precision: str, compute_units: str) -> Job:
    """Return how the worker opens a program, which computes the images of a batch one after the other."""
    program = read_program(path)
    (dtype, shape), *_ = program.ports("inputs")
    return {"runner": "executorch", "path": str(path), "shape": list(shape), "dtype": dtype}


def delegation(path: Path) -> Delegation:
    """Return how many delegates a program has, and the kernels that it calls besides."""
    program = read_program(path)
    return Delegation(len(program.delegates()), program.kernels())


ARM64 = Wheel("executorch", "1.5.1", {
    "3.11": "8ee02348a3ea80ddf770822911ebf78da616b73afce0fbaaa79f23311c88c66a",
    "3.12": "2c177f7922354a8a0d6111628c954519b87549598640e5e0042bef137b4cb83c",
    "3.13": "685a8d85b319fc99f2611a5e0ecf598755a91cf5d39a536e057dea60cd8e9682",
})  # fmt: skip
LIBRARY = Library("executorch_arm64.cpp", (
    "-std=c++17",
    # what ExecuTorch's CMake files ask for
    "-DC10_USING_CUSTOM_GENERATED_MACROS",
    "-DET_EVENT_TRACER_ENABLED",
    "-isystemexecutorch/include",
    "-isystemexecutorch/include/executorch/runtime/core/portable_type/c10",
    "-Lexecutorch/lib",
    "-Wl,-rpath,$ORIGIN/executorch/lib",
    "-Wl,--no-as-needed",  # kernels and delegates are not called: they register themselves when they are loaded
    *(f"-l{each}" for each in (
        "executorch", "executorch_kernels_optimized", "executorch_backend_xnnpack", "executorch_threadpool"
    )),
))  # fmt: skip
"""The wheel's Python binding needs PyTorch, whose wheel for ARM64 Linux has 454 MB."""

EXECUTORCH: Backend[Any] = Backend(
    name="executorch",
    title="ExecuTorch",
    suffix=".pte",
    help="Write a verified ExecuTorch program for XNNPACK, F.pte, for Android and iOS.",
    timings={
        "executorch": Timing("the file of `shvit export executorch` in ExecuTorch, XNNPACK", "fp32", "fp32"),
        "executorch-int8": Timing("the same in int8", "int8", "int8"),
        "executorch-fp16": Timing("the same in float16 arithmetic", "fp16", "fp16"),
    },
    job=job,
    delegation=delegation,
    packages=("executorch",),
    extra="executorch",
    precisions=("fp32", "fp16", "int8"),
    precision_help="Weight and compute precision. fp16 computes in float16, and keeps the file as large as fp32.",
    compared=("fp32", "fp16", "int8"),
    calibrated="int8",
    options=ExecutorchOptions,
    all_options=ExecutorchOptions(),
    create_writer=create_writer,
    create_extras=create_extras,
    load=load,
    load_rounded=load_rounded,
    inspect=inspect,
    float_stem=True,
    float_head=True,
    environment=HUGE_PAGES,
    arm64=Arm64Build((ARM64,), LIBRARY),
)
