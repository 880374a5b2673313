"""ncnn: how a model is written, loaded and run: F.ncnn.param (the graph), F.ncnn.bin (weights), F.ncnn.json (its spec).

ncnn's converter, pnnx, is a program, which runs in a process of its own.
"""

import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from shvit.documents import load_json, parse_json, parse_model, to_json
from shvit.errors import InputError
from shvit.files import is_there, scratch_folder
from shvit.fold import DeployedSHSA
from shvit.terminal import quiet

from ..formats.ncnn import (
    LARGEST,
    RoundedNcnn,
    extract,
    holds_weight,
    input_names,
    input_scales,
    layer_parameters,
    open_net,
    operators,
    output_names,
    quantize,
    read_graph,
    read_tensors,
    read_weights,
    round_weights,
    separate_activations,
    take_layers,
    to_mat,
    to_planes,
    try_model,
)
from ..formats.ncnn_param import Layer, format_param, parse_param
from ..formats.rounding import HALVES, Outputs, join
from ..guards import Port, check_ports
from ..metadata import INPUT, SPEC_KEY, describe, labels_from, ranges_from, spec_from
from ..quantization.ranges import Range
from ..spec import Spec
from ..wrappers import Normalized, Tupled, layers, with_attention
from .backend import (
    HUGE_PAGES,
    Arm64Build,
    Artifact,
    Backend,
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
    from ncnn import Extractor, Net

AGAIN = "export the model again"
POINTWISE_KEY = "ncnn.pointwise"  # convolutions of the model that became linear layers, as they see one pixel
MAX_SECONDS = 900  # of pnnx; S4 takes 10
SAME = 1e-5  # of a layer's largest weight: folding may have moved it by that
WIDTH, HEIGHT, CHANNELS = 0, 1, 2  # options of a layer of the type Input


# --- write ------------------------------------------------------------------------------------------------------------


class GroupedSHSA(DeployedSHSA):
    """Attention whose norm is GroupNorm: ncnn computes a LayerNorm over (P, H, W) wrongly, without a word.

    Means and products in place of a norm are right too, and as fast (S1, 224 px), in 307 layers instead of 235.
    """

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 1, eps=self.eps)


def create_writer(source: Source, options: "NcnnOptions") -> Writer:
    """Return a function that writes models."""
    int8 = source.spec.precision == "int8"
    model = source.unfolded() if int8 else source.deployed()
    learned = source.ranges(symmetric=True) if int8 else {}
    ranges = {name: each.input for name, each in learned.items()}
    return lambda path, spec: write_ncnn(model, path, spec, source.labels, ranges)


def write_ncnn(
    model: nn.Module, path: Path, spec: Spec, labels: Sequence[str] = (), ranges: Mapping[str, Range] | None = None
) -> None:
    """Write a deployed model as F.ncnn.param, F.ncnn.bin and F.ncnn.json.

    In fp16 and bf16 weights are stored in float16. bf16 is asked of the runtime, as by `shvit`, who reads the spec.

    Args:
        path: the .param; the caller moves all three files into place.
        ranges: of int8, the symmetric range of each layer's input.

    Raises:
        InputError: the model has operations that ncnn has not.
    """
    with scratch_folder() as folder:
        graph, weights = _convert(_trace(model, spec), spec, folder)
    names, pointwise = _match(graph, weights, model)
    if spec.precision in HALVES:
        weights = round_weights(graph, weights, torch.float16, kept=torch.float16)
    graph = [_in_float32(_named(layer, names, spec)) for layer in graph]
    ranges = {name: each for name, each in (ranges or {}).items() if name not in spec.excluded_layers and each[1] > 0}
    if spec.precision == "int8":
        graph, weights = quantize(graph, weights, {name: high for name, (_, high) in ranges.items()})
    path.write_text(format_param(graph), encoding="utf-8")
    path.with_suffix(".bin").write_bytes(weights)
    notes = {**describe(spec, labels, ranges), POINTWISE_KEY: to_json(pointwise)}
    path.with_suffix(".json").write_text(to_json(notes) + "\n", encoding="utf-8")


def _trace(model: nn.Module, spec: Spec) -> torch.jit.ScriptModule:
    model = with_attention(model, GroupedSHSA)
    if len(spec.outputs) > 1:
        model = Tupled(model)
    if spec.uint8_input:
        model = Normalized(model, spec, white=255)
    with torch.no_grad(), quiet():
        return torch.jit.trace(model.eval(), torch.rand(1, *spec.shape), check_trace=False)  # the file is compared


def _convert(traced: torch.jit.ScriptModule, spec: Spec, folder: Path) -> tuple[list[Layer], bytes]:
    """Return the graph and the weights that pnnx makes of a traced model."""
    import pnnx

    with quiet():
        torch.jit.save(traced, folder / "model.pt")
    shape = ",".join(map(str, (1, *spec.shape)))
    kinds = {"pnnxparam": "pnnx.param", "pnnxbin": "pnnx.bin", "pnnxpy": "pnnx.py", "pnnxonnx": "pnnx.onnx",
             "ncnnparam": "ncnn.param", "ncnnbin": "ncnn.bin", "ncnnpy": "ncnn.py"}  # fmt: skip
    files = [f"{option}={folder / name}" for option, name in kinds.items()]
    command = [pnnx.EXEC_PATH, str(folder / "model.pt"), f"inputshape=[{shape}]", "fp16=0", *files]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=MAX_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"{spec.model} cannot be converted to ncnn: pnnx does not end in {MAX_SECONDS} s") from None
    if done.returncode != 0 or not (folder / "ncnn.bin").exists():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise InputError(f"{spec.model} cannot be converted to ncnn: pnnx ends with status {done.returncode} "
                         f"({' '.join(last)[:200]})")  # fmt: skip
    graph, weights = (
        parse_param((folder / "ncnn.param").read_text(encoding="utf-8")),
        (folder / "ncnn.bin").read_bytes(),
    )
    if lacking := sorted({layer.type for layer in graph if not layer.type.isidentifier()}):  # torch.…, Tensor.…
        raise InputError(f"{spec.model} has operations that ncnn lacks: {', '.join(lacking)}; export it to ONNX")
    try:
        list(read_tensors(graph, weights))
    except ValueError as error:
        raise InputError(f"{spec.model} cannot be converted to ncnn: pnnx's file {error}") from error
    return graph, weights


def _match(graph: Sequence[Layer], weights: bytes, model: nn.Module) -> tuple[dict[str, str], list[str]]:
    """Return the model's names of layers by those of the file, told by their weights, and which became linear."""
    left = list(layers(model))
    names, pointwise = {}, []
    for layer, (weight, *_) in read_tensors(graph, weights):
        for place, (name, module) in enumerate(left if holds_weight(layer) else ()):
            own = torch.as_tensor(module.weight).detach().float().flatten()
            if own.shape == weight.value.shape and (own - weight.value).abs().max() <= SAME * own.abs().max():
                names[layer.name] = name
                if isinstance(module, nn.Conv2d) and layer.type == "InnerProduct":
                    pointwise.append(name)
                del left[place]
                break
    return names, pointwise


def _named(layer: Layer, names: Mapping[str, str], spec: Spec) -> Layer:
    """Return a layer with its module's name, and with the names of the model's input and outputs."""
    blobs = {"in0": INPUT, **{f"out{number}": name for number, name in enumerate(spec.outputs)}}
    inputs, outputs = (tuple(blobs.get(name, name) for name in each) for each in (layer.inputs, layer.outputs))
    options = dict(layer.options)
    if layer.type == "Input":
        channels, height, width = spec.shape
        options |= {WIDTH: str(width), HEIGHT: str(height), CHANNELS: str(channels)}
    return replace(layer, name=names.get(layer.name, layer.name), inputs=inputs, outputs=outputs, options=options)


FEATURES, NO_FP16_ARITHMETIC = 31, "1"  # the option of any layer that turns features of ncnn off for it


def _in_float32(layer: Layer) -> Layer:
    """Return a layer that ncnn computes wrongly in float16 such that it sums in float32.

    On ARM processors with float16 arithmetic, of a 3×3 depthwise convolution with stride 2 every column is wrong that
    is the second of a pair left over from fours: rows 1 and 2 of its last tap are read from row 0. Outputs 2 or 3 wide
    modulo 4 have one. Seen in ncnn 1.0.20261020; an S1 in fp16 has 13 dB by it at 96 px, and 48 without.
    """
    if layer.type != "ConvolutionDepthWise":
        return layer
    kernel, strides = {layer.int(1), layer.int(11, layer.int(1))}, {layer.int(3, 1), layer.int(13, layer.int(3, 1))}
    wrong = kernel == {3} and strides == {2}
    return replace(layer, options={**layer.options, FEATURES: NO_FP16_ARITHMETIC}) if wrong else layer


# --- run --------------------------------------------------------------------------------------------------------------


def load(path: Path, threads: int | None) -> Artifact:
    """Load a model of `shvit export` in ncnn."""
    graph, notes = read_graph(path), _read_notes(path)
    spec, weights = spec_from(notes, path), read_weights(path, graph)
    pointwise = _pointwise(notes, path)
    names = output_names(graph)
    inputs = [Port(name, "uint8" if spec.uint8_input else "float32", None) for name in input_names(graph)]
    check_ports(path, spec, inputs, [Port(name, "float32", None) for name in names], INPUT)
    try_model(path, graph, spec.shape)
    net = open_net(graph, path.with_suffix(".bin"), threads, bf16=spec.precision == "bf16")
    return Artifact(
        path=path,
        spec=spec,
        runtime=NCNN.runtime,
        operators=operators(graph),
        run=partial(_run, net, names),
        run_layers=partial(_run_layers, path, threads, spec.precision == "bf16", pointwise),
        parameters=lambda: layer_parameters(graph, weights, pointwise),
        scale_faults=lambda: _scale_faults(ranges_from(notes, path), input_scales(graph, weights)),
        labels=labels_from(notes, path),
    )


def _scale_faults(learned: Mapping[str, Range], scales: Mapping[str, float]) -> list[str]:
    """Return the layers in int8 whose input is not rounded to the learned range, as sentences."""
    faults = []
    for name in sorted({*learned, *scales}):
        expected, actual = learned.get(name, (0.0, 0.0))[1], LARGEST / scales[name] if name in scales else math.inf
        if abs(actual / expected - 1) > SAME if expected else True:
            faults.append(f"the input of {name} is rounded up to {actual:.4g} in place of {expected:.4g}")
    return faults


def load_rounded(artifact: Artifact, threads: int | None) -> Artifact:
    """Return a half-precision artifact that rounds after each layer."""
    path, dtype = artifact.path, HALVES[artifact.spec.precision]
    pointwise = _pointwise(_read_notes(path), path)
    return apply_rounding(artifact, RoundedNcnn(read_graph(path), path.with_suffix(".bin"), dtype, threads, pointwise))


def _read_notes(path: Path) -> dict[str, str]:
    """Return what stands in the .json beside a .param; nothing where there is none."""
    file = path.with_suffix(".json")
    return parse_model(dict[str, str], load_json(file), str(file), AGAIN) if is_there(file) else {}


def _pointwise(notes: Mapping[str, str], path: Path) -> list[str]:
    return parse_model(list[str], parse_json(notes.get(POINTWISE_KEY, "[]"), str(path)), str(path), AGAIN)


def _run(net: "Net", names: Sequence[str], batch: torch.Tensor) -> Outputs:
    """Return all outputs; ncnn takes one image at a time."""
    return join([[extract(extractor, name)[None] for name in names] for extractor in _extractors(net, batch)])


def _run_layers(
    path: Path, threads: int | None, bf16: bool, pointwise: Sequence[str], batch: torch.Tensor
) -> dict[str, torch.Tensor]:
    graph = separate_activations(read_graph(path))
    net = open_net(graph, path.with_suffix(".bin"), threads, bf16, keep=True)
    parts = [take_layers(graph, partial(extract, each), pointwise) for each in _extractors(net, batch)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _extractors(net: "Net", batch: torch.Tensor) -> Iterator["Extractor"]:
    """Yield what computes the blobs of each image."""
    for image in to_planes(batch):
        extractor = net.create_extractor()
        mat = to_mat(image)
        extractor.input(INPUT, mat)
        yield extractor


def inspect(path: Path) -> ImageInput:
    """Return the image input of any .param that tells its size."""
    graph, notes = read_graph(path), _read_notes(path)
    read_weights(path, graph)
    precision = spec_from(notes, path).precision if SPEC_KEY in notes else "fp32"
    inputs = [layer for layer in graph if layer.type == "Input"]
    sizes = [[1, *(each.int(key) or None for key in (CHANNELS, HEIGHT, WIDTH))] for each in inputs]
    return image_input(path, sizes, precision)


# --- the backend ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NcnnOptions(FormatOptions):
    """Options of ncnn's models, which take one image."""

    raw_pixels: bool = False
    """Take RGB from 0 to 255, as `ncnn::Mat::from_pixels` gives it, and normalize inside; normalized by default."""

    def complete(self, spec: Spec) -> Spec:
        return with_pixel_input(spec, self.raw_pixels)


def job(path: Path, batch_size: int, precision: str, compute_units: str) -> Job:
    """Return how the worker opens a model in ncnn, which computes the images of a batch one after the other."""
    layer = next(each for each in read_graph(path) if each.type == "Input")
    shape = [layer.int(key) for key in (CHANNELS, HEIGHT, WIDTH)]
    names = [layer.outputs[0], *output_names(read_graph(path))]
    halves = {each: precision == each for each in ("fp16", "bf16")}
    return {"runner": "ncnn", "path": str(path), **halves, "shape": shape, "names": names}


ARM64 = Wheel("ncnn", "1.0.20261020", {
    "3.11": "0503da4f3960ee2e555feef55db13adffd6c62eb59a4bd22f8083b12d1757ad8",
    "3.12": "6dc5b1f38953ee91b84e4600707609feed652230d21753b7d8915f3738f9b7a8",
    "3.13": "63b22234f384ff98883428f081b06f115eb40732733ce2dd02a691359239f746",
})  # fmt: skip

NCNN = Backend(
    name="ncnn",
    title="ncnn",
    suffix=".param",
    inner_suffix=".ncnn",
    companions=(".bin", ".json"),
    help="Write a verified ncnn model, F.ncnn.param, F.ncnn.bin and F.ncnn.json, for Android and iOS.",
    timings={
        "ncnn": Timing("the files of `shvit export ncnn` in ncnn", "fp32", "fp32"),
        "ncnn-int8": Timing("the same in int8", "int8", "int8"),
        "ncnn-bf16": Timing("the same with values stored in bfloat16", "bf16", "bf16"),
    },
    job=job,
    packages=("ncnn", "pnnx"),
    extra="ncnn",
    precisions=("fp32", "fp16", "bf16", "int8"),
    precision_help="Weight and compute precision. fp16 and bf16 halve the file; phones compute fp16 in float16, and "
    "bf16 is asked of the runtime. int8 rounds to symmetric levels.",
    compared=("fp32", "fp16", "int8"),
    calibrated="int8",
    options=NcnnOptions,
    all_options=NcnnOptions(),
    create_writer=create_writer,
    load=load,
    load_rounded=load_rounded,
    inspect=inspect,
    environment=HUGE_PAGES,
    arm64=Arm64Build((ARM64,), "ncnn"),
)
