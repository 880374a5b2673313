"""Boxes and masks: each held against the other, and their figures against pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from shvit.detection.coco.boxes import MaskFits, Pair, extent_of_runs
from shvit.detection.coco.content import repair, run_lengths
from shvit.detection.coco.objects import Use
from tests.detection.detection_data import CENTERS, CLASSES, LEARN, PARTS, every, first, report_of, write_coco


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), images=4)


APART = "bbox is not around its mask"


def edited(change):
    """Changes each annotation, given it and its number."""

    def edit(content):
        for number, annotation in enumerate(content["annotations"]):
            change(annotation, number)

    return edit


def box(corners):
    """Writes every box anew from its x, y, width and height."""
    return edited(lambda a, _: a.update(bbox=corners(*a["bbox"])))


def polygon(point):
    """Writes every polygon anew from its points and its box."""
    return edited(
        lambda a, _: a.update(
            segmentation=[[v for p in np.reshape(a["segmentation"][0], (-1, 2)) for v in map(float, point(*p, a))]]
        )
    )


def by_rows(annotation, _):
    x, y, width, height = annotation["bbox"]
    mask = np.zeros((96, 128), bool)
    mask[y : y + height, x : x + width] = True
    edges = np.flatnonzero(np.diff(mask.ravel(), prepend=0, append=0))
    runs = np.diff(edges, prepend=0, append=mask.size).tolist()
    annotation["segmentation"] = {"size": [96, 128], "counts": runs}


@pytest.mark.parametrize(
    ("change", "explanation"),
    [
        (box(lambda x, y, w, h: [x / 2, y / 2, w / 2, h / 2]), "the boxes are 0.5 times their masks"),
        (box(lambda x, y, w, h: [x / 2, y / 3, w / 2, h / 3]), "the boxes are for images of about 64×32"),
        (box(lambda x, y, w, h: [x, y, w / 2, h / 2]), "the boxes have half the width and height"),
        (polygon(lambda x, y, a: (x / 2, y / 2)), "the boxes are 2 times their masks"),
        (box(lambda x, y, w, h: [y, x, h, w]), "the boxes are [y, x, height, width], or the masks have x and y"),
        (polygon(lambda x, y, a: (y, x)), "the boxes are [y, x, height, width], or the masks have x and y"),
        (box(lambda x, y, w, h: [y / 2, x / 2, h / 2, w / 2]), "leave segmentation out"),
        (polygon(lambda x, y, a: (x + 40, y)), "the boxes are 40 px left of and 0 px above their masks"),
        (polygon(lambda x, y, a: (128 - x, y)), "the boxes are mirrored"),
        (polygon(lambda x, y, a: (x - a["bbox"][0], y - a["bbox"][1])), "the masks begin at their box's corner"),
        (every("annotations", segmentation=[[100, 80, 110, 80, 110, 90, 100, 90]]), "leave segmentation out"),
        (edited(by_rows), "the run lengths go along the rows"),
        (edited(lambda a, number: number % 2 and a.update(bbox=PARTS["bbox"](a))), "the boxes are normalized to 0..1"),
        (edited(lambda a, number: number % 2 and a.update(bbox=CENTERS["bbox"](a))), "the boxes are [center x"),
        (first("annotations", segmentation={"size": [96, 128], "counts": [0, 5, 96 * 128 - 5]}), "leave segmentation"),
    ],
)  # fmt: skip
def test_boxes_that_are_not_around_their_masks_are_refused_and_explained(coco, tmp_path, change, explanation):
    for use in (LEARN, Use(CLASSES, masks=True, learn=False), Use(CLASSES, masks=False, learn=True)):
        report = report_of(coco, tmp_path, change, use)
        assert list(report.counts) in ([APART], ["bbox outside of the image", APART]), report.counts
        assert explanation in report.refusal()
        assert "annotation 1 has bbox" in report.refusal() or report.counts[APART] < 12


def test_boxes_of_images_of_another_size_are_explained_by_that_size(tmp_path):
    """Images of two sizes, and boxes as of a network's square input."""
    fits = MaskFits()
    for number, (width, height) in enumerate([(640, 480), (1280, 2000)] * 4):
        box, mask = [2.0 + 9 * number, 50.0, 9.0, 12.0], (2.0 + 9 * number, 50.0, 11.0 + 9 * number, 62.0)
        scaled = tuple(each * side / 100 for each, side in zip(mask, (width, height) * 2, strict=True))
        fits.add(Pair(f"annotation {number}", box, scaled, width, height))
    wrong, explanation = fits.wrong()
    assert len(wrong) == 8
    assert explanation.startswith("the boxes are for images of about 100×100")


def fitting(boxes_and_masks):
    fits = MaskFits()
    for number, (box, mask) in enumerate(boxes_and_masks):
        fits.add(Pair(f"annotation {number}", box, mask, 640, 480))
    return fits


@pytest.mark.parametrize(
    ("name", "box", "mask"),
    [
        ("a tiny object, a pixel off", [10, 10, 1, 1], (11, 11, 12, 12)),
        ("a tiny object with a box around it", [10, 10, 9, 9], (13, 13, 15, 15)),
        ("last pixels counted or not", [10, 10, 3, 3], (10, 10, 14, 14)),
        ("drawn by hand, the mask made later", [100, 100, 60, 60], (110, 108, 152, 157)),
        ("a mask that ends at the image's border", [-300, 100, 350, 200], (0, 102, 50, 298)),
        ("a box that ends there", [0, 100, 50, 200], (-300, 102, 50, 298)),
        ("an occluded object in two parts", [100, 100, 200, 80], (100, 101, 299, 180)),
    ],
)
def test_sound_boxes_are_not_in_doubt(name, box, mask):
    assert not fitting([(box, mask)] * 20).doubtful, name


def test_loose_boxes_are_a_note_however_many(coco, tmp_path):
    """A box around a whole object, of which the mask has what is seen, is what its annotator meant."""
    hidden = polygon(lambda x, y, a: (a["bbox"][0] + (x - a["bbox"][0]) / 4, a["bbox"][1] + (y - a["bbox"][1]) / 2))
    report = report_of(coco, tmp_path, hidden)
    assert not report.counts
    assert report.notes[0].startswith("boxes far larger or far smaller than their masks: 12 of 12 (annotation 1, ")


def test_a_slip_among_many_boxes_is_a_note(coco, tmp_path):
    def change(content):
        content["annotations"] = [{**each, "id": n} for n, each in enumerate(content["annotations"] * 3, 1)]
        content["annotations"][4]["segmentation"] = [[0, 0, 9, 0, 9, 5]]

    report = report_of(coco, tmp_path, change)
    assert not report.counts
    assert report.notes == ["boxes beside their masks: 1 of 36 (annotation 5)"]


def test_the_extent_of_run_lengths_is_pycocotools():
    rng = np.random.default_rng(0)
    for density in (0, 0.0005, 0.002, 0.02, 1):
        mask = np.asfortranarray(rng.random((37, 53)) < density, np.uint8)
        encoded = coco_mask.encode(mask)
        left, top, right, bottom = extent_of_runs(run_lengths(encoded["counts"].decode()), 37)
        assert [left, top, right - left, bottom - top] == coco_mask.toBbox(encoded).tolist()


# --- masks ------------------------------------------------------------------------------------------------------------


def test_run_lengths_are_pycocotools():
    rng = np.random.default_rng(0)
    for density in (0, 0.02, 0.5, 1):
        mask = np.asfortranarray(rng.random((37, 53)) < density, np.uint8)
        mask[5:20, 7:40] = density > 0
        encoded = coco_mask.encode(mask)
        runs = run_lengths(encoded["counts"].decode())
        flat = mask.ravel(order="F")
        assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), flat)
        assert run_lengths(runs) == runs
    for wrong in ("", "é", "0P", [1, -1], [1.5], [], None, 3, {}):
        assert run_lengths(wrong) is None


@pytest.mark.parametrize("form", ["polygon", "list", "text", "box"])
def test_an_absent_area_is_pycocotools(form):
    polygon = [10.0, 10.0, 60.0, 12.0, 50.0, 70.0, 12.0, 40.0]
    encoded = coco_mask.frPyObjects([polygon], 96, 128)[0]
    text = encoded["counts"].decode()
    segmentation = {
        "polygon": [polygon],
        "list": {"size": [96, 128], "counts": run_lengths(text)},
        "text": {"size": [96, 128], "counts": text},
        "box": [],
    }[form]
    annotation = {"id": 1, "bbox": [10, 10, 50, 60], "segmentation": segmentation}
    repair({"images": [], "categories": [], "annotations": [annotation]})
    expected = 3000 if form == "box" else float(coco_mask.area(encoded))
    assert annotation["area"] == pytest.approx(expected, rel=0.03 if form == "polygon" else 1e-9)
