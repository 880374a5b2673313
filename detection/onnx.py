"""Mask R-CNN and RetinaNet as ONNX: images of one size in, any number of detections out.

MMDetection's own prediction code branches on what it finds, so that a trace of it holds for one image alone. The
graphs here do the same on one image without a branch: every choice is an index. Shapes in comments: n detections,
L levels, A anchors, C classes.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shvit.deployment import deploy
from shvit.documents import parse_json, parse_model
from shvit.errors import InputError, first_line
from shvit.files import check_file
from shvit.sessions import create_session

from .detector import MAX_IMG_SIZE, PADDING, Detections, ImageFile, paste

OPSET = 17  # RoIAlign is aligned from 16 on
INPUTS = ("pixels", "size")
KEY = "shvit.detector"
MAX_BYTES = 2 << 30  # of a file: protobuf's own limit
MAX_DETECTIONS = 10_000  # on one image
MAX_MASK_PIXELS = 2 << 30  # of all masks of an image together, each as large as it: a byte a pixel
OUTPUT_TYPES = {
    "boxes": "tensor(float)",
    "scores": "tensor(float)",
    "labels": "tensor(int64)",
    "masks": "tensor(float)",
}
OUTPUTS = tuple(OUTPUT_TYPES)
ROUNDING = 1e-3  # by which a score or a mask's probability may leave 0..1
AGAIN = "export it again"


@dataclass(frozen=True)
class DetectorSpec:
    """What an exported detector takes and gives; written into the file.

    Inputs: `pixels`, uint8 (1, height, width, 3), RGB: the image as large as fits with its aspect kept, at the top
    left, the rest filled with `padding`; and `size`, int64 (2,): height and width of the image in it.
    Outputs: `boxes` float32 (n, 4), left, top, right, bottom in pixels of the input; `scores` float32 (n,), best first;
    `labels` int64 (n,); and of Mask R-CNN `masks` float32 (n, 28, 28), probabilities inside each box.
    """

    config: str
    detector: str
    img_size: tuple[int, int]
    """Height and width in pixels."""
    classes: tuple[str, ...]
    outputs: tuple[str, ...]
    mask_threshold: float
    """From which probability on a pixel belongs to the object."""
    padding: tuple[int, int, int] = PADDING

    @classmethod
    def from_json(cls, text: str) -> "DetectorSpec":
        """Raises InputError for anything but what `write_onnx` wrote."""
        name = "the file's description of its detector"
        content = parse_json(text, name)
        known = {each.name for each in fields(cls)}
        if not isinstance(content, dict) or not content.keys() <= known:
            raise InputError(f"{name} is not readable; {AGAIN}")
        spec = parse_model(cls, content, name, AGAIN)
        wrong = [
            each
            for each, is_sound in (
                ("img_size", all(0 < side <= MAX_IMG_SIZE for side in spec.img_size)),
                ("mask_threshold", 0 <= spec.mask_threshold <= 1),
                ("padding", all(0 <= level <= 255 for level in spec.padding)),
                ("outputs", spec.outputs in (OUTPUTS, OUTPUTS[:3])),
                ("classes", bool(spec.classes)),
            )
            if not is_sound
        ]
        if wrong:
            raise InputError(f"{name} is not readable ({wrong[0]} {str(getattr(spec, wrong[0]))[:60]}); {AGAIN}")
        return spec


# --- the parts of a graph ---------------------------------------------------------------------------------------------


class _Boxes(nn.Module):
    """The inverse of MMDetection's DeltaXYWHBBoxCoder, clipped to the image."""

    means: torch.Tensor
    stds: torch.Tensor

    def __init__(self, coder: Any):
        super().__init__()
        self.register_buffer("means", torch.tensor(coder.means))
        self.register_buffer("stds", torch.tensor(coder.stds))
        self.largest = abs(math.log(16 / 1000))  # MMDetection's bound of a side's growth, e^4.1

    def forward(self, anchors: torch.Tensor, deltas: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Anchors (…, 4) and deltas (…, 4) → boxes (…, 4); `size` is height and width of the image."""
        deltas = deltas * self.stds + self.means
        low, high = anchors[..., :2], anchors[..., 2:]
        sides = high - low
        center = (low + high) * 0.5 + sides * deltas[..., :2]
        half = sides * deltas[..., 2:].clamp(-self.largest, self.largest).exp() * 0.5
        boxes = torch.cat([center - half, center + half], dim=-1)
        return torch.minimum(boxes.clamp(min=0), size.flip(0).repeat(2).to(boxes))  # x ≤ width, y ≤ height, twice


class _Anchors(nn.Module):
    """The best-scored anchors of every level with their boxes: a dense head's outputs as candidates."""

    def __init__(self, head: Any, sizes: Sequence[tuple[int, int]], most: int):
        super().__init__()
        self.most = most
        self.classes = head.cls_out_channels
        self.decode = _Boxes(head.bbox_coder)
        for level, anchors in enumerate(head.prior_generator.grid_priors(sizes, device="cpu")):
            self.register_buffer(f"level_{level}", anchors)

    def forward(
        self, logits: Sequence[torch.Tensor], deltas: Sequence[torch.Tensor], size: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """(1, A·C, H, W) and (1, A·4, H, W) of each level → boxes (k, 4), scores, classes and levels (k,)."""
        boxes, scores, classes, levels = [], [], [], []
        for level, (logit, delta) in enumerate(zip(logits, deltas, strict=True)):
            score = logit[0].permute(1, 2, 0).reshape(-1).sigmoid()  # (H·W·A·C,)
            score, index = score.topk(min(self.most, score.shape[0]) if self.most > 0 else score.shape[0])
            anchor = torch.div(index, self.classes, rounding_mode="floor")
            anchors = getattr(self, f"level_{level}")[anchor]
            boxes.append(self.decode(anchors, delta[0].permute(1, 2, 0).reshape(-1, 4)[anchor], size))
            scores.append(score)
            classes.append(index - anchor * self.classes)
            levels.append(torch.full_like(index, level))
        return torch.cat(boxes), torch.cat(scores), torch.cat(classes), torch.cat(levels)


def _suppress(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, iou: float, most: int, side: int
) -> torch.Tensor:
    """Indices of at most `most` boxes, best first, without those that overlap a better one of their group."""
    from torchvision.ops import nms

    apart = boxes + (groups * (side + 1))[:, None].to(boxes)
    return nms(apart, scores, iou)[:most]


def _is_large(boxes: torch.Tensor, cfg: Any) -> torch.Tensor:
    """Whether both sides are longer than the least; what is clipped to nothing at the border is not."""
    return (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) > cfg.get("min_bbox_size", -1)


def _chosen(which: torch.Tensor) -> torch.Tensor:
    """Indices of what is true."""
    return which.nonzero()[:, 0]


class _Rois(nn.Module):
    """MMDetection's SingleRoIExtractor: every box is looked up in the level of its size."""

    extractor: Any

    def __init__(self, extractor: Any):
        super().__init__()
        self.extractor = extractor
        self.channels = extractor.out_channels

    def forward(self, features: Sequence[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        """L maps (1, channels, H, W) and (n, 4) → (n, channels, size, size)."""
        from torchvision.ops import roi_align

        layers = self.extractor.roi_layers
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)  # (n, 5), all of image 0
        level_of = self.extractor.map_roi_levels(rois, len(layers))
        found = boxes.new_zeros(boxes.shape[0], self.channels, *layers[0].output_size)
        for level, layer in enumerate(layers):
            index = _chosen(level_of == level)
            ratio = layer.sampling_ratio
            part = roi_align(features[level], rois[index], layer.output_size, layer.spatial_scale, ratio, layer.aligned)
            found = found.index_put((index,), part)
        return found


# --- the detectors ----------------------------------------------------------------------------------------------------


class _Graph(nn.Module):
    """What both detectors begin with: pixels, normalized, through backbone and neck."""

    scale: torch.Tensor
    shift: torch.Tensor
    neck: Any

    def __init__(self, model: Any, img_size: tuple[int, int]):
        super().__init__()
        self.img_size = img_size
        mean, std = (getattr(model.data_preprocessor, name).flatten() for name in ("mean", "std"))
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", -mean / std)
        self.backbone = deploy(model.backbone, img_size)
        self.neck = model.neck

    def features(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        image = (pixels.float() * self.scale + self.shift).permute(0, 3, 1, 2)
        return self.neck(self.backbone(image))

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of every level."""
        with torch.no_grad():
            features = self.features(torch.zeros(1, *self.img_size, 3, dtype=torch.uint8))
        return [(each.shape[2], each.shape[3]) for each in features]


class RetinaNetGraph(_Graph):
    """RetinaNet on one image."""

    head: Any
    outputs: tuple[str, ...] = ("boxes", "scores", "labels")
    mask_threshold = 0.5

    def __init__(self, model: Any, img_size: tuple[int, int]):
        super().__init__(model, img_size)
        self.head = model.bbox_head
        self.test_cfg = model.test_cfg
        self.anchors = _Anchors(self.head, self.sizes(), self.test_cfg.nms_pre)

    def forward(self, pixels: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        boxes, scores, labels, _ = self.anchors(*self.head(self.features(pixels)), size)
        cfg = self.test_cfg
        keep = _chosen((scores > cfg.score_thr) & _is_large(boxes, cfg))
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        keep = _suppress(boxes, scores, labels, cfg.nms.iou_threshold, cfg.max_per_img, max(self.img_size))
        return boxes[keep], scores[keep], labels[keep]


class MaskRCNNGraph(_Graph):
    """Mask R-CNN, or Faster R-CNN where there is no mask head, on one image."""

    rpn: Any
    bbox_head: Any
    mask_head: Any
    mask_rois: Any

    def __init__(self, model: Any, img_size: tuple[int, int]):
        super().__init__(model, img_size)
        self.rpn, self.rpn_cfg, self.rcnn_cfg = model.rpn_head, model.test_cfg.rpn, model.test_cfg.rcnn
        self.anchors = _Anchors(self.rpn, self.sizes(), self.rpn_cfg.nms_pre)
        heads = model.roi_head
        self.bbox_rois, self.bbox_head = _Rois(heads.bbox_roi_extractor), heads.bbox_head
        self.decode = _Boxes(self.bbox_head.bbox_coder)
        self.mask_head = heads.mask_head if heads.with_mask else None
        self.mask_rois = _Rois(heads.mask_roi_extractor) if heads.with_mask else None
        self.outputs = ("boxes", "scores", "labels", "masks")[: 4 if heads.with_mask else 3]
        self.mask_threshold = self.rcnn_cfg.get("mask_thr_binary", 0.5)

    def forward(self, pixels: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.features(pixels)
        boxes, scores, labels = self._classify(features, self._propose(features, size), size)
        if self.mask_head is None:
            return boxes, scores, labels
        return boxes, scores, labels, self._mask(features, boxes, labels)

    def _propose(self, features: Sequence[torch.Tensor], size: torch.Tensor) -> torch.Tensor:
        """Boxes (n, 4) that may hold something, from the region proposal network."""
        boxes, scores, _, levels = self.anchors(*self.rpn(features), size)
        keep = _chosen(_is_large(boxes, self.rpn_cfg))
        boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        iou, most = self.rpn_cfg.nms.iou_threshold, self.rpn_cfg.max_per_img
        return boxes[_suppress(boxes, scores, levels, iou, most, max(self.img_size))]

    def _classify(
        self, features: Sequence[torch.Tensor], proposals: torch.Tensor, size: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        logits, deltas = self.bbox_head(self.bbox_rois(features, proposals))  # (n, C+1) (n, 4·C)
        scores = logits.softmax(dim=-1)[:, :-1]  # the last one is background
        classes = scores.shape[1]
        deltas = deltas.reshape(-1, 1 if self.bbox_head.reg_class_agnostic else classes, 4)
        boxes = self.decode(proposals[:, None], deltas, size).expand(-1, classes, 4).reshape(-1, 4)  # (n·C, 4)
        scores = scores.reshape(-1)
        keep = _chosen(scores > self.rcnn_cfg.score_thr)
        boxes, scores, labels = boxes[keep], scores[keep], keep % classes
        iou, most = self.rcnn_cfg.nms.iou_threshold, self.rcnn_cfg.max_per_img
        keep = _suppress(boxes, scores, labels, iou, most, max(self.img_size))
        return boxes[keep], scores[keep], labels[keep]

    def _mask(self, features: Sequence[torch.Tensor], boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(n, 28, 28), the probabilities of each box's own class."""
        masks = self.mask_head(self.mask_rois(features, boxes))  # (n, C, 28, 28)
        if self.mask_head.class_agnostic:
            labels = torch.zeros_like(labels)
        index = labels[:, None, None, None].expand(-1, 1, masks.shape[2], masks.shape[3])
        return masks.gather(1, index)[:, 0].sigmoid()


def detector_graph(model: Any, img_size: tuple[int, int]) -> RetinaNetGraph | MaskRCNNGraph:
    """The detector as a graph for images of one size.

    Raises:
        InputError: another kind of detector than Mask R-CNN, Faster R-CNN and RetinaNet with MMDetection's own heads.
    """
    kind = type(model).__name__
    graphs: dict[str, type[RetinaNetGraph] | type[MaskRCNNGraph]] = {
        "RetinaNet": RetinaNetGraph,
        "MaskRCNN": MaskRCNNGraph,
        "FasterRCNN": MaskRCNNGraph,
    }
    if kind not in graphs:
        raise InputError(f"{kind} cannot be exported; choose from {', '.join(graphs)}")
    _check_parts(model)
    return graphs[kind](model, img_size).eval()


def _check_parts(model: Any) -> None:
    """Raises where a part does something that the graphs do not."""
    allowed = {
        "bbox_head": {"RetinaHead"},
        "rpn_head": {"RPNHead"},
        "roi_head": {"StandardRoIHead"},
        "roi_head.bbox_head": {"Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead", "ConvFCBBoxHead"},
        "roi_head.mask_head": {"FCNMaskHead"},
        "roi_head.bbox_roi_extractor": {"SingleRoIExtractor"},
        "roi_head.mask_roi_extractor": {"SingleRoIExtractor"},
    }
    modules = dict(model.named_modules())
    for name, kinds in allowed.items():
        if name in modules and type(modules[name]).__name__ not in kinds:
            raise InputError(
                f"{type(modules[name]).__name__} as {name} cannot be exported; choose {' or '.join(kinds)}"
            )
    for name, module in modules.items():
        coder = getattr(module, "bbox_coder", None)
        if coder is not None and type(coder).__name__ != "DeltaXYWHBBoxCoder":
            raise InputError(f"{type(coder).__name__} of {name} cannot be exported; choose DeltaXYWHBBoxCoder")
    for name, module in modules.items():
        if not getattr(module, "use_sigmoid_cls", True):
            raise InputError(f"{name} with a softmax cannot be exported; choose a loss with use_sigmoid=True")
    if not model.data_preprocessor._channel_conversion:
        raise InputError("a detector that is fed BGR cannot be exported; set bgr_to_rgb=True of its data_preprocessor")
    cfg = model.test_cfg
    if not cfg:
        raise InputError("the config's model has no test_cfg, which tells what counts as found")
    for part in [cfg.rpn, cfg.rcnn] if "rpn" in cfg else [cfg]:
        if part.nms.get("type", "nms") != "nms" or part.nms.get("class_agnostic"):
            raise InputError(f"NMS {dict(part.nms)} cannot be exported; choose dict(type='nms', iou_threshold=…)")


# --- files ------------------------------------------------------------------------------------------------------------


def write_onnx(graph: RetinaNetGraph | MaskRCNNGraph, path: Path, spec: DetectorSpec) -> None:
    """Writes the graph with its description, checked by onnx."""
    import warnings

    import onnx

    example = (_noise(spec), torch.tensor(spec.img_size))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that sizes become constants, which is what is wanted
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


def _noise(spec: DetectorSpec) -> torch.Tensor:
    """Pixels to trace with: on a blank image there may be nothing to detect."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, *spec.img_size, 3), generator=generator, dtype=torch.uint8)


@dataclass(frozen=True)
class OnnxDetector:
    """An exported detector, opened in ONNX Runtime."""

    path: Path
    spec: DetectorSpec
    run: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
    """Pixels and size → the outputs by name."""
    operators: dict[str, int]

    def detect(self, image: ImageFile) -> Detections:
        """What is found on an image that `fixed_pipeline` of the detector's size has prepared."""
        sample = image["data_samples"]
        pixels = image["inputs"].flip(0).permute(1, 2, 0)[None]  # BGR (3, H, W) → RGB (1, H, W, 3)
        size = np.array(sample.img_shape[:2], dtype=np.int64)
        found = self._checked(self.run(pixels.numpy(), size))
        boxes = found["boxes"] / torch.tensor(sample.scale_factor * 2)  # (w, h, w, h)
        masks = None
        if "masks" in found:
            pixels_of_masks = len(boxes) * math.prod(sample.ori_shape[:2])
            if pixels_of_masks > MAX_MASK_PIXELS:
                raise InputError(
                    f"{self.path}: finds {len(boxes):,} objects, whose masks take {pixels_of_masks:,} bytes; give "
                    "smaller images, or a detector that finds fewer"
                )
            masks = paste(found["masks"], boxes, sample.ori_shape, self.spec.mask_threshold)
        return Detections(boxes, found["scores"], found["labels"], masks)

    def _checked(self, found: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The outputs, if they are what the description says: the file may be anyone's.

        Raises:
            InputError: other shapes or types, boxes or scores that cannot be, or labels without a class.
        """
        number = found["scores"].shape[0] if found["scores"].ndim else -1
        shapes = {"boxes": (number, 4), "scores": (number,), "labels": (number,)}
        fits = number <= MAX_DETECTIONS and all(found[name].shape == shape for name, shape in shapes.items())
        fits = fits and all(found[name].dtype == (np.int64 if name == "labels" else np.float32) for name in found)
        if "masks" in found:
            masks = found["masks"]
            fits = fits and masks.ndim == 3 and masks.shape[0] == number and max(masks.shape[1:]) <= MAX_IMG_SIZE
            fits = fits and min(masks.shape[1:]) > 0
        if not fits:
            shape = ", ".join(f"{name} {list(value.shape)}" for name, value in found.items())
            raise InputError(f"{self.path}: gives other outputs than it says ({shape}); {AGAIN}")
        boxes, limit = found["boxes"], np.array([*self.spec.img_size[::-1]] * 2, dtype=np.float32)
        parts = [part for name, part in found.items() if name in ("scores", "masks")]
        sound = np.isfinite(boxes).all() and (boxes[:, :2] <= boxes[:, 2:]).all()
        if not sound or not all(((part >= -ROUNDING) & (part <= 1 + ROUNDING)).all() for part in parts):
            raise InputError(f"{self.path}: gives boxes, scores or masks that cannot be; {AGAIN}")
        if number and not 0 <= found["labels"].min() <= found["labels"].max() < len(self.spec.classes):
            raise InputError(f"{self.path}: gives a label that none of its {len(self.spec.classes)} classes has")
        return {name: torch.from_numpy(np.clip(v, 0, limit) if name == "boxes" else v) for name, v in found.items()}


def open_onnx(path: Path, threads: int | None = None) -> OnnxDetector:
    """A file of `shvit detect export`.

    Raises:
        InputError: no such file, not one of them, or ONNX Runtime refuses it.
    """
    import onnx

    check_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes are more than the {MAX_BYTES:,} allowed")
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own types
        raise InputError(f"{path}: not an ONNX file; export it again") from error
    told = {prop.key: prop.value for prop in proto.metadata_props}
    if KEY not in told:
        raise InputError(f"{path}: is no detector of `shvit detect export`")
    try:
        spec = DetectorSpec.from_json(told[KEY])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    if any(each.data_location == onnx.TensorProto.EXTERNAL for each in _tensors(nodes, proto.graph.initializer)):
        raise InputError(f"{path}: has weights in another file, which `shvit detect export` never writes; {AGAIN}")
    try:
        session = create_session(path, threads)
    except Exception as error:  # onnxruntime's own exception types are not public
        raise InputError(f"{path}: ONNX Runtime cannot open it ({first_line(error)})") from error
    outputs = {output.name: output.type for output in session.get_outputs()}
    if outputs != {name: OUTPUT_TYPES[name] for name in spec.outputs} or list(outputs) != list(spec.outputs):
        raise InputError(f"{path}: does not give {', '.join(spec.outputs)}, as it says; {AGAIN}")
    inputs = {each.name: (each.type, tuple(each.shape)) for each in session.get_inputs()}
    if inputs != {"pixels": ("tensor(uint8)", (1, *spec.img_size, 3)), "size": ("tensor(int64)", (2,))}:
        raise InputError(f"{path}: does not take pixels and size, as it says; {AGAIN}")

    def run(pixels: np.ndarray, size: np.ndarray) -> dict[str, np.ndarray]:
        given = dict(zip(INPUTS, (pixels, size), strict=True))
        try:
            found = session.run(list(spec.outputs), given)
        except Exception as error:  # onnxruntime's own exception types are not public
            raise InputError(f"{path}: ONNX Runtime cannot run it ({first_line(error)}); {AGAIN}") from error
        return dict(zip(spec.outputs, found, strict=True))

    counts: dict[str, int] = {}
    for node in proto.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return OnnxDetector(path, spec, run, dict(sorted(counts.items(), key=lambda item: -item[1])))


def _tensors(nodes: Any, initializers: Any = ()) -> Iterator[Any]:
    """The weights and constants of a graph and of those inside it."""
    yield from initializers
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner.node, inner.initializer) if inner.node or inner.initializer else ()
