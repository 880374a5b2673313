"""COCO files as tools write them, held against images that Pillow writes, and against MMDetection and pycocotools."""

import bz2
import copy
import gzip
import io
import json
import lzma
import unicodedata
import zipfile
from collections import Counter

import mmcv
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from shvit.cli import run
from shvit.detection.coco.annotations import check_annotations, check_datasets, inspect
from shvit.detection.coco.content import is_numbers, load_content
from shvit.detection.coco.headers import Reader, read_headers
from shvit.detection.coco.objects import Use
from shvit.detection.parsing.config import load_config
from shvit.errors import InputError
from tests.detection.detection_data import (
    CENTERS,
    CLASSES,
    CORNERS,
    LEARN,
    PARTS,
    changed,
    every,
    first,
    report_of,
    without,
    write_coco,
    write_config,
)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), images=4)


def test_good_annotations_pass(coco, tmp_path):
    report = report_of(coco, tmp_path, lambda content: None)
    assert not report.counts
    assert (report.images, report.annotations) == (4, 12)
    assert not report.notes


# --- problems ---------------------------------------------------------------------------------------------------------

HUGE = 10**400


@pytest.mark.parametrize(
    ("change", "kind", "number"),
    [
        # categories
        (lambda c: c["categories"].pop(), "class not in the file", 1),
        (lambda c: c["categories"].reverse(), "other order than metainfo.classes", 2),
        (lambda c: c["categories"].append({"id": 3, "name": "red"}) or c["annotations"][0].update(category_id=3),
         "class name used twice", 1),
        (lambda c: c["categories"].append({"id": 1, "name": "x"}), "category id used twice", 1),
        (lambda c: c["categories"].extend([{"id": 3}, {"name": "x"}, 7]), "no id or name", 3),
        (lambda c: c["categories"].append({"id": "x", "name": "x"}), "category ids that are text and others", 1),
        # images
        (lambda c: c["images"].extend([3, {}, {"id": [1]}, {"id": True}]), "image id missing", 4),
        (lambda c: c["images"].append(c["images"][0]), "image id used twice", 1),
        (every("images", file_name=None), "file_name missing", 4),
        (every("images", file_name=lambda e: "C:\\me\\" + e["file_name"]), "file outside of the image folder", 4),
        (every("images", file_name=lambda e: "../" + e["file_name"]), "file outside of the image folder", 4),
        (every("images", file_name=lambda e: f"/data/{e['file_name']}"), "file outside of the image folder", 4),
        (every("images", file_name=lambda e: "a" * 5000), "file not readable", 4),
        (every("images", width="128"), "width or height missing or not a number", 4),
        (without("images", "height"), "width or height missing or not a number", 4),
        (first("images", width=float("inf")), "width or height missing or not a number", 1),
        (first("images", width=HUGE), "width or height missing or not a number", 1),
        (lambda c: c["images"].append({**c["images"][0], "id": 9}), "same file under several ids", 1),
        (lambda c: c["images"].append({**c["images"][0], "id": "x"}), "image ids that are text and others", 1),
        # annotations
        (every("annotations", id=7), "annotation id used twice", 11),
        (lambda c: c["annotations"].extend([None, [], 3]), "not an annotation", 3),
        (every("annotations", image_id=lambda e: str(e["image_id"])), "image_id that is text", 12),
        (every("annotations", image_id=77), "image_id of no image", 12),
        (first("annotations", image_id="²"), "image_id of no image", 1),
        (every("annotations", category_id=lambda e: str(e["category_id"])), "category_id that is text", 12),
        (every("annotations", category_id=HUGE), "category_id that the file does not define", 12),
        (first("annotations", category_id=[1]), "category_id that the file does not define", 1),
        (every("annotations", bbox=[0, 0, -3, 4]), "bbox is not", 12),
        (every("annotations", bbox=[0, 0, float("nan"), 4]), "bbox is not", 12),
        (every("annotations", bbox=["1", "2", "3", "4"]), "bbox is not", 12),
        (first("annotations", bbox=[0, 0, HUGE, 4]), "bbox is not", 1),
        (without("annotations", "bbox"), "bbox is not", 12),
        (first("annotations", bbox=[200, 0, 20, 20]), "bbox outside of the image", 1),
        (first("annotations", bbox=[-30, 0, 30, 20]), "bbox outside of the image", 1),
        (first("annotations", area="x"), "area is not a number", 1),
        (first("annotations", area=float("nan")), "area is not a number", 1),
        (first("annotations", iscrowd="no"), "iscrowd is not 0 or 1", 1),
        # forms of boxes
        (every("annotations", **CORNERS), "bbox is [x1, y1, x2, y2]", 12),
        (every("annotations", **CORNERS, segmentation=[]), "bbox is [x1, y1, x2, y2]", 12),
        (every("annotations", **CENTERS), "bbox is [center x", 12),
        (every("annotations", **CENTERS, segmentation=[]), "bbox is [center x", 12),
        (every("annotations", **PARTS), "bbox is normalized", 12),
        # masks
        (every("annotations", segmentation=[]), "no polygon", 12),
        (without("annotations", "segmentation"), "no polygon", 12),
        (every("annotations", segmentation=lambda e: e["segmentation"][0]), "polygon not in a list", 12),
        (every("annotations", segmentation=lambda e: np.reshape(e["segmentation"], (-1, 2)).tolist()),
         "polygon of pairs", 12),
        (every("annotations", segmentation=lambda e: np.reshape(e["segmentation"], (1, -1, 2)).tolist()),
         "polygon of pairs", 12),
        (every("annotations", segmentation=lambda e: [*e["segmentation"], [1, 2, 3, 4]]), "polygon is not [x1", 12),
        (every("annotations", segmentation=[[]]), "polygon is not [x1", 12),
        (every("annotations", segmentation=[["1", "2", "3", "4", "5", "6"]]), "polygon is not [x1", 12),
        (every("annotations", segmentation=[{"x": 1}]), "polygon is not [x1", 12),
        (every("annotations", segmentation=[[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]), "polygon is normalized", 12),
        (every("annotations", segmentation=[[200, 0, 220, 0, 220, 20]]), "polygon outside of the image", 12),
        (every("annotations", segmentation=[[5, 5, 9, 5, 20, 5]]), "mask is empty", 12),
        (every("annotations", segmentation={"size": [128, 96], "counts": [12288]}), "run lengths of another size", 12),
        (every("annotations", segmentation={"counts": [1]}), "run lengths of another size", 12),
        (every("annotations", segmentation={"size": [96, 128], "counts": [3, 9]}), "run lengths that are not", 12),
        (every("annotations", segmentation={"size": [96, 128], "counts": [3, -1]}), "run lengths that are not", 12),
        (every("annotations", segmentation={"size": [96, 128], "counts": "é"}), "run lengths that are not", 12),
        (every("annotations", segmentation={"size": [96, 128], "counts": ""}), "run lengths that are not", 12),
        (every("annotations", segmentation={"size": [96, 128], "counts": [128 * 96]}), "mask is empty", 12),
        # what is left
        (every("annotations", iscrowd=1), "no annotation is left to learn from", 1),
        (every("annotations", iscrowd=True), "no annotation is left to learn from", 1),
        (every("annotations", area=0), "no annotation is left to learn from", 1),
        (every("annotations", bbox=[1, 1, 0, 0]), "no annotation is left to learn from", 1),
        (lambda c: c.update(annotations=[]), "no annotation is left to learn from", 1),
        (lambda c: c.update(images=[], annotations=[]), "no annotation is left to learn from", 1),
    ],
)  # fmt: skip
def test_problems_are_counted(coco, tmp_path, change, kind, number):
    report = report_of(coco, tmp_path, change)
    found = {name: value for name, value in report.counts.items() if name.startswith(kind)}
    assert list(found.values()) == [number], report.counts
    refusal = report.refusal()
    assert "\n" not in refusal
    assert len(refusal) < 4000
    assert kind in refusal


def test_a_file_with_many_problems_is_one_refusal(coco, tmp_path):
    def change(content):
        for annotation in content["annotations"][:7]:
            annotation["segmentation"] = []
        for annotation in content["annotations"][7:]:
            annotation["category_id"] = "1"
        content["images"][0]["file_name"] = "gone\n.png"

    path = changed(coco, tmp_path, change)
    with pytest.raises(InputError) as caught:
        check_annotations(path, coco / "images", CLASSES, masks=True)
    message = str(caught.value)
    assert message.startswith(f"{path}: 13 problems: file not found: 1 image (")
    assert "7 annotations (draw them, or train RetinaNet or Faster R-CNN" in message
    assert "category_id that is text where the file's ids are numbers: 5 annotations" in message
    listed = message.partition("first ten: ")[2]
    assert listed.startswith(r"image 0 (gone\n.png), annotation 1, annotation 2, ")
    assert listed.count("annotation ") == 9
    assert "\n" not in message


def test_what_is_not_a_coco_file_is_one_line(coco, tmp_path):
    for text in ("{", "[]", '{"images": {}}', '{"images": [], "annotations": null, "categories": []}', "9" * 6000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(InputError, match="not a COCO annotation file") as caught:
            load_content(tmp_path / "a.json")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such annotation file"):
        load_content(tmp_path / "b.json")
    (tmp_path / "a.json").write_bytes('{"images": ["é"]}'.encode("latin-1"))
    with pytest.raises(InputError, match="save it as UTF-8"):
        load_content(tmp_path / "a.json")


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_compressed_files_are_named(tmp_path, pack, name):
    (tmp_path / "a.json").write_bytes(pack(b'{"images": []}'))
    with pytest.raises(InputError, match=rf"a.json: is compressed \({name}\); unpack it") as caught:
        load_content(tmp_path / "a.json")
    assert str(caught.value).startswith(str(tmp_path))


def test_a_zip_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.json", "w") as file:
        file.writestr("annotations.json", "{}")
    with pytest.raises(InputError, match=r"is compressed \(zip\)"):
        load_content(tmp_path / "a.json")


def test_json_lines_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"id": 1}\n{"id": 2}\n')
    with pytest.raises(InputError, match=r"file \(it has a JSON value on each line, as JSON Lines; write one object"):
        load_content(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"id": 1} {"id": 2}')
    with pytest.raises(InputError, match="Extra data"):
        load_content(tmp_path / "a.json")


def test_missing_files_are_looked_for(coco, tmp_path):
    report = report_of(coco, tmp_path, every("images", file_name=lambda e: f"images\\{e['file_name']}"))
    assert report.counts["file not found"] == 4
    assert f"all are below {coco}: set data_prefix's img to that folder" in report.refusal()
    report = report_of(coco, tmp_path, first("images", file_name="0.JPG"))
    assert "image 0 (0.JPG) (there is '0.png')" in report.refusal()
    report = report_of(coco, tmp_path, every("images", file_name=lambda e: f"../media/upload/{e['file_name']}"))
    assert "(the folder has '0.png': leave out what stands before it)" in report.refusal()


# --- what is sound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (every("annotations", category_id=lambda e: float(e["category_id"])), ""),
        (every("images", width=128.0, height=96.0), ""),
        (every("images", license=1), ""),
        (lambda c: c["annotations"].reverse(), ""),
        (lambda c: c["images"].reverse(), ""),
        (lambda c: c["categories"].append({"id": 0, "name": "things"}), ""),
        (lambda c: c["categories"].insert(0, {"id": 0, "name": "red"}),
         "category 0 is unused and is called 'red' like category 1"),
        (lambda c: c["categories"].insert(0, {"id": 3, "name": "green"}) or c["annotations"][0].update(category_id=3),
         "1 annotation of 1 category that metainfo.classes does not have (green) are left out"),
        (without("annotations", "area"), "12 annotations without area: computed"),
        (without("annotations", "iscrowd"), ""),
        (every("annotations", iscrowd=False), ""),
        (every("annotations", id=lambda e: f"a{e['id']}"), "annotation ids that are absent, text or below 1"),
        (every("annotations", id=lambda e: e["id"] - 1), "annotation ids that are absent, text or below 1"),
        (without("annotations", "id"), "annotation ids that are absent, text or below 1"),
        (first("annotations", bbox=[100, 50, 40, 20], segmentation=[[100, 50, 128, 50, 128, 70, 100, 70]]),
         "1 box beyond the image by more than 2 px (up to 12)"),
        (first("images", width=127), "the size of 1 image is a pixel off"),
    ],
)  # fmt: skip
def test_what_is_sound_passes_and_is_noted(coco, tmp_path, change, note):
    report = report_of(coco, tmp_path, change)
    assert not report.counts, report.refusal()
    assert any(note in line for line in report.notes) if note else not report.notes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_any_encoding_of_json_is_read(tmp_path, encoding):
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "кошка"}]}
    (tmp_path / "a.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    assert load_content(tmp_path / "a.json") == content
    from mmdet.datasets import CocoDataset

    from shvit.detection.plugin import reading  # noqa: F401

    assert CocoDataset.COCOAPI(str(tmp_path / "a.json")).get_cat_ids(cat_names=["кошка"]) == [1]


def test_loose_boxes_are_not_taken_for_another_form(coco, tmp_path):
    """Boxes that are larger than their polygons, or reach beyond the image, are what their annotator drew."""
    wide = every(
        "annotations", bbox=lambda e: [e["bbox"][0] - 9, e["bbox"][1] - 9, e["bbox"][2] + 18, e["bbox"][3] + 18]
    )
    for use in (LEARN, Use(CLASSES, masks=False, learn=True)):
        assert not report_of(coco, tmp_path, wide, use).counts


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flag", ["color", "color_ignore_orientation"])
def test_the_loaded_size_is_mmcvs(tmp_path, kind, orientation, flag):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image"
    with io.BytesIO() as file:
        image = Image.new("RGB", (12, 8))
        image.save(file, kind, exif=exif, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
        path.write_bytes(file.getvalue())
    header = read_headers([path])[path]
    assert header.format == kind
    for backend in ("cv2", "pillow"):
        expected = mmcv.imfrombytes(path.read_bytes(), flag=flag, backend=backend).shape[1::-1]
        assert Reader(flag, backend).loaded(header) == expected, backend


def turned(folder, orientation, before):
    """Four images that Exif turns, with annotations of what is shown; the JSON has the size before or after."""
    coco = write_coco(folder, images=4)
    content = json.loads((coco / "annotations.json").read_text())
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image in content["images"]:
        path = coco / "images" / image["file_name"]
        pixels = Image.open(path)
        if orientation > 4:
            pixels = pixels.transpose(Image.Transpose.ROTATE_90)
        image["file_name"] = path.with_suffix(".jpg").name
        pixels.save(path.with_suffix(".jpg"), exif=exif)
        if before:
            image["width"], image["height"] = pixels.size
    (coco / "annotations.json").write_text(json.dumps(content))
    return inspect(coco / "annotations.json", coco / "images", LEARN)


def test_exif_is_what_the_reader_makes_of_it(tmp_path):
    assert not turned(tmp_path / "after", 6, before=False).counts
    report = turned(tmp_path / "before", 6, before=True)
    kind = "size is the one before Exif turns the image, and it is loaded turned"
    assert report.counts == {kind: 4}
    assert "is 96×128 in the file and 128×96 as loaded" in report.refusal()
    report = turned(tmp_path / "mirrored", 3, before=False)
    assert not report.counts
    assert report.notes == ["Exif turns or mirrors 4 images without a change of size: annotate as shown"]


def test_sizes_are_held_against_the_header(coco, tmp_path):
    kind = "size differs from the image's"
    report = report_of(coco, tmp_path, every("images", width=64, height=48))
    assert report.counts == {kind: 4}
    assert "image 0 (0.png) is 64×48 in the file and 128×96 as loaded, 2 times as large" in report.refusal()
    report = report_of(coco, tmp_path, every("images", width=96, height=128))
    assert "width and height exchanged" in report.refusal()
    report = report_of(coco, tmp_path, first("images", width=125))
    assert report.counts == {kind: 1}


def test_files_that_are_no_images_are_named(tmp_path):
    coco = write_coco(tmp_path, images=4)
    (coco / "images" / "1.png").write_bytes(b"nothing")
    (coco / "images" / "2.png").write_bytes(b"")
    Image.new("RGB", (128, 96)).save(coco / "images" / "3.png", "TGA")  # OpenCV does not read it
    report = inspect(coco / "annotations.json", coco / "images", LEARN)
    assert report.counts == {"file not readable": 3}
    assert "image 1 (1.png) is not an image" in report.refusal()
    assert "image 3 (3.png) is TGA, which OpenCV does not read" in report.refusal()


# --- what is left -----------------------------------------------------------------------------------------------------


def test_what_is_left_is_what_mmdetection_learns_from(tmp_path):
    """Its dataset with its filters and its reading of masks, over all that it skips."""
    from mmdet.registry import DATASETS

    coco = write_coco(tmp_path, images=9)
    content = json.loads((coco / "annotations.json").read_text())
    by_image = {number: [a for a in content["annotations"] if a["image_id"] == number] for number in range(9)}
    by_image[0][0]["iscrowd"] = 1
    by_image[0][1]["ignore"] = 1
    by_image[1][0]["bbox"] = [5, 5, 0.5, 40]
    by_image[1][1]["area"] = 0
    for annotation in by_image[2]:
        annotation["iscrowd"] = 1
    for annotation in by_image[3]:
        annotation["category_id"] = 3
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] not in (4, 5)]
    Image.new("RGB", (128, 30)).save(coco / "images" / "6.png")
    content["images"][6]["height"] = 30
    for annotation in by_image[6]:
        annotation.update(bbox=[1, 1, 20, 20], segmentation=[[1, 1, 21, 1, 21, 21]])
    del by_image[7][0]["area"]
    content["categories"].append({"id": 3, "name": "green"})
    (coco / "annotations.json").write_text(json.dumps(content))

    config = load_config(str(write_config(tmp_path / "c.py", "mask-rcnn", coco)))
    config.train_dataloader.dataset.filter_cfg = {"filter_empty_gt": True, "min_size": 32}
    (report,) = check_datasets(config, ("train",))
    dataset = DATASETS.build(config.train_dataloader.dataset)
    images, annotations = Counter(), Counter()
    for index in range(len(dataset)):
        labels = dataset[index]["data_samples"].gt_instances.labels.tolist()
        annotations.update(CLASSES[label] for label in labels)
        images.update({CLASSES[label] for label in labels})
    assert report.images == len(dataset) == 5
    assert report.annotations == annotations.total()
    assert report.by_class == {name: (images[name], annotations[name]) for name in CLASSES}
    assert report.skipped == {
        "iscrowd": 4, "with ignore set": 1, "thinner than a pixel": 1, "of area 0": 1, "of other categories": 3,
        "in images below 32 px": 3,
    }  # fmt: skip
    assert "3 images without annotations skipped (filter_empty_gt)" in report.notes
    assert "1 image with nothing on them to learn" in report.notes


def test_classes_without_annotations_are_named(coco, tmp_path):
    report = report_of(coco, tmp_path, every("annotations", category_id=1))
    assert report.by_class["blue"] == (0, 0)
    assert report.notes == ["no annotation of 1 of 2 classes: blue"]


@pytest.mark.parametrize("change", [every("annotations", iscrowd=1), lambda c: c.update(annotations=[])])
def test_there_must_be_something_to_evaluate_against(coco, tmp_path, change):
    report = report_of(coco, tmp_path, change, Use(CLASSES, masks=True, learn=False))
    assert report.counts == {"nothing to evaluate against": 1}
    assert "without validation: --options val_dataloader=None" in report.refusal()


@pytest.mark.parametrize(("ours", "theirs"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_accents_may_be_written_in_either_way(coco, tmp_path, ours, theirs):
    """As macOS and others write them; MMDetection itself finds no category then, and learns from nothing."""
    from mmdet.registry import DATASETS, METRICS

    path = changed(coco, tmp_path, lambda c: c["categories"][0].update(name=unicodedata.normalize(theirs, "café")))
    config = load_config(str(write_config(tmp_path / "c.py", "retinanet", coco)))
    config.train_dataloader.dataset.ann_file = str(path)
    config.train_dataloader.dataset.metainfo.classes = classes = (unicodedata.normalize(ours, "café"), "blue")
    config.test_dataloader.dataset.metainfo.classes = ("café", "blue")
    (report,) = check_datasets(config, ("train",))
    dataset = DATASETS.build(config.train_dataloader.dataset)
    labels = [label for item in dataset for label in item["data_samples"].gt_instances.labels.tolist()]
    assert list(report.by_class.values()) == [(3, 4), (4, 8)]
    assert [labels.count(0), labels.count(1)] == [4, 8]
    metric = METRICS.build({"type": "CocoMetric", "ann_file": str(path)})
    assert metric._coco_api.get_cat_ids(cat_names=classes) == [1, 2]


def quirks(content):
    for number, annotation in enumerate(content["annotations"]):
        del annotation["area"], annotation["iscrowd"]
        annotation["id"] = number  # pycocotools takes 0 for "not matched"
    content["categories"].insert(0, {"id": 0, "name": "red", "supercategory": "none"})
    return content


def test_a_repaired_file_is_evaluated_as_a_clean_one(coco, tmp_path):
    """What is annotated, given back as detections, has an AP of 1 in MMDetection's metric."""
    content = json.loads((coco / "annotations.json").read_text())
    (tmp_path / "a.json").write_bytes(json.dumps(quirks(copy.deepcopy(content))).encode("utf-8-sig"))
    result = own_precision(content, tmp_path / "a.json")
    assert result["coco/bbox_mAP"] == result["coco/segm_mAP"] == 1


def own_precision(content, path):
    """Figures of MMDetection's metric where what is annotated in `content` is what is found."""
    from mmdet.registry import METRICS

    from shvit.detection.plugin import reading  # noqa: F401

    metric = METRICS.build({"type": "CocoMetric", "ann_file": str(path), "metric": ["bbox", "segm"]})
    metric.dataset_meta = {"classes": CLASSES}
    for image in content["images"]:
        found = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        x, y, width, height = torch.tensor([each["bbox"] for each in found], dtype=torch.float32).T
        masks = [coco_mask.decode(coco_mask.frPyObjects(each["segmentation"], 96, 128))[..., 0] for each in found]
        predicted = {
            "bboxes": torch.stack([x, y, x + width, y + height], dim=1),
            "scores": torch.ones(len(found)),
            "labels": torch.tensor([each["category_id"] - 1 for each in found]),
            "masks": torch.tensor(np.stack(masks)).bool(),
        }
        metric.process({}, [{"pred_instances": predicted, "img_id": image["id"], "ori_shape": (96, 128)}])
    return metric.evaluate(size=len(content["images"]))


@pytest.mark.parametrize("learn", [False, True])
def test_boxes_without_width_or_height_are_nothing_to_find(coco, tmp_path, learn):
    def change(content):
        content["annotations"][0].update(bbox=[5, 5, 0, 10], area=0)
        content["annotations"][1].update(bbox=[5, 5, 10, 0])

    report = report_of(coco, tmp_path, change, Use(CLASSES, masks=True, learn=learn))
    assert not report.counts
    assert report.skipped == {"without width or height": 2}
    assert report.annotations == 10
    content = json.loads((coco / "annotations.json").read_text())
    content["annotations"] = content["annotations"][2:]
    result = own_precision(content, tmp_path / "a.json")
    assert result["coco/bbox_mAP"] == result["coco/segm_mAP"] == 1


def test_numbers_are_finite_and_in_range():
    for good in ([], [1], [1.5, -3], [0.0]):
        assert is_numbers(good)
    nan, inf = float("nan"), float("inf")
    for wrong in (
        [nan],
        [1, nan, 2],
        [inf, -inf],
        [HUGE],
        [1.0, HUGE, nan],
        [1e8],
        [-1e8, 1],
        [True],
        ["1"],
        None,
        (1,),
    ):
        assert not is_numbers(wrong), wrong


# --- configs and commands ---------------------------------------------------------------------------------------------


def test_validation_images_that_are_trained_with_are_counted(coco, tmp_path):
    other = write_coco(tmp_path / "other", images=6)  # the first four are those of `coco`
    content = json.loads((other / "annotations.json").read_text())
    for image in content["images"]:
        path = other / "images" / image["file_name"]
        image["file_name"] = f"renamed-{path.name}"
        path.rename(path.with_name(image["file_name"]))
    (other / "annotations.json").write_text(json.dumps(content))
    config = load_config(str(write_config(tmp_path / "c.py", "retinanet", coco)))
    train, val = check_datasets(config, ("train", "val"))
    assert len(val.notes) == 1
    assert val.notes[0].startswith("4 of 4 validation images are also training images (0.png, 1.png, 2.png, …)")
    config.val_dataloader.dataset.data_root = f"{other}/"
    config.val_evaluator.ann_file = str(other / "annotations.json")
    train, val = check_datasets(config, ("train", "val"))
    assert any(note.startswith("4 of 6 validation images are also training images (renamed-0.png = 0.png,")
               for note in val.notes)  # fmt: skip
    assert not train.notes


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train_dataloader.dataset.metainfo", {"classes": "red"}, r"is the text 'red'; write a tuple, with a comma"),
        ("train_dataloader.dataset.metainfo", {"classes": ("red", "red")}, "has 'red' twice"),
        ("train_dataloader.dataset.metainfo", {"classes": ("\u00e9", "e\u0301")}, "has 'é' twice"),
        ("train_dataloader.dataset.metainfo", {"classes": ("red", 3)}, "write the names of one class or more"),
        ("train_dataloader.dataset.metainfo", {"classes": ("red",)}, "has red, and test_dataloader's red, blue"),
        ("train_dataloader.dataset.metainfo", None, "has person, bicycle, .*, and test_dataloader's red, blue"),
        ("val_evaluator.metric", ["bbox", "segm"], ""),
        ("val_dataloader.dataset.type", "mmdet.CocoDataset", ""),
    ],
)
def test_loaders_that_do_not_fit_are_one_line(coco, tmp_path, field, value, message):
    config = load_config(str(write_config(tmp_path / "c.py", "mask-rcnn", coco)))
    config.merge_from_dict({field: value})
    if not message:
        assert len(check_datasets(config, ("train", "val"))) == 2
        return
    with pytest.raises(InputError, match=message) as caught:
        check_datasets(config, ("train", "val"))
    assert "\n" not in str(caught.value)


def test_masks_are_not_measured_of_a_detector_without(coco, tmp_path):
    config = load_config(str(write_config(tmp_path / "c.py", "mask-rcnn", coco)))
    config.model.roi_head.mask_head = None
    with pytest.raises(InputError, match='the model has no mask head; set metric="bbox"'):
        check_datasets(config, ("val",))


def test_the_command_says_what_is_left_before_it_trains(coco, tmp_path, capsys):
    config = write_config(tmp_path / "c.py", "retinanet", coco)
    options = ["train_cfg.max_epochs=1", "val_dataloader=None", "val_cfg=None", "val_evaluator=None"]
    result = run(["detect", "train", str(config), "--output", str(tmp_path / "run"), "--options", *options])
    assert [(each["images"], each["annotations"]) for each in result["data"]] == [(4, 12)]
    said = capsys.readouterr().out
    assert "annotations.json: 4 images and 12 annotations for training" in said
    assert "training images" in said


def test_all_files_of_a_config_are_refused_in_one_line(coco, tmp_path):
    path = changed(coco, tmp_path, every("annotations", iscrowd=1))
    config = write_config(tmp_path / "c.py", "mask-rcnn", coco)
    given = [f"{split}_dataloader.dataset.ann_file={path}" for split in ("train", "val")]
    options = [*given, f"val_evaluator.ann_file={path}"]
    with pytest.raises(InputError) as caught:
        run(["detect", "train", str(config), "--output", str(tmp_path / "run"), "--options", *options])
    assert str(caught.value).startswith(
        f"{path}: 1 problem: no annotation is left to learn from: all are iscrowd (annotate objects of the config's "
        f"classes) | {path}: 1 problem: nothing to evaluate against: all are iscrowd (annotate validation images"
    )
    assert not (tmp_path / "run").exists()
