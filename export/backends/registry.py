"""A model or an artifact as a function from a batch to its outputs, with a fixed number of threads."""

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import natural_key
from torch import nn

from shvit.certificate import check_unchanged
from shvit.errors import InputError, first_line
from shvit.files import check_file, is_there, sha256
from shvit.train.evaluate import Predict

from ..guards import Port, check_ports, checked_run, finite, guarded, one_line, rows_that_fit
from ..metadata import INPUT, labels_from, ranges_from, spec_from
from ..spec import Spec
from .onnx import LAYERS, check_graph, metadata, operators, read_onnx
from .parameters import (
    LayerParameters,
    coreml_parameters,
    coreml_scale_faults,
    coreml_steps,
    onnx_parameters,
    onnx_scale_faults,
    onnx_steps,
    openvino_parameters,
    openvino_scale_faults,
    openvino_steps,
    range_faults,
)

Outputs = tuple[torch.Tensor, ...]


def torch_predict(model: nn.Module) -> Predict:
    """PyTorch, eager; set the number of threads with `torch.set_num_threads`."""

    def predict(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(batch)

    return predict


@dataclass(frozen=True)
class Artifact:
    """An exported file, opened."""

    path: Path
    spec: Spec
    runtime: str
    operators: dict[str, int]
    """How many of each, most frequent first."""
    run: Callable[[torch.Tensor], Outputs]
    """What `spec.feed` makes → what `spec.outputs` names."""
    run_layers: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
    """What `spec.feed` makes → what each convolution and linear layer gives, by its dotted name where it is known."""
    parameters: Callable[[], Mapping[str, LayerParameters]]
    """The weights that each of these layers computes with."""
    scale_faults: Callable[[], list[str]]
    """Scales of 8-bit tensors that do not belong together, each as a sentence."""
    labels: Sequence[str] = ()
    """Names of the classes that the file holds."""
    largest_values: Callable[[], Mapping[str, float]] = dict
    """Of a file in half precision that is judged: the largest value seen in each operation, by its name."""
    overflow: Callable[[], str | None] = lambda: None
    """The first operation of such a file whose result did not fit its precision, in the runs so far."""
    run_as_usual: Callable[[torch.Tensor], Outputs] | None = None
    """`run` with the runtime's own settings, where `run` has others that keep 8-bit sums from overflowing."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W), from `spec.transform(normalize=False)` → its first output, logits (B, classes) mostly.

        Raises:
            InputError: it does not run, or gives something that is no prediction.
        """
        parts = pixels.split(rows_that_fit(max(len(pixels), 1), self.spec))
        return finite(self.path, torch.cat([self.run(self.spec.feed(part))[0] for part in parts]))


def open_artifact(path: Path, threads: int | None = None, native: bool = False, rounded: bool = False) -> Artifact:
    """A file of `shvit export`, by its suffix, in the runtime for it.

    Args:
        threads: of ONNX Runtime and OpenVINO; their choice (all cores) where None.
        native: run a Core ML package in Core ML, which is part of macOS, in place of `mil`.
        rounded: compute half precision in half precision, rounding after each operation, whatever the processor has:
            on a CPU the runtimes compute it in float32. For judging; it is slow.

    Raises:
        InputError: a suffix that no runtime here runs, no such file, one that cannot be read, or no Core ML.
    """
    _check_suffix(path)
    with one_line(path, "cannot be opened"):
        artifact = OPENERS[path.suffix](path, threads)
        if native:
            artifact = _in_coreml(artifact)
        elif rounded and artifact.spec.precision in HALVES:
            artifact = _rounded(artifact, threads)
    return _guarded(artifact)


def _guarded(artifact: Artifact) -> Artifact:
    """The same file; what its runtime raises is one line, and its outputs are those that it says it gives."""
    path, spec = artifact.path, artifact.spec
    usual = artifact.run_as_usual
    return replace(
        artifact,
        run=checked_run(artifact.run, path, spec),
        run_layers=guarded(artifact.run_layers, path),
        parameters=guarded(artifact.parameters, path, "its weights cannot be read"),
        scale_faults=guarded(artifact.scale_faults, path, "its scales cannot be read"),
        run_as_usual=None if usual is None else checked_run(usual, path, spec),
    )


HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Precisions that are narrower than what CPUs compute in."""
SHOWN_VALUES = 3


def _rounded(artifact: Artifact, threads: int | None) -> Artifact:
    """The same file in its own precision; `mil` rounds by itself."""
    from .openvino import read_openvino
    from .rounding import RoundedOnnx, RoundedOpenvino

    dtype = HALVES[artifact.spec.precision]
    if artifact.path.suffix == ".mlpackage":
        return artifact
    if artifact.path.suffix == ".onnx":
        engine: Any = RoundedOnnx(read_onnx(artifact.path), threads)
    else:
        engine = RoundedOpenvino(read_openvino(artifact.path)[0], dtype, threads)
    return replace(
        artifact,
        runtime=f"{artifact.runtime}, {str(dtype).removeprefix('torch.')} after each operation",
        run=engine.run,
        run_layers=engine.run_layers,
        largest_values=lambda: engine.nearest(SHOWN_VALUES),
        overflow=lambda: engine.overflow,
    )


def _check_suffix(path: Path) -> None:
    if path.suffix not in OPENERS:
        raise InputError(f"{path}: unknown artifact {path.suffix!r}; choose from {', '.join(OPENERS)}")


def artifact_files(path: Path) -> list[Path]:
    """The files or folders that an artifact consists of."""
    return [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]


def artifact_sha256(path: Path) -> str:
    """Of its file; of two, of their digests one after the other."""
    digests = [sha256(file) for file in artifact_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def refuse_changed(path: Path) -> None:
    """Raises CheckFailed if a file is not the one that its certificate is of; called before anything reads it.

    Raises:
        InputError: a suffix that no runtime here runs, such as that of a folder of anything, which is not hashed.
    """
    _check_suffix(path)
    if all(is_there(file) for file in artifact_files(path)):
        check_unchanged(path, artifact_sha256(path))


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def _open_onnx(path: Path, threads: int | None) -> Artifact:
    proto = read_onnx(path)
    spec = spec_from(metadata(proto), path)
    check_graph(proto, path)
    session = onnx_session(path, threads)
    check_ports(path, spec, _ports(session.get_inputs()), _ports(session.get_outputs()), INPUT)

    def run_as_usual(batch: torch.Tensor) -> Outputs:
        return _run_onnx(onnx_session(path, threads, exact=False), batch)

    return Artifact(
        path,
        spec,
        "onnxruntime",
        operators(proto),
        lambda batch: _run_onnx(session, batch),
        lambda batch: _run_onnx_layers(path, threads, batch),
        lambda: onnx_parameters(proto),
        lambda: [*onnx_scale_faults(proto), *range_faults(ranges_from(metadata(proto), path), onnx_steps(proto))],
        labels_from(metadata(proto), path),
        run_as_usual=run_as_usual if spec.precision == "int8" else None,
    )


ONNX_TYPES = {"float": "float32", "double": "float64"}
"""ONNX Runtime's words for types that others call otherwise."""


def _ports(arguments: Sequence[Any]) -> list[Port]:
    """What a session takes or gives."""
    ports = []
    for each in arguments:
        inner = each.type.removeprefix("tensor(").removesuffix(")") if each.type.startswith("tensor(") else each.type
        lengths = tuple(length if isinstance(length, int) else None for length in each.shape)
        ports.append(Port(each.name, ONNX_TYPES.get(inner, inner), lengths or None))
    return ports


def onnx_session(source: Path | bytes, threads: int | None = None, exact: bool = True) -> Any:
    """ONNX Runtime on the CPU.

    Args:
        source: a file, or its content.
        threads: of one operator; ONNX Runtime's choice (all cores) where None.
        exact: have 8-bit sums right on every processor. By default x86 without VNNI adds up pairs of products in 16
            bits, which overflow.

    Raises:
        InputError: the file is not there or ONNX Runtime refuses it.
    """
    import onnxruntime

    name = source if isinstance(source, Path) else "the ONNX file"
    if isinstance(source, Path):
        check_file(source)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(
            str(source) if isinstance(source, Path) else source, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own exception types are not public
        raise InputError(f"{name}: ONNX Runtime cannot open it ({first_line(error)})") from error


def _run_onnx(session: Any, batch: torch.Tensor) -> Outputs:
    """All outputs; a file with a fixed batch of 1 is fed one image after the other."""
    chunks = batch.split(1) if session.get_inputs()[0].shape[0] == 1 else (batch,)
    return _joined([session.run(None, {INPUT: chunk.numpy()}) for chunk in chunks])


def _joined(outputs: Sequence[Sequence[Any]]) -> Outputs:
    """Outputs of several batches as those of one."""
    return tuple(torch.cat([torch.from_numpy(part) for part in parts]) for parts in zip(*outputs, strict=True))


def _run_onnx_layers(path: Path, threads: int | None, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    import onnx

    proto = read_onnx(path)
    found = {node.output[0]: node.name for node in proto.graph.node if node.op_type in LAYERS}
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in found)
    outputs = _run_onnx(onnx_session(proto.SerializeToString(), threads), batch)
    return {name: output.float() for name, output in zip(found.values(), outputs, strict=True)}


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


def _open_openvino(path: Path, threads: int | None) -> Artifact:
    from .openvino import check_model, compile_openvino, read_openvino, saturates
    from .openvino import operators as operations

    model, said = read_openvino(path)
    spec = spec_from(said, path)
    check_model(model, path)
    check_ports(path, spec, _openvino_ports(model.inputs), _openvino_ports(model.outputs), INPUT)
    compiled = compile_openvino(model, spec.precision, threads)

    def scale_faults() -> list[str]:
        whole, _ = read_openvino(path)
        return [*openvino_scale_faults(whole), *range_faults(ranges_from(said, path), openvino_steps(whole))]

    def run_as_usual(batch: torch.Tensor) -> Outputs:
        return _run_openvino(compile_openvino(model, spec.precision, threads, exact=False), batch)

    return Artifact(
        path,
        spec,
        "openvino",
        operations(model),
        lambda batch: _run_openvino(compiled, batch),
        lambda batch: _run_openvino_layers(path, spec, threads, batch),
        lambda: openvino_parameters(read_openvino(path)[0]),
        scale_faults,
        labels_from(said, path),
        run_as_usual=run_as_usual if spec.precision == "int8" and saturates() else None,
    )


OPENVINO_TYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "u8": "uint8"}
"""OpenVINO's words for types."""


def _openvino_ports(ports: Sequence[Any]) -> list[Port]:
    """What a model takes or gives."""
    found = []
    for port in ports:
        kind, shape = port.element_type.get_type_name(), port.partial_shape
        lengths = [dim.get_length() if dim.is_static else None for dim in shape] if shape.rank.is_static else None
        name = port.any_name if port.names else port.node.get_friendly_name()
        found.append(Port(name, OPENVINO_TYPES.get(kind, kind), None if lengths is None else tuple(lengths)))
    return found


def _run_openvino(compiled: Any, batch: torch.Tensor) -> Outputs:
    """All outputs; a file with a fixed batch of 1 is fed one image after the other."""
    rows = compiled.input(0).partial_shape[0]
    chunks = batch.split(1) if rows.is_static and rows.get_length() == 1 else (batch,)
    names = range(len(compiled.outputs))
    results = (compiled(chunk.numpy()) for chunk in chunks)
    return _joined([[result[name].copy() for name in names] for result in results])


def _run_openvino_layers(path: Path, spec: Spec, threads: int | None, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Bias included: the operation that bears a layer's name is the last of those that it became."""
    from .openvino import compile_openvino, read_openvino

    model, _ = read_openvino(path)
    for op in model.get_ordered_ops():
        if op.get_type_name() in ("Add", "Convolution", "GroupConvolution"):
            model.add_outputs(op.output(0))
    names = [output.get_node().input_value(0).get_node().get_friendly_name() for output in model.outputs]
    outputs = _run_openvino(compile_openvino(model, spec.precision, threads, whole=False), batch)
    return dict(zip(names, outputs, strict=True))


# --- Core ML ----------------------------------------------------------------------------------------------------------


def _open_coreml(path: Path, threads: int | None) -> Artifact:
    """Through `mil`, which runs everywhere, with PyTorch's threads."""
    from ..mil.program import Package

    package = Package(path)
    spec = spec_from(package.metadata, path)
    check_ports(path, spec, *package.ports, INPUT)
    package.check_sizes(spec)
    package.half = spec.precision != "fp32"

    def run(batch: torch.Tensor) -> Outputs:
        return _by_name([package(**{INPUT: image}) for image in _images(spec, batch)], spec, labels)

    def run_layers(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        results = [package.layers(**{INPUT: image}) for image in _images(spec, batch)]
        return {name: torch.cat([result[name] for result in results]) for name in results[0]}

    labels = labels_from(package.metadata, path)
    if package.labels not in ((), labels):
        raise InputError(f"{path}: the labels that it gives are not those that it says it has; export the model again")
    return Artifact(
        path,
        spec,
        "mil",
        package.operators,
        run,
        run_layers,
        lambda: coreml_parameters(package),
        lambda: [
            *coreml_scale_faults(package),
            *range_faults(ranges_from(package.metadata, path), coreml_steps(package)),
        ],
        labels,
    )


def _in_coreml(artifact: Artifact) -> Artifact:
    """The same package in Core ML itself, on all of the machine's compute units; layers stay `mil`'s."""
    if artifact.path.suffix != ".mlpackage":
        raise InputError(f"{artifact.path}: Core ML runs .mlpackage alone; leave out --runtime coreml")
    if sys.platform != "darwin":
        raise InputError("--runtime coreml needs macOS, of which Core ML is a part; leave it out for our own evaluator")
    import coremltools as ct

    model, spec = ct.models.MLModel(str(artifact.path)), artifact.spec

    def run(batch: torch.Tensor) -> Outputs:
        given = (image if spec.uint8_input else image.numpy() for image in _images(spec, batch))
        return _by_name([model.predict({INPUT: image}) for image in given], spec, artifact.labels)

    return replace(artifact, runtime="coreml", run=run)


def _images(spec: Spec, batch: torch.Tensor) -> list[Any]:
    """What a package is given for each item of a batch: a PIL image, or a tensor (1, C, H, W)."""
    from PIL import Image

    return [Image.fromarray(item.squeeze(2).numpy()) if spec.uint8_input else item[None] for item in batch]


def _by_name(results: Sequence[Mapping[str, Any]], spec: Spec, labels: Sequence[str] = ()) -> Outputs:
    """The outputs that the spec names, of several images as a batch."""
    return tuple(torch.cat([_tensor(result[name], labels) for result in results]) for name in spec.outputs)


def _tensor(output: Any, labels: Sequence[str]) -> torch.Tensor:
    """An output as a batch of one; a classifier's probabilities come by label and, from Core ML, in no order.

    Raises:
        InputError: there are others than `labels`. Without any the order is that in which people count.
    """
    if not isinstance(output, dict):
        return torch.as_tensor(output)
    chances = {str(label): chance for label, chance in output.items()}
    labels = labels or sorted(chances, key=natural_key)
    if chances.keys() != set(labels):
        unlike = sorted(chances.keys() ^ set(labels))
        raise InputError(f"the classifier's labels are not those that its package tells: {', '.join(unlike[:4])} "
                         f"{'…' if len(unlike) > 4 else 'differ'}; export the model again")  # fmt: skip
    return torch.tensor([[chances[label] for label in labels]])


OPENERS: dict[str, Callable[[Path, int | None], Artifact]] = {
    ".onnx": _open_onnx,
    ".xml": _open_openvino,
    ".mlpackage": _open_coreml,
}
