"""COCO average precision of anything that detects, and how long it takes."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config

from shvit.errors import InputError

from .detector import Detect, Detections
from .parsing.config import innermost, metrics_of, quiet
from .plugin.transforms import named_images
from .verify import Match, Matching

FIGURES = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
"""COCO's, of boxes and of masks; s, m and l are the objects' sizes."""


@dataclass(frozen=True)
class DetectionResult:
    """Accuracy and latency of one detector on a config's test images."""

    ap: dict[str, float]
    """COCO's figures in percent: bbox_mAP, bbox_mAP_50, … and of masks segm_mAP, …; -1 where a size does not occur."""
    latency_ms_p50: float
    """From the prepared image to boxes and masks in its own pixels."""


@dataclass(frozen=True)
class Evaluation:
    """Several detectors on the same images."""

    n: int
    results: dict[str, DetectionResult]
    match: Match | None
    """Of the second detector with the first, where there are two and the first finds anything."""
    latency_ratio: float | None
    """Median over the images of the second's time by the first's, measured in turns."""


def evaluate(config: Config, detectors: Mapping[str, Detect], pipeline: Sequence[Any], progress: Any) -> Evaluation:
    """Runs every test image of the config through every detector, in turns, and scores them with mmdet's metric.

    Args:
        detectors: one or two, by name.
        pipeline: transforms that prepare an image for them.
        progress: wraps an iterable and shows how far it is.

    Raises:
        InputError: the dataset is empty.
    """
    from mmdet.registry import DATASETS

    dataset_config = innermost(config.test_dataloader.dataset).copy()
    dataset_config.update(pipeline=list(pipeline), test_mode=True)
    with quiet():
        dataset = DATASETS.build(dataset_config)
    if not len(dataset):
        raise InputError(f"{dataset_config.ann_file}: has no images to evaluate on")
    with quiet():
        metrics = {name: _metric(config, dataset) for name in detectors}
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    matching = Matching() if len(detectors) == 2 else None
    for index in progress(range(len(dataset))):
        with named_images():
            image = dataset[index]
        turn = list(detectors)[:: 1 if index % 2 else -1]
        by_name = {}
        for name in turn:
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
            scores = metric.evaluate(size=len(dataset)) or _nothing(metric)
        ap = {key.removeprefix("coco/"): percent(value) for key, value in scores.items()}
        results[name] = DetectionResult(ap, 1000 * statistics.median(seconds[name]))
    if matching is None:
        return Evaluation(len(dataset), results, None, None)
    first, second = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
    return Evaluation(len(dataset), results, matching.figures() if matching.of_model else None, ratio)


def _metric(config: Config, dataset: Any) -> Any:
    from mmdet.registry import METRICS

    metrics = metrics_of(config.test_evaluator)
    if len(metrics) != 1 or metrics[0].type.rpartition(".")[2] != "CocoMetric":
        raise InputError(f"{config.filename}: test_evaluator must be one CocoMetric to evaluate with")
    metric = METRICS.build(metrics[0])
    metric.dataset_meta = dataset.metainfo
    return metric


def _nothing(metric: Any) -> dict[str, float]:
    """The figures where not one object was found, which mmdet leaves out."""
    return {f"{kind}_{name}": 0.0 for kind in metric.metrics for name in FIGURES}


def _sample(detections: Detections, sample: Any) -> dict[str, Any]:
    """As MMDetection's metrics take what was found."""
    instances = {"bboxes": detections.boxes, "scores": detections.scores, "labels": detections.labels}
    if detections.masks is not None:
        instances["masks"] = detections.masks
    return {"pred_instances": instances, "img_id": sample.img_id, "ori_shape": sample.ori_shape}


def percent(value: float) -> float:
    """Of COCO's figures, which have three digits; -1 of what does not occur stays."""
    return round(100 * value, 1) if value >= 0 else -1.0
