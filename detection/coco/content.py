"""COCO annotation files as tools write them, in any encoding of JSON, with harmless quirks repaired in memory."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from shvit.documents import MAX_DEPTH, is_deeper, without_repetition
from shvit.errors import InputError, printable
from shvit.files import check_file, is_there, read_bytes
from shvit.weights.run_info import same_name

MAX_BYTES = 2 << 30  # COCO's own largest file has 0.45 GB
MAX_COORDINATE = 1e7
MAX_ID = 1 << 63
REACH = 10  # of an image's longer side, by which coordinates may lie beyond it: more is a mistake, or an attack
MAX_OUTLINE = 4e6  # pixels along a polygon: pycocotools takes 40 bytes for each
MAX_NOTES = 10  # of one sort
LISTS = ("images", "annotations", "categories")
COMPRESSED = {  # how files of a format begin
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7z",
}


def load_content(path: Path) -> dict[str, Any]:
    """Load a file's JSON in UTF-8, with or without a byte order mark, UTF-16 or UTF-32.

    Raises:
        InputError: no such file, it is too large, or it is not JSON with the three lists of COCO.
    """
    if not is_there(path):
        raise InputError(f"{path}: no such annotation file; set data_root and ann_file")
    check_file(path)
    text = read_bytes(path, MAX_BYTES)
    if how := next((name for begin, name in COMPRESSED.items() if text.startswith(begin)), None):
        raise InputError(f"{path}: is compressed ({how}); unpack it and give the .json inside as ann_file")
    try:
        content = json.loads(text, object_pairs_hook=without_repetition)  # of bytes, it finds the encoding
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a COCO annotation file ({error.reason}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a COCO annotation file ({_reason(error)})") from error
    for key in LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{path}: not a COCO annotation file (it has no list of {key})")
    rest = [content["categories"], *(value for key, value in content.items() if key not in LISTS)]
    if is_deeper(rest, MAX_DEPTH):  # pycocotools copies these, level by level, after an epoch
        raise InputError(f"{path}: not a COCO annotation file (it is nested more than {MAX_DEPTH} deep)")
    return content


def _reason(error: Exception) -> str:
    """Return why a text is not JSON."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.colno == 1:
        return (
            "it has a JSON value on each line, as JSON Lines; write one object with images, annotations and categories"
        )
    return printable(str(error))[:200]


def repair(content: dict[str, Any]) -> list[str]:
    """Repair harmless quirks for pycocotools, in place; mistakes stay for the check to report.

    Sizes like 640.0 become whole numbers, which pycocotools insists on; category names that are numbers become text,
    and accents in them one character with their letter, as `AnnotationFile` looks them up; backslashes in file names
    become slashes; an absent area is computed and an absent iscrowd is 0; a category without annotations that has the
    name of another is removed; annotation ids that are absent, text or below 1 are replaced (pycocotools' evaluation
    takes id 0 for "not matched").

    Returns:
        A line for each repair that a user should know of.
    """
    annotations = [each for each in content["annotations"] if isinstance(each, dict)]
    _repair_category_names(content)
    notes = [*_remove_unused_doubles(content, annotations), *_repair_names(content), *_add_areas(annotations)]
    _repair_sizes(content["images"], annotations)
    for annotation in annotations:
        crowd = annotation.get("iscrowd")
        if crowd is None or isinstance(crowd, bool):
            annotation["iscrowd"] = int(bool(crowd))
    ids = [annotation.get("id") for annotation in annotations]
    if not all(isinstance(each, int) and 0 < each < 1 << 53 for each in ids):
        for number, annotation in enumerate(annotations, 1):
            annotation["id"] = number
        notes.append("annotation ids that are absent, text or below 1 were replaced by numbers from 1")
    return notes


def _repair_sizes(images: list[Any], annotations: list[dict[str, Any]]) -> None:
    """Turn the sizes of images and run lengths into whole numbers."""
    for image in images:
        for side in ("width", "height"):
            if isinstance(image, dict) and isinstance(image.get(side), float) and is_side(image[side]):
                image[side] = int(image[side])
    for annotation in annotations:
        mask = annotation.get("segmentation")
        if isinstance(mask, dict) and isinstance(mask.get("size"), list) and all(map(is_side, mask["size"])):
            mask["size"] = [int(side) for side in mask["size"]]


def _repair_category_names(content: dict[str, Any]) -> None:
    for category in content["categories"]:
        name = category.get("name") if isinstance(category, dict) else None
        if isinstance(name, str | int | float):
            category["name"] = same_name(str(name))


def _remove_unused_doubles(content: dict[str, Any], annotations: list[dict[str, Any]]) -> list[str]:
    """Remove categories without annotations whose name another category has, such as Roboflow's category 0."""
    used = Counter(key_of(each.get("category_id")) for each in annotations)
    by_name = defaultdict(list)
    removed: set[int] = set()
    for category in content["categories"]:
        if isinstance(category, dict) and isinstance(category.get("name"), str):
            by_name[category["name"]].append(category)
    notes = []
    for name, same in by_name.items():
        kept = [each for each in same if used[key_of(each.get("id"))]] or same[-1:]
        is_kept = {id(each) for each in kept}
        unused = [each for each in same if id(each) not in is_kept]
        removed.update(map(id, unused))
        notes += [
            f"category {short(each.get('id'))} is unused and is called {short(name)} like category "
            f"{short(kept[0].get('id'))}: it is ignored; remove it from the file"
            for each in unused
        ]
    if removed:
        content["categories"] = [each for each in content["categories"] if id(each) not in removed]
    if len(notes) > MAX_NOTES:
        notes[MAX_NOTES:] = [f"{len(notes) - MAX_NOTES:,} more categories are unused and called like others"]
    return notes


def _repair_names(content: dict[str, Any]) -> list[str]:
    changed = 0
    for image in content["images"]:
        name = image.get("file_name") if isinstance(image, dict) else None
        if isinstance(name, str) and "\\" in name:
            image["file_name"] = name.replace("\\", "/")
            changed += 1
    return [f"{count(changed, 'file name')} with backslashes read with slashes"] if changed else []


def _add_areas(annotations: list[dict[str, Any]]) -> list[str]:
    changed = 0
    for annotation in annotations:
        if annotation.get("area") is None and is_box(annotation.get("bbox")):
            annotation["area"] = _area(annotation)
            changed += 1
    return [f"{count(changed, 'annotation')} without area: computed from masks, or boxes"] if changed else []


def _area(annotation: dict[str, Any]) -> float:
    """Return the area in pixels of the polygons or run lengths, or of the box where there are no readable ones."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation and all(is_polygon(each) for each in segmentation):
        return sum(_polygon_area(each) for each in segmentation)
    runs = run_lengths(segmentation.get("counts")) if isinstance(segmentation, dict) else None
    return annotation["bbox"][2] * annotation["bbox"][3] if runs is None else sum(runs[1::2])


def _polygon_area(polygon: list[float]) -> float:
    x, y = polygon[::2], polygon[1::2]
    return abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2


# --- what values are --------------------------------------------------------------------------------------------------


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number that can be a coordinate."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_COORDINATE < value < MAX_COORDINATE


def is_numbers(values: Any) -> TypeGuard[list[float]]:
    """Return whether a value is a list of such numbers; as fast as a file of millions needs it."""
    if not isinstance(values, list) or not {int, float}.issuperset(map(type, values)):
        return False
    try:
        finite = math.isfinite(math.fsum(values))
    except (OverflowError, ValueError):
        return False
    return finite and (not values or (min(values) > -MAX_COORDINATE and max(values) < MAX_COORDINATE))


def is_box(value: Any) -> TypeGuard[list[float]]:
    """Return whether a value is [x, y, width, height], where sides may be 0 but not negative."""
    return is_numbers(value) and len(value) == 4 and value[2] >= 0 and value[3] >= 0


def is_zero_box(value: Any) -> bool:
    """Return whether a value is a box without width or height, which no detection can overlap."""
    return is_box(value) and min(value[2:]) == 0


def is_polygon(value: Any) -> TypeGuard[list[float]]:
    """Return whether a value is [x1, y1, x2, y2, x3, y3, …] with three corners or more."""
    return is_numbers(value) and len(value) >= 6 and len(value) % 2 == 0


def key_of(value: Any) -> Any:
    """Return an id that can be looked up: a whole number of 64 bits or a text; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_ID:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_ID else None


def is_text_of(value: Any, known: dict[Any, Any]) -> bool:
    """Return whether an id is a text whose number is among those that are known."""
    try:
        return isinstance(value, str) and int(value) in known
    except ValueError:
        return False


def is_within_reach(values: list[float], width: float, height: float) -> bool:
    """Return whether coordinates x, y, x, y, … are in an image, or not much further from it than it is large."""
    reach = REACH * max(width, height)
    return (
        min(values) >= -reach
        and max(values[::2], default=0) <= width + reach
        and max(values[1::2], default=0) <= height + reach
    )


def is_drawable(polygon: list[float]) -> bool:
    """Return whether pycocotools can draw a polygon: it writes every pixel of the outline down, and checks nothing."""
    if len(polygon) * (max(polygon) - min(polygon)) < MAX_OUTLINE:
        return True
    x, y = polygon[::2], polygon[1::2]
    return sum(max(abs(x[i] - x[i - 1]), abs(y[i] - y[i - 1])) for i in range(len(x))) < MAX_OUTLINE


def run_lengths(counts: Any) -> list[int] | None:
    """Return the lengths of runs, beginning with background, from a list or pycocotools' compressed text.

    None for anything else. pycocotools checks neither: where they cover fewer pixels than the image has, `decode` gives
    what happens to be in memory.
    """
    if isinstance(counts, list):
        whole = all(isinstance(each, int) and 0 <= each < MAX_COORDINATE**2 for each in counts)
        return counts if whole and counts else None
    if not isinstance(counts, str):
        return None
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 50:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0  # a negative difference
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            if runs[-1] < 0:
                return None
            value = shift = 0
    return runs if runs and not shift else None


def is_side(value: Any) -> TypeGuard[float]:
    """Return whether a value can be the width or height of an image."""
    return is_number(value) and float(value).is_integer() and 0 < value < 1 << 20


# --- text -------------------------------------------------------------------------------------------------------------


def count(number: int, what: str) -> str:
    """Return a number with its noun: `1 box`, `2 boxes`, `3 categories`."""
    if number != 1:
        what = what[:-1] + "ies" if what.endswith("y") else what + ("es" if what.endswith(("x", "s")) else "s")
    return f"{number:,} {what}"


def short(value: Any, limit: int = 60) -> str:
    """Return a value from a file as text that is safe in a line: printable, quoted where it is text, cut to `limit`."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def names_of(names: Iterable[str]) -> str:
    """Return the first five names."""
    names = list(names)
    return ", ".join(short(name)[1:-1] for name in names[:5]) + (" …" if len(names) > 5 else "")
