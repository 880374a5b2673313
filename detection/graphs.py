"""Mask R-CNN and RetinaNet as graphs: images of one size in, any number of detections out.

MMDetection's own prediction code branches on what it finds, so that a trace of it holds for one image alone. The
graphs here do the same on one image without a branch: every choice is an index. Shapes in comments: n detections,
L levels, A anchors, C classes.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import ConfigDict
from torch import nn
from torchvision.ops import nms, roi_align

from shvit.deployment import deploy
from shvit.errors import InputError

if TYPE_CHECKING:
    from mmdet.models.dense_heads import AnchorHead
    from mmdet.models.detectors import BaseDetector
    from mmdet.models.roi_heads.bbox_heads import BBoxHead
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
    from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder

OUTPUTS = ("boxes", "scores", "labels", "masks")
"""Names of a graph's outputs; one without a mask head has the first three."""

# --- the parts of a graph ---------------------------------------------------------------------------------------------


class _Boxes(nn.Module):
    """The inverse of MMDetection's DeltaXYWHBBoxCoder, clipped to the image."""

    means: torch.Tensor
    stds: torch.Tensor

    def __init__(self, coder: "DeltaXYWHBBoxCoder"):
        super().__init__()
        self.register_buffer("means", torch.tensor(coder.means))
        self.register_buffer("stds", torch.tensor(coder.stds))
        self.max_log_ratio = abs(math.log(16 / 1000))  # MMDetection's limit of a side's growth, e^4.1

    def forward(self, anchors: torch.Tensor, deltas: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Anchors (…, 4) and deltas (…, 4) → boxes (…, 4); `size` is height and width of the image."""
        deltas = deltas * self.stds + self.means
        low, high = anchors[..., :2], anchors[..., 2:]
        sides = high - low
        center = (low + high) * 0.5 + sides * deltas[..., :2]
        half = sides * deltas[..., 2:].clamp(-self.max_log_ratio, self.max_log_ratio).exp() * 0.5
        boxes = torch.cat([center - half, center + half], dim=-1)
        return torch.minimum(boxes.clamp(min=0), size.flip(0).repeat(2).to(boxes))  # x ≤ width, y ≤ height, twice


class _Anchors(nn.Module):
    """The best-scored anchors of every level with their boxes: a dense head's outputs as candidates."""

    def __init__(self, head: "AnchorHead", sizes: Sequence[tuple[int, int]], limit: int):
        super().__init__()
        self.limit = limit
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
            score, index = score.topk(min(self.limit, score.shape[0]) if self.limit > 0 else score.shape[0])
            anchor = torch.div(index, self.classes, rounding_mode="floor")
            anchors = getattr(self, f"level_{level}")[anchor]
            boxes.append(self.decode(anchors, delta[0].permute(1, 2, 0).reshape(-1, 4)[anchor], size))
            scores.append(score)
            classes.append(index - anchor * self.classes)
            levels.append(torch.full_like(index, level))
        return torch.cat(boxes), torch.cat(scores), torch.cat(classes), torch.cat(levels)


def _suppress(
    boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, iou: float, limit: int, side: int
) -> torch.Tensor:
    """Return the indices of up to `limit` boxes, best first, without those that overlap a better one of their group."""
    apart = boxes + (groups * (side + 1))[:, None].to(boxes)
    return nms(apart, scores, iou)[:limit]


def _is_large(boxes: torch.Tensor, cfg: ConfigDict) -> torch.Tensor:
    """Return where both sides are longer than the configured minimum; a box that is clipped to nothing is not."""
    return (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) > cfg.get("min_bbox_size", -1)


class _Rois(nn.Module):
    """MMDetection's SingleRoIExtractor, which pools every box from the level of its size."""

    extractor: "SingleRoIExtractor"

    def __init__(self, extractor: "SingleRoIExtractor"):
        super().__init__()
        self.extractor = extractor
        self.channels = extractor.out_channels

    def forward(self, features: Sequence[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        """L maps (1, channels, H, W) and (n, 4) → (n, channels, size, size)."""
        layers = self.extractor.roi_layers
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)  # (n, 5), all of image 0
        level_of = self.extractor.map_roi_levels(rois, len(layers))
        pooled = boxes.new_zeros(boxes.shape[0], self.channels, *layers[0].output_size)
        for level, layer in enumerate(layers):
            index = (level_of == level).nonzero()[:, 0]
            ratio = layer.sampling_ratio
            part = roi_align(features[level], rois[index], layer.output_size, layer.spatial_scale, ratio, layer.aligned)
            pooled = pooled.index_put((index,), part)
        return pooled


# --- the detectors ----------------------------------------------------------------------------------------------------


class _Graph(nn.Module):
    """The first part of both detectors: pixels, normalized, through backbone and neck."""

    scale: torch.Tensor
    shift: torch.Tensor
    neck: nn.Module

    def __init__(self, model: "BaseDetector", img_size: tuple[int, int]):
        super().__init__()
        self.img_size = img_size
        mean, std = (getattr(model.data_preprocessor, name).flatten() for name in ("mean", "std"))
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", -mean / std)
        self.backbone = deploy(model.backbone, img_size)
        self.neck = model.neck

    def features(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the neck's maps (1, channels, H, W), finest first, of pixels (1, H, W, 3)."""
        image = (pixels.float() * self.scale + self.shift).permute(0, 3, 1, 2)
        return self.neck(self.backbone(image))

    def sizes(self) -> list[tuple[int, int]]:
        """Return the height and width of every level."""
        with torch.no_grad():
            features = self.features(torch.zeros(1, *self.img_size, 3, dtype=torch.uint8))
        return [(each.shape[2], each.shape[3]) for each in features]


class RetinaNetGraph(_Graph):
    """RetinaNet on one image."""

    head: "AnchorHead"
    outputs: tuple[str, ...] = OUTPUTS[:3]
    mask_threshold = 0.5

    def __init__(self, model: "BaseDetector", img_size: tuple[int, int]):
        super().__init__(model, img_size)
        self.head = model.bbox_head
        self.test_cfg = model.test_cfg
        self.anchors = _Anchors(self.head, self.sizes(), self.test_cfg.nms_pre)

    def forward(self, pixels: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        boxes, scores, labels, _ = self.anchors(*self.head(self.features(pixels)), size)
        cfg = self.test_cfg
        keep = ((scores > cfg.score_thr) & _is_large(boxes, cfg)).nonzero()[:, 0]
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        keep = _suppress(boxes, scores, labels, cfg.nms.iou_threshold, cfg.max_per_img, max(self.img_size))
        return boxes[keep], scores[keep], labels[keep]


class MaskRCNNGraph(_Graph):
    """Mask R-CNN, or Faster R-CNN where there is no mask head, on one image."""

    rpn: "AnchorHead"
    bbox_head: "BBoxHead"
    mask_head: "FCNMaskHead"
    mask_rois: Any

    def __init__(self, model: "BaseDetector", img_size: tuple[int, int]):
        super().__init__(model, img_size)
        self.rpn, self.rpn_cfg, self.rcnn_cfg = model.rpn_head, model.test_cfg.rpn, model.test_cfg.rcnn
        self.anchors = _Anchors(self.rpn, self.sizes(), self.rpn_cfg.nms_pre)
        heads = model.roi_head
        self.bbox_rois, self.bbox_head = _Rois(heads.bbox_roi_extractor), heads.bbox_head
        self.decode = _Boxes(self.bbox_head.bbox_coder)
        self.mask_head = heads.mask_head if heads.with_mask else None
        self.mask_rois = _Rois(heads.mask_roi_extractor) if heads.with_mask else None
        self.outputs = OUTPUTS[: 4 if heads.with_mask else 3]
        self.mask_threshold = self.rcnn_cfg.get("mask_thr_binary", 0.5)

    def forward(self, pixels: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.features(pixels)
        boxes, scores, labels = self._classify(features, self._propose(features, size), size)
        if self.mask_head is None:
            return boxes, scores, labels
        return boxes, scores, labels, self._mask(features, boxes, labels)

    def _propose(self, features: Sequence[torch.Tensor], size: torch.Tensor) -> torch.Tensor:
        """Return boxes (n, 4) that may contain an object, from the region proposal network."""
        boxes, scores, _, levels = self.anchors(*self.rpn(features), size)
        keep = _is_large(boxes, self.rpn_cfg).nonzero()[:, 0]
        boxes, scores, levels = boxes[keep], scores[keep], levels[keep]
        iou, limit = self.rpn_cfg.nms.iou_threshold, self.rpn_cfg.max_per_img
        return boxes[_suppress(boxes, scores, levels, iou, limit, max(self.img_size))]

    def _classify(
        self, features: Sequence[torch.Tensor], proposals: torch.Tensor, size: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        logits, deltas = self.bbox_head(self.bbox_rois(features, proposals))  # (n, C+1) (n, 4·C)
        scores = logits.softmax(dim=-1)[:, :-1]  # the last one is background
        classes = scores.shape[1]
        deltas = deltas.reshape(-1, 1 if self.bbox_head.reg_class_agnostic else classes, 4)
        boxes = self.decode(proposals[:, None], deltas, size).expand(-1, classes, 4).reshape(-1, 4)  # (n·C, 4)
        scores = scores.reshape(-1)
        keep = (scores > self.rcnn_cfg.score_thr).nonzero()[:, 0]
        boxes, scores, labels = boxes[keep], scores[keep], keep % classes
        iou, limit = self.rcnn_cfg.nms.iou_threshold, self.rcnn_cfg.max_per_img
        keep = _suppress(boxes, scores, labels, iou, limit, max(self.img_size))
        return boxes[keep], scores[keep], labels[keep]

    def _mask(self, features: Sequence[torch.Tensor], boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return (n, 28, 28), the probabilities of each box's own class."""
        masks = self.mask_head(self.mask_rois(features, boxes))  # (n, C, 28, 28)
        if self.mask_head.class_agnostic:
            labels = torch.zeros_like(labels)
        index = labels[:, None, None, None].expand(-1, 1, masks.shape[2], masks.shape[3])
        return masks.gather(1, index)[:, 0].sigmoid()


GRAPHS: dict[str, type[RetinaNetGraph | MaskRCNNGraph]] = {
    "RetinaNet": RetinaNetGraph,
    "MaskRCNN": MaskRCNNGraph,
    "FasterRCNN": MaskRCNNGraph,
}


def create_graph(model: "BaseDetector", img_size: tuple[int, int]) -> RetinaNetGraph | MaskRCNNGraph:
    """Return a Mask R-CNN, Faster R-CNN or RetinaNet with MMDetection's own heads as a graph for images of one size.

    Raises:
        InputError: it is another detector.
    """
    kind = type(model).__name__
    if kind not in GRAPHS:
        raise InputError(f"{kind} cannot be exported; choose from {', '.join(GRAPHS)}")
    _check_parts(dict(model.named_modules()))
    if not model.data_preprocessor._channel_conversion:
        raise InputError("a detector that is fed BGR cannot be exported; set bgr_to_rgb=True of its data_preprocessor")
    _check_test_cfg(model.test_cfg)
    return GRAPHS[kind](model, img_size).eval()


PARTS = {
    "bbox_head": ("RetinaHead",),
    "rpn_head": ("RPNHead",),
    "roi_head": ("StandardRoIHead",),
    "roi_head.bbox_head": ("Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead", "ConvFCBBoxHead"),
    "roi_head.mask_head": ("FCNMaskHead",),
    "roi_head.bbox_roi_extractor": ("SingleRoIExtractor",),
    "roi_head.mask_roi_extractor": ("SingleRoIExtractor",),
}
"""MMDetection's classes that the graphs stand for, by the modules' names in a detector."""


def _check_parts(modules: dict[str, nn.Module]) -> None:
    """Raise InputError where a part does something that the graphs do not."""
    for name, kinds in PARTS.items():
        if name in modules and type(modules[name]).__name__ not in kinds:
            other = type(modules[name]).__name__
            raise InputError(f"{other} as {name} cannot be exported; choose {' or '.join(kinds)}")
    for name, module in modules.items():
        coder = getattr(module, "bbox_coder", None)
        if coder is not None and type(coder).__name__ != "DeltaXYWHBBoxCoder":
            raise InputError(f"{type(coder).__name__} of {name} cannot be exported; choose DeltaXYWHBBoxCoder")
        if not getattr(module, "use_sigmoid_cls", True):
            raise InputError(f"{name} with a softmax cannot be exported; choose a loss with use_sigmoid=True")


def _check_test_cfg(cfg: ConfigDict | None) -> None:
    """Raise InputError where the detector's non-maximum suppression is another than the graphs'."""
    if not cfg:
        raise InputError("the config's model has no test_cfg, which says which detections are kept")
    for part in [cfg.rpn, cfg.rcnn] if "rpn" in cfg else [cfg]:
        if part.nms.get("type", "nms") != "nms" or part.nms.get("class_agnostic"):
            raise InputError(f"NMS {dict(part.nms)} cannot be exported; choose dict(type='nms', iou_threshold=…)")
