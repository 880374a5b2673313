"""A small COCO dataset and a config for it, which several test files share."""

import ast
import functools
import json
from pathlib import Path

import numpy as np
from mmengine.runner import runner
from PIL import Image
from yapf.yapflib import yapf_api

from shvit.detection.coco.annotations import inspect
from shvit.detection.coco.objects import Use
from tests.conftest import TINY

format_code = yapf_api.FormatCode


def leave_as_it_is(text: str, **options: object) -> tuple[str, bool]:
    """Return a text that is Python unformatted; yapf takes half a second for a config, six times a run."""
    try:
        ast.parse(text)
    except SyntaxError:
        return format_code(text, **options)
    return text, True


yapf_api.FormatCode = leave_as_it_is
runner.collect_env = functools.cache(runner.collect_env)  # which asks compilers for their versions, each run

CLASSES = ("red", "blue")


def write_coco(folder: Path, images: int = 8) -> Path:
    """Images of 96×128 pixels with red and blue rectangles in noise, `images/` and `annotations.json`."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    entries, annotations = [], []
    for number in range(images):
        pixels = rng.integers(0, 100, (96, 128, 3), dtype=np.uint8)
        for _ in range(3):
            label = int(rng.integers(2))
            width, height = (int(side) for side in rng.integers(20, 60, 2))
            x, y = int(rng.integers(128 - width)), int(rng.integers(96 - height))
            pixels[y : y + height, x : x + width, 2 * label] = 230
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
                }
            )
        name = f"{number}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        entries.append({"id": number, "file_name": name, "width": 128, "height": 96})
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def write_config(path: Path, kind: str, coco: Path, dim: int = 16) -> Path:
    """A config for that dataset with a SHViT of 40 thousand parameters and heads of `dim` channels; two epochs."""
    masks = kind == "mask-rcnn"
    fields = {name: TINY[name] for name in ("embed_dim", "depth", "partial_dim")}
    heads = (
        f"""
    rpn_head=dict(in_channels={dim}, feat_channels={dim}),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels={dim}),
        bbox_head=dict(in_channels={dim}, fc_out_channels=32, num_classes=2),
        mask_roi_extractor=dict(out_channels={dim}),
        mask_head=dict(in_channels={dim}, conv_out_channels={dim}, num_convs=1, num_classes=2),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(score_thr=0.01)),"""
        if masks
        else f"""
    bbox_head=dict(in_channels={dim}, feat_channels={dim}, stacked_convs=1, num_classes=2),
    test_cfg=dict(score_thr=0.001),"""
    )
    masked = ", with_mask=True" if masks else ""
    path.write_text(f"""_base_ = "{{{{$SHVIT_CONFIGS:{_configs()}}}}}/{kind}_shvit-s1_fpn_1x_coco.py"

model = dict(
    backbone=dict(init_cfg=None, **{fields!r}),
    neck=dict(in_channels={list(TINY["embed_dim"])}, out_channels={dim}),{heads}
)
train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadAnnotations", with_bbox=True{masked}),
    dict(type="Resize", scale=(128, 96), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="Resize", scale=(128, 96), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True{masked}),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
data = dict(
    metainfo=dict(classes={CLASSES!r}),
    data_root="{coco}/",
    ann_file="annotations.json",
    data_prefix=dict(img="images/"),
    serialize_data=False,  # which a look through all of the process's memory comes with, twice for a dataset
)
loading = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline, **data), **loading)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data), **loading)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="{coco}/annotations.json")
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = []
train_cfg = dict(max_epochs=2, val_interval=2)
randomness = dict(seed=0)
""")
    return path


def _configs() -> Path:
    """The folder that the variable stands for by default, so that MMDetection's own tools find it too."""
    from shvit.detection.parsing.reader import CONFIGS

    return CONFIGS


# --- changed annotations ----------------------------------------------------------------------------------------------

CORNERS = {"bbox": lambda a: [a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]]}
CENTERS = {"bbox": lambda a: [a["bbox"][0] + a["bbox"][2] / 2, a["bbox"][1] + a["bbox"][3] / 2, *a["bbox"][2:]]}
PARTS = {"bbox": lambda a: [a["bbox"][0] / 128, a["bbox"][1] / 96, a["bbox"][2] / 128, a["bbox"][3] / 96]}
LEARN = Use(CLASSES, masks=True, learn=True, filter_empty=True, min_size=32)


def changed(coco, tmp_path, change):
    """A file beside, after `change` has been at its content."""
    content = json.loads((coco / "annotations.json").read_text())
    change(content)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    return path


def report_of(coco, tmp_path, change, use=LEARN):
    return inspect(changed(coco, tmp_path, change), coco / "images", use)


def every(entries, **fields):
    """Updates all; a value that can be called is called with the entry."""

    def change(content):
        for entry in content[entries]:
            entry.update({key: value(entry) if callable(value) else value for key, value in fields.items()})

    return change


def without(entries, field):
    return lambda content: [entry.pop(field) for entry in content[entries]]


def first(entries, **fields):
    return lambda content: content[entries][0].update(fields)
