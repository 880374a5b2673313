"""A deployed model as an ONNX file."""

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shvit import __version__
from shvit.documents import parse_json, parse_model, to_json
from shvit.errors import InputError
from shvit.files import check_file, is_file
from shvit.weights.run_info import is_name

from ..guards import check_elements, check_operators
from ..quantization.ranges import Range
from ..spec import Spec
from ..wrappers import ChannelsLast, Half, Normalized, layer_name

INPUT = "image"
SPEC_KEY, LABELS_KEY, RANGES_KEY = "shvit.spec", "shvit.labels", "shvit.ranges"
OPSET = 20  # the newest that ONNX Runtime, OpenVINO and onnxruntime-web of the last two years all read
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes from which module a node came


def write_onnx(
    model: nn.Module, path: Path, spec: Spec, dynamic_batch: bool = False, labels: Sequence[str] = ()
) -> None:
    """Exports `model`, already deployed, with input `image` and the outputs that `spec` names, float32.

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
    with torch.no_grad(), quiet():
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
    proto: Any, path: Path, spec: Spec, labels: Sequence[str] = (), ranges: Mapping[str, Range] | None = None
) -> None:
    """Writes an ONNX file that says what it is, after onnx.checker with full shape inference.

    Args:
        ranges: of an int8 file's tensors, by name.
    """
    import onnx

    del proto.metadata_props[:]
    for key, value in describe(spec, labels, ranges).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


def describe(spec: Spec, labels: Sequence[str] = (), ranges: Mapping[str, Range] | None = None) -> dict[str, str]:
    """What every artifact says of itself: its spec, labels, learned ranges, license and the versions that made it."""
    import timm

    named = {LABELS_KEY: to_json(list(labels))} if labels else {}
    learned = {RANGES_KEY: to_json(ranges)} if ranges else {}
    return {
        SPEC_KEY: spec.to_json(),
        **named,
        **learned,
        "shvit.version": __version__,
        "torch.version": torch.__version__,
        "timm.version": timm.__version__,
        "license": "mit" if spec.model.startswith("shvit") else "see the model's card in timm",
    }


def _name_layers(proto: Any) -> None:
    """Names each node after the module that it came from, as far as the exporter noted it."""
    seen: Counter[str] = Counter()
    for node in proto.graph.node:
        scopes = {prop.key: prop.value for prop in node.metadata_props}.get(SCOPES)
        path = layer_name(["", *ast.literal_eval(scopes)[:-1]][-1]) if scopes else ""
        if node.op_type not in LAYERS:
            path = f"{path}.{node.op_type}" if path else node.op_type
        node.name = f"{path}.{seen[path]}" if seen[path] else path
        seen[path] += 1


LAYERS = ("Conv", "Gemm")
"""Operators that are a whole module, bias included."""


def _strip(proto: Any) -> None:
    """Removes the exporter's notes on each node, among them source paths of the machine that exported."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        del value.metadata_props[:]


def read_onnx(path: Path) -> Any:
    """An ONNX file's protobuf.

    Raises:
        InputError: no such file, or not ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    check_file(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: {size / 1e9:.1f} GB is more than the {MAX_BYTES / 1e9:.1f} GB of one ONNX file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable ONNX file") from error
    _check_external(proto, path)
    return proto


MAX_BYTES = (2 << 30) - 1
"""The most that protobuf, in which ONNX is written, can hold."""


def _graphs(proto: Any) -> Iterator[Any]:
    """The graph, the graphs in its nodes' attributes at any depth, and the bodies of functions."""
    import onnx

    left = [proto.graph, *proto.functions]
    while left:
        graph = left.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    left.append(attribute.g)
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    left.extend(attribute.graphs)


def external_files(proto: Any) -> list[str]:
    """What a model calls the files that hold weights of it, in order; empty where it is one file."""
    import onnx

    names: dict[str, None] = {}
    for graph in _graphs(proto):
        tensors = list(getattr(graph, "initializer", ()))
        for sparse in getattr(graph, "sparse_initializer", ()):
            tensors += [sparse.values, sparse.indices]
        for node in graph.node:
            for attribute in node.attribute:
                tensors += [attribute.t, *attribute.tensors]
                tensors += [attribute.sparse_tensor.values, attribute.sparse_tensor.indices]
        for tensor in tensors:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                names[next((each.value for each in tensor.external_data if each.key == "location"), "")] = None
    return list(names)


def _check_external(proto: Any, path: Path) -> None:
    """Raise InputError where weights are to be read from elsewhere than from files in the model's own folder."""
    folder = path.resolve().parent
    for name in external_files(proto):
        where = folder / name
        if not name or Path(name).is_absolute() or "\\" in name or not where.resolve().is_relative_to(folder):
            raise InputError(f"{path}: has weights in {name!r}, outside of its own folder; save the model as one file")
        if not is_file(where):
            raise InputError(f"{path}: has weights in {name}, which is not beside it")


def check_graph(proto: Any, path: Path) -> None:
    """Raise InputError for what no file of `shvit export` has, and what could take this machine with it.

    That is weights in other files (no hash of the artifact covers them), loops, and tensors that are too large, as far
    as shapes can be told without running the model.
    """
    import onnx

    if names := external_files(proto):
        raise InputError(f"{path}: keeps weights in another file, {names[0]}; an artifact is one file, export it again")
    operators = {node.op_type for graph in _graphs(proto) for node in graph.node}
    check_operators(path, operators)
    light = onnx.ModelProto()  # shapes do not depend on what is in large tensors
    light.CopyFrom(proto)
    for tensor in light.graph.initializer:
        if len(tensor.raw_data) > MAX_SHAPE_BYTES:
            tensor.ClearField("raw_data")
    graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    values = [(each.name, each.type.tensor_type.shape) for each in (*graph.value_info, *graph.output)]
    check_elements(path, [(name, [dim.dim_value or None for dim in shape.dim]) for name, shape in values])
    check_elements(path, [(tensor.name, list(tensor.dims)) for tensor in graph.initializer])


MAX_SHAPE_BYTES = 4096  # of a tensor whose values may be a shape


def metadata(proto: Any) -> dict[str, str]:
    """What an ONNX file says of itself."""
    return {prop.key: prop.value for prop in proto.metadata_props}


def spec_from(metadata: dict[str, str], path: Path) -> Spec:
    """The `Spec` among what a file says of itself; InputError without one."""
    if SPEC_KEY not in metadata:
        raise InputError(f"{path}: was not written by `shvit export`, so its preprocessing is not known; "
                         "export the model again with it")  # fmt: skip
    return Spec.from_json(metadata[SPEC_KEY], str(path))


def labels_from(metadata: dict[str, str], path: Path) -> tuple[str, ...]:
    """Return the names of the classes among what a file says of itself; InputError where they are no list of names."""
    where = f"{path}: its labels"
    labels = parse_model(list[str], parse_json(metadata.get(LABELS_KEY, "[]"), where), where, "export the model again")
    if wrong := next((each for each in labels if not is_name(each)), None):
        raise InputError(f"{where}: {wrong[:80]!r} cannot be a name; export the model again")
    return tuple(labels)


def ranges_from(metadata: dict[str, str], path: Path) -> dict[str, Range]:
    """Return the ranges learned for 8-bit tensors among what a file says of itself; InputError where they are none."""
    where = f"{path}: its ranges"
    return parse_model(
        dict[str, Range], parse_json(metadata.get(RANGES_KEY, "{}"), where), where, "export the model again"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps exporters' progress and deprecation warnings, which a user can do nothing about, off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def operators(proto: Any) -> dict[str, int]:
    """How many of each operator an ONNX file holds, most frequent first."""
    return dict(Counter(node.op_type for node in proto.graph.node).most_common())
