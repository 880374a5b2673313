"""The reading of annotation files by MMDetection, with the repairs that the check makes.

Importing it, as a config does with `custom_imports`, has MMDetection's dataset and metric read files through
`AnnotationFile`.
"""

from collections.abc import Sequence
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import coco_metric

from shvit.weights.run_info import same_name

from ..coco.content import is_zero_box, load_content, repair


class AnnotationFile(COCO):
    """pycocotools' COCO of a file that `load_content` reads and `repair` repairs.

    Boxes without width or height are left out: MMDetection does not learn from them, and would evaluate against them as
    objects that nothing can find. A file without quirks is read as pycocotools itself reads it.
    """

    def __init__(self, annotation_file: str | None = None) -> None:
        super().__init__()
        if annotation_file is not None:
            self.dataset = load_content(Path(annotation_file))
            repair(self.dataset)
            self.dataset["annotations"] = [
                each for each in self.dataset["annotations"] if not is_zero_box(each.get("bbox"))
            ]
            self.createIndex()
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def get_cat_ids(
        self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids: Sequence[int] = ()
    ) -> list[int]:
        """Return ids of categories, whichever way the accents in `cat_names` are written."""
        names = [cat_names] if isinstance(cat_names, str) else cat_names
        return super().get_cat_ids([same_name(name) for name in names], sup_names, cat_ids)


CocoDataset.COCOAPI = AnnotationFile
coco_metric.COCO = AnnotationFile
