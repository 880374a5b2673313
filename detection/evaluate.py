"""COCO average precision and latency of detectors."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmengine.config import Config

from shvit.errors import InputError

from .detector import Detect, Detections
from .parsing.config import innermost, metrics_of, quiet
from .plugin.transforms import name_images
from .verify import Match, Matching

if TYPE_CHECKING:
    from mmdet.datasets import CocoDataset
    from mmdet.evaluation import CocoMetric
    from mmdet.structures import DetDataSample

FIGURES = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
"""COCO's figures, for boxes and for masks; s, m and l are the objects' sizes."""

Progress = Callable[[Iterable[int]], Iterable[int]]  # wraps an iterable and shows a progress bar


@dataclass(frozen=True)
class DetectionResult:
    """Accuracy and latency of one detector on a config's test images."""

    ap: dict[str, float]
    """COCO's figures in percent: bbox_mAP, bbox_mAP_50, … and for masks segm_mAP, …; -1 where a size does not occur."""
    latency_ms_p50: float
    """Median time from the prepared image to boxes and masks in the image's pixels."""


@dataclass(frozen=True)
class Evaluation:
    """Several detectors on the same images."""

    n: int
    results: dict[str, DetectionResult]
    match: Match | None
    """Match of the second detector with the first; None unless there are two and the first detects anything."""
    latency_ratio: float | None
    """Median over the images of the second detector's time divided by the first's, measured in alternation."""


def evaluate(
    config: Config, detectors: Mapping[str, Detect], pipeline: Sequence[Any], progress: Progress
) -> Evaluation:
    """Run every test image of a config through every detector, in alternation, and score them with mmdet's metric.

    Args:
        detectors: one or two, by name.
        pipeline: transforms that prepare an image for them.

    Raises:
        InputError: the dataset is empty.
    """
    from mmdet.registry import DATASETS

    dataset_config = innermost(config.test_dataloader.dataset).copy()
    dataset_config.update(pipeline=list(pipeline), test_mode=True)
    name_images(dataset_config)
    with quiet():
        dataset = DATASETS.build(dataset_config)
    if not len(dataset):
        raise InputError(f"{dataset_config.ann_file}: has no images to evaluate on")
    with quiet():
        metrics = {name: _metric(config, dataset) for name in detectors}
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    matching = Matching() if len(detectors) == 2 else None
    for index in progress(range(len(dataset))):
        image = dataset[index]
        by_name = {}
        for name in list(detectors)[:: 1 if index % 2 else -1]:
            begin = time.perf_counter()
            by_name[name] = detectors[name](image)
            seconds[name].append(time.perf_counter() - begin)
        for name, metric in metrics.items():
            metric.process({}, [_sample(by_name[name], image["data_samples"])])
        if matching is not None:
            matching.add(*(by_name[name] for name in detectors))
    results = {}
    for name, metric in metrics.items():
        with quiet():
            scores = metric.evaluate(size=len(dataset))  # empty for a detector without detections
        scores = scores or {f"{kind}_{figure}": 0.0 for kind in metric.metrics for figure in FIGURES}
        ap = {key.removeprefix("coco/"): percent(value) for key, value in scores.items()}
        results[name] = DetectionResult(ap, 1000 * statistics.median(seconds[name]))
    if matching is None:
        return Evaluation(len(dataset), results, None, None)
    first, second = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return Evaluation(len(dataset), results, matching.figures() if matching.of_model else None, ratio)


def _metric(config: Config, dataset: "CocoDataset") -> "CocoMetric":
    from mmdet.registry import METRICS

    metrics = metrics_of(config.test_evaluator)
    if len(metrics) != 1 or metrics[0].type.rpartition(".")[2] != "CocoMetric":
        raise InputError(f"{config.filename}: test_evaluator must be one CocoMetric to evaluate with")
    metric = METRICS.build(metrics[0])
    metric.dataset_meta = dataset.metainfo
    return metric


def _sample(detections: Detections, sample: "DetDataSample") -> dict[str, Any]:
    """Return detections in the form that MMDetection's metrics take."""
    instances = {"bboxes": detections.boxes, "scores": detections.scores, "labels": detections.labels}
    if detections.masks is not None:
        instances["masks"] = detections.masks
    return {"pred_instances": instances, "img_id": sample.img_id, "ori_shape": sample.ori_shape}


def percent(value: float) -> float:
    """Return a COCO figure, which has three digits, in percent; -1 (does not occur) stays."""
    return round(100 * value, 1) if value >= 0 else -1.0
