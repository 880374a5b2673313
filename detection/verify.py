"""Comparison of an exported detector with its model, detection by detection, and its certificate."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from shvit.certificate import Envelope
from shvit.environment import versions
from shvit.errors import CheckFailed, InputError
from shvit.files import sha256

from .detector import Detect, Detections, PreparedImage
from .onnx import DetectorSpec, OnnxDetector

COUNTED = 0.1
"""Detections of at least this score are counted; near score_thr (0.05) rounding decides which are kept at all."""

SAME = 0.5
"""IoU from which two boxes of one class can be the same object."""


@dataclass(frozen=True)
class Match:
    """The difference between a model's and its artifact's detections, over some images."""

    images: int
    detections: int
    """Number of the model's detections with a score of at least `COUNTED`."""
    matched_percent: float
    """Percentage of these, and of the artifact's, that have a counterpart of the same class in the other's."""
    box_iou_mean: float
    box_iou_lowest: float
    mask_iou_mean: float | None
    """None for a detector without masks."""
    mask_iou_lowest: float | None
    score_error: float
    """Largest difference of a matched pair's scores."""


@dataclass(frozen=True)
class Bounds:
    """Tolerance of an artifact. Rounding may change one of many decisions of NMS, which moves a box by pixels."""

    matched_percent: float = 99.0
    box_iou_mean: float = 0.995
    mask_iou_mean: float = 0.99
    score_error: float = 0.01


@dataclass(frozen=True, kw_only=True)
class DetectionCertificate(Envelope):
    """Certificate of an exported detector: its description, and its differences from its model."""

    spec: DetectorSpec
    match: Match
    bounds: Bounds


def pair(reference: Detections, other: Detections) -> list[tuple[int, int, float]]:
    """Return (index in `reference`, index in `other`, IoU of the boxes) of each object that both have, each used once.

    The pairs of one class are those with the largest sum of overlaps.
    """
    from scipy.optimize import linear_sum_assignment
    from torchvision.ops import box_iou

    if not len(reference) or not len(other):
        return []
    overlap = box_iou(reference.boxes, other.boxes)  # not a number of two boxes without area
    alike = ((reference.boxes[:, None] - other.boxes).abs().amax(dim=-1) < 0.5).float()
    overlap = torch.where(overlap.isfinite(), overlap, alike) * (reference.labels[:, None] == other.labels)
    rows, columns = linear_sum_assignment(overlap.numpy(), maximize=True)
    pairs = zip(rows.tolist(), columns.tolist(), overlap[rows, columns].tolist(), strict=True)
    return [each for each in pairs if each[2] >= SAME]


class Matching:
    """The figures of two detectors, collected image by image, without keeping their detections."""

    def __init__(self) -> None:
        self.images = self.of_model = self.counted = self.matched = 0
        self.box_ious: list[float] = []
        self.mask_ious: list[float] = []
        self.errors: list[float] = []

    def add(self, reference: Detections, other: Detections) -> None:
        """Add one image's detections, the model's and the artifact's."""
        pairs = pair(reference, other)
        self.images += 1
        self.of_model += int((reference.scores >= COUNTED).sum())
        sides = ((reference.scores, {i for i, _, _ in pairs}), (other.scores, {j for _, j, _ in pairs}))
        for scores, indices in sides:
            sure = (scores >= COUNTED).nonzero()[:, 0].tolist()
            self.counted += len(sure)
            self.matched += len(indices.intersection(sure))
        for i, j, iou in pairs:
            if max(reference.scores[i], other.scores[j]) < COUNTED:
                continue
            self.box_ious.append(iou)
            self.errors.append((reference.scores[i] - other.scores[j]).abs().item())
            if reference.masks is not None and other.masks is not None:
                self.mask_ious.append(_mask_iou(reference.masks[i], other.masks[j]))

    def figures(self) -> Match:
        """Return the figures over all images so far; raise InputError if the model finds nothing to compare."""
        if not self.of_model:
            raise InputError(
                f"the detector finds nothing with a score of {COUNTED} on {self.images} images, so that there is "
                "nothing to compare; give trained weights, or --images with images of its objects"
            )
        return Match(
            images=self.images,
            detections=self.of_model,
            matched_percent=100 * self.matched / self.counted,
            box_iou_mean=sum(self.box_ious) / len(self.box_ious) if self.box_ious else 0.0,
            box_iou_lowest=min(self.box_ious, default=0.0),
            mask_iou_mean=sum(self.mask_ious) / len(self.mask_ious) if self.mask_ious else None,
            mask_iou_lowest=min(self.mask_ious, default=None),
            score_error=max(self.errors, default=1.0),
        )


def _mask_iou(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the IoU of two masks (H, W); 1 of two that are empty, such as those of boxes without area."""
    union = (first | second).sum().item()
    return (first & second).sum().item() / union if union else 1.0


def holds(match: Match, bounds: Bounds) -> bool:
    """Return whether the figures keep to the bounds."""
    return (
        match.matched_percent >= bounds.matched_percent
        and match.box_iou_mean >= bounds.box_iou_mean
        and (match.mask_iou_mean is None or match.mask_iou_mean >= bounds.mask_iou_mean)
        and match.score_error <= bounds.score_error
    )


def certify(
    artifact: OnnxDetector, model: Detect, images: Iterable[PreparedImage], source: str, checkpoint: Path, name: str
) -> DetectionCertificate:
    """Run prepared images through model and artifact, and return the certificate with their differences.

    Args:
        images: prepared at the artifact's size.
        source: where they are from, for the certificate.
        checkpoint: the file with the model's weights, for its hash.
        name: what the certificate calls the artifact.
    """
    matching = Matching()
    for image in images:
        matching.add(model(image), artifact.detect(image))
    match = matching.figures()
    bounds = Bounds()
    return DetectionCertificate(
        artifact=name,
        artifact_sha256=sha256(artifact.path),
        artifact_bytes=artifact.path.stat().st_size,
        operators=artifact.operators,
        model=artifact.spec.config,
        checkpoint=str(checkpoint),
        checkpoint_sha256=sha256(checkpoint),
        spec=artifact.spec,
        runtime="onnxruntime",
        images=match.images,
        image_source=source,
        match=match,
        bounds=bounds,
        passed=holds(match, bounds),
        reasons=() if holds(match, bounds) else (_reason(match),),
        versions=versions("shvit", "torch", "torchvision", "onnx", "onnxruntime"),
    )


def _reason(match: Match) -> str:
    return (
        f"{match.matched_percent:.1f} % of the detections match its model's, boxes by an IoU of "
        f"{match.box_iou_mean:.4f}, scores within {match.score_error:.1e}"
    )


def require(certificate: DetectionCertificate) -> None:
    """Raise CheckFailed if the artifact's detections are too far from its model's."""
    if not certificate.passed:
        message = f"{certificate.artifact} exceeds its tolerance: {_reason(certificate.match)}; it was not written"
        raise CheckFailed(message, asdict(certificate))
