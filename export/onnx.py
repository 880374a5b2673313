"""A deployed model as an ONNX file."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shvit import __version__
from shvit.errors import InputError

from .spec import Spec

INPUT, OUTPUT = "image", "logits"
SPEC_KEY = "shvit.spec"
OPSET = 20  # the newest that ONNX Runtime, OpenVINO and onnxruntime-web of the last two years all read


def write_onnx(model: nn.Module, path: Path, spec: Spec, dynamic_batch: bool = False) -> None:
    """Exports `model`, already deployed, with input `image` (B, C, H, W) float32 and output `logits` (B, classes).

    With `spec.precision` fp16 weights and arithmetic are float16, input and output stay float32.
    The file carries its `Spec` and the versions that made it, and has passed onnx.checker with full shape inference.

    Args:
        model: in eval mode.
        path: where to write; the caller moves it into place.
        dynamic_batch: leave B open; 1 otherwise.
    """
    import onnx

    if spec.precision == "fp16":
        model = Half(model).eval()
    batch = spec.blank(2 if dynamic_batch else 1)
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            model,
            (batch,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _strip(proto)
    for key, value in describe(spec).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)


class Half(nn.Module):
    """A copy of the model in float16 behind a float32 input and output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.half()).float()


def describe(spec: Spec) -> dict[str, str]:
    """What every artefact says of itself: its spec, its licence and the versions that made it."""
    import timm

    return {
        SPEC_KEY: spec.to_json(),
        "shvit.version": __version__,
        "torch.version": torch.__version__,
        "timm.version": timm.__version__,
        "license": "mit" if spec.model.startswith("shvit") else "see the model's card in timm",
    }


def _strip(proto: Any) -> None:
    """Removes the exporter's notes on each node, among them source paths of the machine that exported."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.metadata_props[:]


def read_spec(path: Path) -> Spec:
    """The `Spec` inside an ONNX file that this project wrote.

    Raises:
        InputError: no such file, not ONNX, or without a spec.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable ONNX file") from error
    return spec_from({prop.key: prop.value for prop in proto.metadata_props}, path)


def spec_from(metadata: dict[str, str], path: Path) -> Spec:
    """The `Spec` among what a file says of itself; InputError without one."""
    if SPEC_KEY not in metadata:
        raise InputError(f"{path}: was not written by `shvit export`, so its preprocessing is not known; "
                         "export the model again with it")  # fmt: skip
    return Spec.from_json(metadata[SPEC_KEY])


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


def operators(path: Path) -> dict[str, int]:
    """How many of each operator an ONNX file holds, most frequent first."""
    from collections import Counter

    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())
