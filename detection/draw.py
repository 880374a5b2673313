"""Detections drawn on their image by MMDetection's visualizer."""

from pathlib import Path

from shvit.errors import InputError, printable
from shvit.files import atomic_write

from .detector import Detections


def draw(path: Path, detections: Detections, classes: tuple[str, ...], output: Path) -> None:
    """Write an image with boxes, names, scores and masks as a .png; raise InputError if `output` cannot be written."""
    import mmcv
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.structures import InstanceData

    instances = InstanceData(bboxes=detections.boxes, scores=detections.scores, labels=detections.labels)
    if detections.masks is not None:
        instances.masks = detections.masks
    sample = DetDataSample(pred_instances=instances)
    visualizer = DetLocalVisualizer()
    plain = tuple(printable(name).replace("$", r"\$") for name in classes)  # between dollars, Matplotlib reads formulas
    visualizer.dataset_meta = {"classes": plain, "palette": "random"}
    image = mmcv.imread(str(path), channel_order="rgb")
    with atomic_write(output) as partial:
        visualizer.add_datasample(
            path.name, image, sample, draw_gt=False, pred_score_thr=0.0, out_file=str(partial), show=False
        )
        if not partial.is_file():
            raise InputError(f"{output}: cannot be written")
