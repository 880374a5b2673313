"""Annotation files as MMDetection reads them: with the repairs that the check makes.

Importing it, as a config does with `custom_imports`, has MMDetection's dataset and metric read files through
`AnnotationFile`.
"""

from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import coco_metric

from .coco import load_content, repair


class AnnotationFile(COCO):
    """pycocotools' COCO of a file that `load_content` reads and `repair` has been at.

    A file without quirks is read as pycocotools itself reads it.
    """

    def __init__(self, annotation_file: str | None = None) -> None:
        super().__init__()
        if annotation_file is not None:
            self.dataset = load_content(Path(annotation_file))
            repair(self.dataset)
            self.createIndex()
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


CocoDataset.COCOAPI = AnnotationFile
coco_metric.COCO = AnnotationFile
