"""Detectors in ONNX files, written with their description, and read and run with everything in them checked."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import AfterValidator, ConfigDict, Field

from shvit.documents import parse_json, parse_model
from shvit.errors import InputError, first_line
from shvit.files import check_file
from shvit.sessions import create_session

from .detector import MAX_IMG_SIZE, PADDING, Detections, PreparedImage, paste
from .graphs import OUTPUTS, MaskRCNNGraph, RetinaNetGraph

if TYPE_CHECKING:
    import onnx
    import onnxruntime

OPSET = 17  # RoIAlign is aligned from 16 on
INPUTS = ("pixels", "size")
KEY = "shvit.detector"
MAX_BYTES = 2 << 30  # of a file: protobuf's own limit
MAX_DETECTIONS = 10_000  # on one image
MAX_MASK_PIXELS = 2 << 30  # of all masks of an image together, each as large as it: a byte a pixel
OUTPUT_TYPES = {name: "tensor(int64)" if name == "labels" else "tensor(float)" for name in OUTPUTS}
ROUNDING = 1e-3  # by which a score or a mask's probability may leave 0..1
AGAIN = "export it again"

Side = Annotated[int, Field(gt=0, le=MAX_IMG_SIZE)]
Level = Annotated[int, Field(ge=0, le=255)]


def _check_names(outputs: tuple[str, ...]) -> tuple[str, ...]:
    if outputs not in (OUTPUTS, OUTPUTS[:3]):
        raise ValueError(f"should be {', '.join(OUTPUTS[:3])}, and masks or not")
    return outputs


@dataclass(frozen=True)
class DetectorSpec:
    """The inputs and outputs of an exported detector, as written into its file.

    Inputs: `pixels`, uint8 (1, height, width, 3), RGB: the image as large as fits with its aspect kept, at the top
    left, the rest filled with `padding`; and `size`, int64 (2,): height and width of the image in it.
    Outputs: `boxes` float32 (n, 4), left, top, right, bottom in pixels of the input; `scores` float32 (n,), best first;
    `labels` int64 (n,); and of Mask R-CNN `masks` float32 (n, 28, 28), probabilities inside each box.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    config: str
    detector: str
    img_size: tuple[Side, Side]
    """Height and width in pixels."""
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    outputs: Annotated[tuple[str, ...], AfterValidator(_check_names)]
    mask_threshold: Annotated[float, Field(ge=0, le=1)]
    """The probability from which a pixel belongs to the object."""
    padding: tuple[Level, Level, Level] = PADDING

    @classmethod
    def from_json(cls, text: str) -> "DetectorSpec":
        """Return the description that `write_onnx` wrote; raise InputError for anything else."""
        name = "the file's description of its detector"
        return parse_model(cls, parse_json(text, name), name, AGAIN)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_onnx(graph: RetinaNetGraph | MaskRCNNGraph, path: Path, spec: DetectorSpec) -> None:
    """Write a graph with its description, checked by onnx."""
    import onnx

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, *spec.img_size, 3), generator=generator, dtype=torch.uint8)
    example = (noise, torch.tensor(spec.img_size))  # on a blank image there may be nothing to detect
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about sizes that become constants, as is intended
        traced = torch.jit.trace(graph, example, check_trace=False)
        torch.onnx.export(
            traced,
            example,
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(spec.outputs),
            dynamic_axes={name: {0: "detections"} for name in spec.outputs},
        )
    proto = onnx.load(str(path))
    onnx.helper.set_model_props(proto, {KEY: json.dumps(asdict(spec))})
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnnxDetector:
    """An exported detector, opened in ONNX Runtime."""

    path: Path
    spec: DetectorSpec
    session: "onnxruntime.InferenceSession"
    operators: dict[str, int]
    """Number of nodes by operator, most frequent first."""

    def run(self, pixels: np.ndarray, size: np.ndarray) -> dict[str, np.ndarray]:
        """Return outputs by name for the inputs that `DetectorSpec` describes; InputError where ONNX Runtime fails."""
        try:
            outputs = self.session.run(list(self.spec.outputs), dict(zip(INPUTS, (pixels, size), strict=True)))
        except Exception as error:  # onnxruntime's own exception types are not public
            raise InputError(f"{self.path}: ONNX Runtime cannot run it ({first_line(error)}); {AGAIN}") from error
        return dict(zip(self.spec.outputs, outputs, strict=True))

    def detect(self, image: PreparedImage) -> Detections:
        """Return the detections on an image that `fixed_pipeline` of the detector's size has prepared."""
        sample = image["data_samples"]
        pixels = image["inputs"].flip(0).permute(1, 2, 0)[None]  # BGR (3, H, W) → RGB (1, H, W, 3)
        size = np.array(sample.img_shape[:2], dtype=np.int64)
        outputs = self._checked(self.run(pixels.numpy(), size))
        boxes = outputs["boxes"] / torch.tensor(sample.scale_factor * 2)  # (w, h, w, h)
        masks = self._paste(outputs["masks"], boxes, sample.ori_shape[:2]) if "masks" in outputs else None
        return Detections(boxes, outputs["scores"], outputs["labels"], masks)

    def _paste(self, masks: torch.Tensor, boxes: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Return masks of the image's size, which is (height, width)."""
        number = len(boxes) * math.prod(shape)
        if number > MAX_MASK_PIXELS:
            raise InputError(f"{self.path}: finds {len(boxes):,} objects, whose masks take {number:,} bytes; give "
                             "smaller images, or a detector that finds fewer")  # fmt: skip
        return paste(masks, boxes, shape, self.spec.mask_threshold)

    def _checked(self, outputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Return the outputs, boxes clipped to the image; raise InputError for what is not as described or in range."""
        if not _has_described_shapes(outputs):
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in outputs.items())
            raise InputError(f"{self.path}: gives other outputs than it says ({shapes}); {AGAIN}")
        if not _is_in_range(outputs):
            raise InputError(f"{self.path}: gives boxes, scores or masks that cannot be; {AGAIN}")
        labels, number = outputs["labels"], len(self.spec.classes)
        if labels.size and not 0 <= labels.min() <= labels.max() < number:
            raise InputError(f"{self.path}: gives a label that none of its {number} classes has")
        limit = np.array([*self.spec.img_size[::-1]] * 2, dtype=np.float32)
        boxes = np.clip(outputs["boxes"], 0, limit)
        return {name: torch.from_numpy(value) for name, value in (outputs | {"boxes": boxes}).items()}


def _has_described_shapes(outputs: dict[str, np.ndarray]) -> bool:
    """Return whether all outputs have the types and shapes that `DetectorSpec` describes, of one number of objects."""
    number = outputs["scores"].shape[0] if outputs["scores"].ndim else -1
    shapes = {"boxes": (number, 4), "scores": (number,), "labels": (number,)}
    if "masks" in outputs:
        sides = outputs["masks"].shape[1:]
        shapes["masks"] = (number, *sides)
        if len(sides) != 2 or min(sides) < 1 or max(sides) > MAX_IMG_SIZE:
            return False
    types = {name: np.int64 if name == "labels" else np.float32 for name in outputs}
    return number <= MAX_DETECTIONS and all(
        (value.shape, value.dtype) == (shapes[name], types[name]) for name, value in outputs.items()
    )


def _is_in_range(outputs: dict[str, np.ndarray]) -> bool:
    """Return whether boxes are finite with corners in order, and scores and masks are probabilities."""
    boxes = outputs["boxes"]
    probabilities = [value for name, value in outputs.items() if name in ("scores", "masks")]
    return bool(
        np.isfinite(boxes).all()
        and (boxes[:, :2] <= boxes[:, 2:]).all()
        and all(((part >= -ROUNDING) & (part <= 1 + ROUNDING)).all() for part in probabilities)
    )


# --- loading ----------------------------------------------------------------------------------------------------------


def load_onnx(path: Path, threads: int | None = None) -> OnnxDetector:
    """Load a file that `shvit detect export` wrote; raise InputError for any other, or if ONNX Runtime refuses it."""
    proto = _load_proto(path)
    spec = _read_spec(proto, path)
    _check_weights_inside(proto, path)
    try:
        session = create_session(path, threads)
    except Exception as error:  # onnxruntime's own exception types are not public
        raise InputError(f"{path}: ONNX Runtime cannot open it ({first_line(error)})") from error
    _check_interface(session, spec, path)
    counts = Counter(node.op_type for node in proto.graph.node)
    return OnnxDetector(path, spec, session, dict(counts.most_common()))


def _load_proto(path: Path) -> "onnx.ModelProto":
    import onnx

    check_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes are more than the {MAX_BYTES:,} allowed")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own types
        raise InputError(f"{path}: not an ONNX file; {AGAIN}") from error


def _read_spec(proto: "onnx.ModelProto", path: Path) -> DetectorSpec:
    properties = {prop.key: prop.value for prop in proto.metadata_props}
    if KEY not in properties:
        raise InputError(f"{path}: is not a detector that `shvit detect export` wrote")
    try:
        return DetectorSpec.from_json(properties[KEY])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _check_weights_inside(proto: "onnx.ModelProto", path: Path) -> None:
    """Raise InputError where a tensor's values are in another file."""
    import onnx

    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    if any(each.data_location == onnx.TensorProto.EXTERNAL for each in _tensors(nodes, proto.graph.initializer)):
        raise InputError(f"{path}: has weights in another file, which `shvit detect export` never writes; {AGAIN}")


def _tensors(
    nodes: Iterable["onnx.NodeProto"], initializers: Iterable["onnx.TensorProto"] = ()
) -> Iterator["onnx.TensorProto"]:
    """Yield the weights and constants of a graph and of those inside it."""
    yield from initializers
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner.node, inner.initializer) if inner.node or inner.initializer else ()


def _check_interface(session: "onnxruntime.InferenceSession", spec: DetectorSpec, path: Path) -> None:
    """Raise InputError where the file's inputs and outputs are not those of its description."""
    outputs = {output.name: output.type for output in session.get_outputs()}
    if outputs != {name: OUTPUT_TYPES[name] for name in spec.outputs} or list(outputs) != list(spec.outputs):
        raise InputError(f"{path}: does not give {', '.join(spec.outputs)}, as it says; {AGAIN}")
    inputs = {each.name: (each.type, tuple(each.shape)) for each in session.get_inputs()}
    if inputs != {"pixels": ("tensor(uint8)", (1, *spec.img_size, 3)), "size": ("tensor(int64)", (2,))}:
        raise InputError(f"{path}: does not take pixels and size, as it says; {AGAIN}")
