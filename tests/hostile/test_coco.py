"""Annotation files from strangers: pycocotools never sees what crashes it, and nothing raises after an epoch."""

import os
import time

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from shvit.detection.coco.content import MAX_OUTLINE, is_drawable, is_within_reach, load_content, run_lengths
from shvit.detection.coco.objects import Use
from shvit.errors import InputError
from tests.detection.detection_data import LEARN, every, first, report_of, write_coco

JUDGE = Use(LEARN.classes, masks=True, learn=False)
USES = pytest.mark.parametrize("use", [LEARN, JUDGE], ids=["train", "val"])
FAR = "coordinates far outside of the image"
WRONG_RUNS = "run lengths that are not as many pixels as the image"
ZIGZAG = [value for number in range(20_000) for value in (0, 95 * (number % 2))]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"), images=2)


def runs(counts, size=(96, 128)):
    return {"counts": counts, "size": list(size)}


@USES
@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}, "polygon is not [x1, y1, x2, y2, x3, y3, …] in pixels"),
        ({"segmentation": [[0, 0, 1e6, 0, 1e6, 1e6]]}, FAR),
        ({"segmentation": [[0, 0, 50, 0, 50, 50], [-2000, 0, 5, 0, 5, 5]]}, FAR),
        ({"segmentation": [ZIGZAG * 20], "bbox": [0, 0, 90, 90]}, FAR),
        ({"segmentation": [[0, 0, 10**400, 0, 9, 9]]}, "polygon is not [x1, y1, x2, y2, x3, y3, …] in pixels"),
        ({"segmentation": [[0, 0, 9, 0, 9]]}, "polygon is not [x1, y1, x2, y2, x3, y3, …] in pixels"),
        ({"segmentation": [[]]}, "polygon is not [x1, y1, x2, y2, x3, y3, …] in pixels"),
        ({"segmentation": [[0, 0, True, 0, 9, 9]]}, "polygon is not [x1, y1, x2, y2, x3, y3, …] in pixels"),
        ({"segmentation": [[[[[0]]]]]}, "polygon is not [x1, y1, x2, y2, x3, y3, …] in pixels"),
        ({"segmentation": "oooo"}, "no polygon, which the masks need"),
        ({"segmentation": runs("oooooooooooooo1")}, WRONG_RUNS),
        ({"segmentation": runs("\u0100\u0100")}, WRONG_RUNS),
        ({"segmentation": runs("")}, WRONG_RUNS),
        ({"segmentation": runs([96 * 128 + 5, -5])}, WRONG_RUNS),
        ({"segmentation": runs([5, 10**30])}, WRONG_RUNS),
        ({"segmentation": runs([1.5, 2])}, WRONG_RUNS),
        ({"segmentation": runs([0, 96 * 128 - 1])}, WRONG_RUNS),
        ({"segmentation": runs({"0": 1})}, WRONG_RUNS),
        ({"segmentation": runs([10**12], (10**6, 10**6))}, "run lengths of another size than the image"),
        ({"segmentation": runs([96 * 128], ("96", "128"))}, "run lengths of another size than the image"),
        ({"segmentation": runs([96 * 128], (-96, -128))}, "run lengths of another size than the image"),
        ({"segmentation": {"counts": [1]}}, "run lengths of another size than the image"),
        ({"bbox": [0, 0, 1e6, 40]}, FAR),
        ({"bbox": [-5000, 0, 5050, 40]}, FAR),
        ({"bbox": [0, 0, 10**400, 5]}, "bbox is not [x, y, width, height] in pixels"),
        ({"bbox": "0, 0, 5, 5"}, "bbox is not [x, y, width, height] in pixels"),
        ({"bbox": [float("inf"), 0, 5, 5]}, "bbox is not [x, y, width, height] in pixels"),
        ({"area": 10**400}, "area is not a number"),
        ({"area": float("nan")}, "area is not a number"),
        ({"iscrowd": 10**30}, "iscrowd is not 0 or 1"),
        ({"category_id": 1e300}, "category_id that the file does not define"),
        ({"image_id": [0]}, "image_id of no image in the file"),
    ],
)
def test_values_that_crash_or_raise_are_named(coco, tmp_path, fields, kind, use):
    report = report_of(coco, tmp_path, first("annotations", **fields), use)
    assert kind in report.counts
    assert report.counts.keys() <= {kind, "bbox is not around its mask"}
    assert "\n" not in report.refusal()
    assert len(report.refusal()) < 1000


def test_a_thin_object_that_is_evaluated_against_is_within_reach_too(coco, tmp_path):
    thin = {"segmentation": [[0, 0, 1e6, 0, 1e6, 1e6]], "bbox": [0, 0, 0.5, 40], "area": 3}
    assert FAR in report_of(coco, tmp_path, first("annotations", **thin), JUDGE).counts
    assert report_of(coco, tmp_path, first("annotations", **thin)).skipped  # MMDetection does not learn from it


def test_what_people_draw_a_little_beyond_the_image_is_sound(coco, tmp_path):
    def drawn(annotation):
        x, y, width, height = annotation["bbox"]
        return [[x - 6, y - 9.5, x + width + 7, y - 3, x + width + 3, y + height + 40, x - 2, y + height]]

    report = report_of(coco, tmp_path, every("annotations", segmentation=drawn))
    assert not report.counts


@pytest.mark.parametrize("size", [[96, 128], [96.0, 128.0]])
def test_sound_run_lengths_of_every_writing_are_read(coco, tmp_path, size):
    mask = np.zeros((96, 128), np.uint8, order="F")
    mask[20:60, 30:90] = 1
    text = mask_api.encode(mask)["counts"].decode()
    fields = {"bbox": [30, 20, 60, 40], "area": 2400, "segmentation": {"size": size, "counts": text}}
    assert not report_of(coco, tmp_path, first("annotations", **fields)).counts
    assert sum(run_lengths(text)) == 96 * 128


def test_every_polygon_that_passes_is_drawn():
    """At the limits, pycocotools takes a moment."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        polygon = (rng.uniform(-1280, 1400, 2 * int(rng.integers(3, 40)))).round(1).tolist()
        assert is_within_reach(polygon, 128, 96) == (min(polygon) >= -1280 and max(polygon[1::2]) <= 96 + 1280
                                                     and max(polygon[::2]) <= 128 + 1280)  # fmt: skip
        assert is_drawable(polygon)
        mask_api.decode(mask_api.frPyObjects([polygon], 96, 128))
    assert not is_drawable([0, 0, MAX_OUTLINE, 0, 0, 0])


@pytest.mark.parametrize("name", ["info", "categories"])
def test_what_pycocotools_copies_is_shallow(coco, tmp_path, name):
    """It copies level by level, in Python, after the first epoch."""
    deep: list = []
    for _ in range(800):
        deep = [deep]
    with pytest.raises(InputError, match="more than 60 deep"):
        report_of(coco, tmp_path, lambda content: content.update({name: deep}))


@pytest.mark.parametrize("used", [False, True])
def test_many_categories_of_one_name_take_no_time(coco, tmp_path, used):
    def many(content):
        same = [{"id": number, "name": f"z{number // 2}" if used else "z"} for number in range(10, 15_010)]
        content["categories"] += same
        first = content["annotations"][0]
        new = [{**first, "id": 1000 + each["id"], "category_id": each["id"]} for each in same if used]
        content["annotations"] += new

    began = time.perf_counter()
    report = report_of(coco, tmp_path, many)
    assert time.perf_counter() - began < 5
    assert len(report.notes) < 20
    assert bool(report.counts) is used
    assert not used or len(report.refusal()) < 3000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 40_000, "nested too deeply"),
        ('{"a":' * 40_000, "nested too deeply"),
        ('{"images": [], "images": [], "annotations": [], "categories": []}', "the key 'images' stands twice"),
        ('{"images": [{"id": ' + "9" * 5000 + "}]}", "not a COCO annotation file"),
        ('{"images": 1, "annotations": [], "categories": []}', "no list of images"),
        ("[]", "no list of images"),
        ("\x1b[2J", "not a COCO annotation file"),
        ("", "not a COCO annotation file"),
    ],
)
def test_json_that_is_not_one_is_one_line(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_content(tmp_path / "a.json")
    assert str(caught.value).isprintable()


def test_what_is_no_file_is_not_waited_for(coco, tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match="is a FIFO"):
        load_content(tmp_path / "a.json")
    with pytest.raises(InputError, match="is a folder"):
        load_content(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_content(tmp_path / ("x" * 300))
    folder = write_coco(tmp_path / "coco", images=3)
    (folder / "images" / "1.png").unlink()
    os.mkfifo(folder / "images" / "1.png")
    (folder / "images" / "2.png").unlink()
    (folder / "images" / "2.png").symlink_to("2.png")
    report = report_of(folder, tmp_path / "coco", lambda content: None)
    assert "image 1 (1.png) is a FIFO" in report.refusal()
    assert set(report.counts) == {"file not readable"}


@pytest.mark.parametrize(
    "name", ["x" * 300, "a\0b", "../../etc/passwd", "/etc/passwd", "http://127.0.0.1/x.png", "\x1b[2J"]
)
def test_names_of_images_lead_nowhere_else(coco, tmp_path, name):
    report = report_of(coco, tmp_path, first("images", file_name=name))
    assert report.counts
    assert report.refusal().isprintable()


def test_an_image_is_what_its_content_is(tmp_path):
    """PostScript under the name of a PNG starts nothing; it is named."""
    coco = write_coco(tmp_path, images=2)
    (coco / "images" / "1.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 128 96\n%%EndComments\n(x) run\n"
    )
    report = report_of(coco, tmp_path, lambda content: None)
    assert "image 1 (1.png) is not an image" in report.refusal()


@USES
def test_an_image_that_is_too_thin_is_named_before_it_is_resized(tmp_path, use):
    coco = write_coco(tmp_path, images=2)
    Image.new("RGB", (5000, 1)).save(coco / "images" / "1.png")

    def thin(content):
        content["images"][1].update(width=5000, height=1)
        content["annotations"] = [each for each in content["annotations"] if each["image_id"] == 0]

    report = report_of(coco, tmp_path, thin, use)
    assert "image 1 (1.png) is 5000×1, too thin to be resized" in report.refusal()
