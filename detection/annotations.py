"""COCO annotation files, checked before anything is built on them: what is wrong is said in one line."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from mmengine.config import Config

from shvit.errors import InputError

from .config import innermost, metrics_of
from .detector import class_names

MAX_BYTES = 2 << 30  # COCO's own largest file has 0.45 GB
SHORTEST = 6  # numbers of a polygon: three corners


def check_datasets(config: Config, splits: tuple[str, ...]) -> None:
    """Checks the annotations that a config's loaders read, and that all of them fit together.

    Args:
        splits: of train, val and test.

    Raises:
        InputError: a file that is not there or not readable, a photograph that is missing, a category that the config
            does not know or knows and the file does not, a box or polygon that is none, or a number of classes or a
            metric's file that differs from the dataset's.
    """
    classes = class_names(config)
    check_heads(config, classes)
    seen = set()
    for split in splits:
        loader = config.get(f"{split}_dataloader")
        if loader is None:
            continue
        dataset = innermost(loader.dataset)
        path, folder = annotation_file(dataset), photograph_folder(dataset)
        if dataset.type == "CocoDataset" and (path, folder) not in seen:
            seen.add((path, folder))
            check_annotations(path, folder, classes, wants_masks(config))
        for metric in metrics_of(config.get(f"{split}_evaluator")):
            named = metric.get("ann_file")
            if named and Path(named).resolve() != path.resolve():
                raise InputError(
                    f"{split}_evaluator reads {named} and {split}_dataloader {path}; give both one ann_file"
                )


def annotation_file(dataset: Any) -> Path:
    return Path(dataset.get("data_root") or "", dataset.ann_file)


def photograph_folder(dataset: Any) -> Path:
    return Path(dataset.get("data_root") or "", dataset.get("data_prefix", {}).get("img") or "")


def wants_masks(config: Config) -> bool:
    """Whether the detector learns masks."""
    return bool(config.model.get("roi_head", {}).get("mask_head"))


def check_heads(config: Config, classes: tuple[str, ...]) -> None:
    """Raises where a head has another number of classes than the dataset."""
    model = config.model
    heads = {"bbox_head": model.get("bbox_head")}
    for name in ("bbox_head", "mask_head"):
        heads[f"roi_head.{name}"] = model.get("roi_head", {}).get(name)
    for name, head in heads.items():
        number = head.get("num_classes") if isinstance(head, dict) else None
        if number is not None and number != len(classes):
            raise InputError(
                f"{config.filename}: model.{name}.num_classes is {number} and metainfo.classes has {len(classes)}; "
                "make both the same number"
            )


def check_annotations(path: Path, folder: Path, classes: tuple[str, ...], masks: bool) -> None:
    """Checks one file.

    Args:
        folder: that holds the photographs.
        classes: the names that the config knows.
        masks: whether polygons are used.

    Raises:
        InputError: as `check_datasets`.
    """
    content = _read(path)
    images = _by_id(content["images"], path, "image")
    categories = _by_id(content["categories"], path, "category")
    names = {key: str(category.get("name")) for key, category in categories.items()}
    missing = [name for name in classes if name not in names.values()]
    if missing:
        raise InputError(
            f"{path}: has no category {missing[0]!r}, which is one of the config's {len(classes)} classes; it has "
            f"{', '.join(map(str, list(names.values())[:5]))}{' …' if len(names) > 5 else ''}"
        )
    order = [name for name in names.values() if name in classes]
    if order != list(classes):
        raise InputError(
            f"{path}: numbers its categories {', '.join(order[:5])}{' …' if len(order) > 5 else ''}, and the config in "
            "another order, which would mix them up; write metainfo.classes in the file's order"
        )
    annotations = content["annotations"]
    _by_id(annotations, path, "annotation")
    used = Counter(_key(each.get("category_id")) for each in annotations)
    for key, count in used.items():
        if key is None or key not in names:
            raise InputError(f"{path}: {count} annotations have category_id {key}, which the file does not define")
        if names[key] not in classes:
            raise InputError(
                f"{path}: {count} annotations are of category {names[key]!r}, which the config does not know; "
                "add it to metainfo.classes, or remove them"
            )
    _check_photographs(path, folder, images)
    for annotation in annotations:
        for problem in _problems(annotation, images, masks):
            raise InputError(f"{path}: annotation {annotation['id']}: {problem}; correct or remove it")


def _read(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such annotation file; set data_root and ann_file")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes are more than the {MAX_BYTES:,} allowed")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a COCO annotation file ({str(error)[:200]})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{path}: not a COCO annotation file (it has no list of {key})")
    return content


def _by_id(entries: list[Any], path: Path, what: str) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        key = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(key, int | str):
            raise InputError(f"{path}: an {what} has no id: {str(entry)[:100]}")
        if key in found:
            raise InputError(f"{path}: {what} {key} is there twice")
        found[key] = entry
    if not found and what != "annotation":
        raise InputError(f"{path}: has no {what}")
    return found


def _check_photographs(path: Path, folder: Path, images: dict[Any, dict[str, Any]]) -> None:
    """Raises where a photograph is not in its folder, which is read once however many there are."""
    listed: dict[Path, set[str]] = {}
    missing = []
    for image in images.values():
        name = image.get("file_name")
        if not isinstance(name, str) or not all(_is_count(image.get(side)) for side in ("width", "height")):
            raise InputError(f"{path}: image {image['id']} has no file_name, width or height")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{path}: image {image['id']} is {name!r}, which is outside {folder}")
        place = folder / Path(name).parent
        if place not in listed:
            listed[place] = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
        if Path(name).name not in listed[place]:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more of {len(images)}" if len(missing) > 1 else ""
        raise InputError(
            f"{path}: names {missing[0]}{more}, not in {folder}; set data_prefix, or remove what is missing"
        )


def _problems(annotation: dict[str, Any], images: dict[Any, dict[str, Any]], masks: bool) -> Iterator[str]:
    """What is wrong with one annotation, if anything."""
    image = images.get(_key(annotation.get("image_id")))
    if image is None:
        yield f"is of image {annotation.get('image_id')}, which the file does not have"
        return
    box = annotation.get("bbox")
    if not _are_numbers(box) or len(box) != 4 or box[2] < 0 or box[3] < 0:
        yield f"bbox {box} is no [x, y, width, height]"
    if not _are_numbers([annotation.get("area")]) or annotation.get("iscrowd", 0) not in (0, 1):
        yield f"area {annotation.get('area')} is no number, or iscrowd {annotation.get('iscrowd')} not 0 or 1"
    if not masks:
        return
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [image["height"], image["width"]]:
            yield f"its run-length mask is of size {segmentation.get('size')}, not {[image['height'], image['width']]}"
        if not _is_run_length(segmentation.get("counts"), image["height"] * image["width"]):
            yield "the counts of its run-length mask are none, or not of as many pixels as the photograph has"
        return
    if not isinstance(segmentation, list) or not segmentation:
        yield "has no polygon"
        return
    for polygon in segmentation:
        if not _are_numbers(polygon) or len(polygon) < SHORTEST or len(polygon) % 2:
            yield f"polygon {str(polygon)[:60]} has not three corners or more"


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(isinstance(each, int | float) and math.isfinite(each) for each in values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 1 << 20


def _is_run_length(counts: Any, pixels: int) -> bool:
    """Whether counts are pycocotools' text or a list of run lengths."""
    if isinstance(counts, str):
        return bool(counts)
    return isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts) and sum(counts) == pixels


def _key(value: Any) -> Any:
    """An id that can be looked up; None of what can be none."""
    return value if isinstance(value, int | str) else None
