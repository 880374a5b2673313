"""COCO annotation files, checked against the images and the config before anything is built on them.

Every problem of a file is counted and the first ones are listed, in one line; what is sound but not what it seems is a
note.
"""

import difflib
import math
import os
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from shvit.errors import InputError
from shvit.train.data.images import MAX_PIXELS
from shvit.weights.run_info import same_name

from ..parsing.config import class_names, innermost, metrics_of
from .content import count, is_side, key_of, load_content, names_of, repair, short
from .headers import Header, Reader, copies, read_headers
from .objects import ListedImage, Objects, Use
from .report import LISTED, Report

MAX_COMPARED = 500  # names, and characters of one, among which the one that was meant is looked for
MAX_RATIO = 1000  # of an image's sides: the shorter one of a thinner image is resized to nothing, which OpenCV refuses

# --- a config's files -------------------------------------------------------------------------------------------------


def check_datasets(config: Config, splits: tuple[str, ...]) -> list[Report]:
    """Check the annotations that a config's loaders read, and that all of them fit together.

    Args:
        splits: of train, val and test.

    Returns:
        A report for each split that is read as COCO; what is left and what to say is in it.

    Raises:
        InputError: a file that is not there or not readable; all problems of the files, counted; a number of classes or
            a metric's file that differs from the dataset's.
    """
    classes = class_names(config)
    loaders = {split: config.get(f"{split}_dataloader") for split in splits}
    for split, loader in loaders.items():
        _check_class_names(config, split, loader, classes)
    check_heads(config, classes)
    reports: dict[str, Report] = {}
    for split, loader in loaders.items():
        if loader is None:
            continue
        dataset = innermost(loader.dataset)
        path = annotation_file(dataset)
        for metric in metrics_of(config.get(f"{split}_evaluator")):
            _check_metric(config, split, metric, path)
        if dataset.type.rpartition(".")[2] == "CocoDataset":
            known = {path: header for report in reports.values() for path, header in report.headers.items()}
            reports[split] = inspect(path, image_folder(dataset), _use(config, split, dataset, classes), known)
    if refused := [report.refusal() for report in reports.values() if report.counts]:
        raise InputError(" | ".join(dict.fromkeys(refused)))
    _note_shared_images(reports)
    return list(reports.values())


def annotation_file(dataset: ConfigDict) -> Path:
    """Return a dataset's annotation file."""
    return Path(dataset.get("data_root") or "", dataset.ann_file)


def image_folder(dataset: ConfigDict) -> Path:
    """Return the folder of a dataset's images."""
    return Path(dataset.get("data_root") or "", dataset.get("data_prefix", {}).get("img") or "")


def check_heads(config: Config, classes: tuple[str, ...]) -> None:
    """Raise InputError where a head has another number of classes than the dataset."""
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


def _check_class_names(config: Config, split: str, loader: ConfigDict | None, classes: tuple[str, ...]) -> None:
    """Raise InputError where a loader's class names are unusable, or differ from the test loader's (the detector's)."""
    metainfo = (innermost(loader.dataset).get("metainfo") or {}) if loader is not None else {}
    names = metainfo.get("classes")
    where = f"{config.filename}: {split}_dataloader's metainfo.classes"
    if isinstance(names, str):
        raise InputError(f"{where} is the text {short(names)}; write a tuple, with a comma: ({short(names)},)")
    if names is not None and (not names or not all(isinstance(each, str) for each in names)):
        raise InputError(f"{where} is {short(names)}; write the names of one class or more")
    if twice := [name for name, number in Counter(map(same_name, names or ())).items() if number > 1]:
        raise InputError(f"{where} has {short(twice[0])} twice; name each class once")
    if loader is not None and names is None and innermost(loader.dataset).type.rpartition(".")[2] == "CocoDataset":
        from mmdet.datasets import CocoDataset

        names = CocoDataset.METAINFO["classes"]
    if names is not None and [*map(same_name, names)] != [*map(same_name, classes)]:
        raise InputError(
            f"{where} has {names_of(names)}, and test_dataloader's {names_of(classes)}; give all loaders the same"
        )


def _check_metric(config: Config, split: str, metric: ConfigDict, path: Path) -> None:
    named = metric.get("ann_file")
    if named and Path(named).resolve() != path.resolve():
        raise InputError(f"{split}_evaluator reads {named} and {split}_dataloader {path}; give both one ann_file")
    if "segm" in _measured(metric) and config.model.get("roi_head") and not has_masks(config):
        raise InputError(f'{split}_evaluator measures masks (segm), and the model has no mask head; set metric="bbox"')


def has_masks(config: Config) -> bool:
    """Return whether the detector learns masks."""
    return bool((config.model.get("roi_head") or {}).get("mask_head"))


def _measured(metric: ConfigDict) -> list[str]:
    measured = metric.get("metric") or "bbox"
    return [measured] if isinstance(measured, str) else list(measured)


def _use(config: Config, split: str, dataset: ConfigDict, classes: tuple[str, ...]) -> Use:
    steps = {str(step.get("type")).rpartition(".")[2]: step for step in dataset.get("pipeline") or []}
    image = steps.get("LoadImage") or steps.get("LoadImageFromFile") or {}
    measured = [kind for metric in metrics_of(config.get(f"{split}_evaluator")) for kind in _measured(metric)]
    filters = {} if dataset.get("test_mode") or split != "train" else dataset.get("filter_cfg") or {}
    return Use(
        classes,
        masks=has_masks(config) or steps.get("LoadAnnotations", {}).get("with_mask", False) or "segm" in measured,
        learn=split == "train",
        reader=Reader(image.get("color_type", "color"), image.get("imdecode_backend", "cv2")),
        filter_empty=bool(filters.get("filter_empty_gt")),
        min_size=filters.get("min_size") or 0,
    )


def _note_shared_images(reports: dict[str, Report]) -> None:
    """Add a note where validation images are also trained with."""
    if not {"train", "val"} <= reports.keys():
        return
    train, val = reports["train"], reports["val"]
    if pairs := copies(train.headers, val.headers):
        named = ", ".join(f"{one.name}" if one == other else f"{other.name} = {one.name}" for one, other in pairs[:3])
        val.notes.append(
            f"{len(pairs):,} of {count(len(val.headers), 'validation image')} are also training images "
            f"({named}{', …' if len(pairs) > 3 else ''}); figures measured on them say little"
        )


# --- one file ---------------------------------------------------------------------------------------------------------


def check_annotations(path: Path, folder: Path, classes: tuple[str, ...], masks: bool) -> Report:
    """Check one file that is trained with, as `inspect`; raise InputError for its problems, all of them counted."""
    report = inspect(path, folder, Use(classes, masks, learn=True))
    if report.counts:
        raise InputError(report.refusal())
    return report


def inspect(path: Path, folder: Path, use: Use, known: dict[Path, Header] | None = None) -> Report:
    """Check one file against its images.

    Args:
        folder: that holds the images.
        known: headers that were read before.

    Raises:
        InputError: it is not there, or not a COCO file. What is wrong inside is in the report.
    """
    use = replace(use, classes=tuple(map(same_name, use.classes)))  # as `repair` writes the file's
    content = load_content(path)
    report = Report(path, "training" if use.learn else "evaluation")
    raw_ids = [each.get("id") if isinstance(each, dict) else None for each in content["annotations"]]
    report.notes += repair(content)
    names = _check_categories(report, content["categories"], use.classes)
    images = _check_images(report, content["images"], folder, use, known or {})
    check = Objects(report, images, names, use)
    seen: set[Any] = set()
    for entry, raw in zip(content["annotations"], raw_ids, strict=True):
        key = key_of(raw)
        if key is not None and key in seen:
            report.add("annotation id used twice", f"annotation {short(raw)}")
        seen.add(key)
        check.add(entry, f"annotation {short(raw)}" if key is not None else f"an annotation of id {short(raw)}")
    check.conclude()
    return report


def _check_categories(report: Report, entries: list[Any], classes: tuple[str, ...]) -> dict[Any, str]:
    """Return names by id."""
    names: dict[Any, str] = {}
    ids = defaultdict(list)
    for category in entries:
        key = key_of(category.get("id")) if isinstance(category, dict) else None
        if key is None or not isinstance(category.get("name"), str):
            report.add("no id or name", short(category))
        elif key in names:
            report.add("category id used twice", f"category {short(key)} ({short(category['name'])})")
        else:
            if isinstance(key, str) != isinstance(next(iter(names), key), str):
                report.add("category ids that are text and others that are numbers", f"category {short(key)}")
            names[key] = category["name"]
            ids[category["name"]].append(key)
    for name, same in ids.items():
        if len(same) > 1:
            named = f"{', '.join(map(short, same[:LISTED]))}{', …' if len(same) > LISTED else ''}"
            report.add("class name used twice", short(name), f"(categories {named}, all with annotations)")
    similar = [name for name in list(ids)[:MAX_COMPARED] if len(name) <= MAX_COMPARED]
    for name in classes:
        if name not in ids:
            first = report.counts["class not in the file"] < LISTED  # the others are counted alone
            close = difflib.get_close_matches(name, similar, n=1, cutoff=0.8) if first else []
            hint = f"did you mean {short(close[0])}?" if close else f"it has {names_of(names.values())}"
            report.add("class not in the file", short(name), f"({hint})")
    known = set(classes)
    order = [name for name in names.values() if name in known]
    if set(order) == set(classes) and len(order) == len(classes) and order != list(classes):
        for here, name in zip(order, classes, strict=True):
            if here != name:
                report.add(
                    "other order than metainfo.classes, which would mix classes up", short(here), f"for {short(name)}"
                )
    return names


def _check_images(
    report: Report, entries: list[Any], folder: Path, use: Use, known: dict[Path, Header]
) -> dict[Any, ListedImage]:
    """Return what the annotations refer to, by id; sizes are 0 where the file has none that can be used."""
    images: dict[Any, ListedImage] = {}
    where: dict[Any, str] = {}
    for entry in entries:
        key = key_of(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            report.add("image id missing", short(entry))
            continue
        name = entry.get("file_name")
        label = f"image {short(key)}" + (f" ({short(name)[1:-1]})" if isinstance(name, str) else "")
        if key in images:
            report.add("image id used twice", label)
            continue
        width, height = entry.get("width"), entry.get("height")
        if not (is_side(width) and is_side(height)):
            report.add(
                "width or height missing or not a number", label, f"has width {short(width)} and height {short(height)}"
            )
            width = height = 0
        path = None
        if not isinstance(name, str) or not name or "\0" in name:
            report.add("file_name missing", label)
        elif Path(name).is_absolute() or ".." in Path(name).parts or name[1:3] == ":/" or "://" in name:
            report.add("file outside of the image folder", label, _hint_of_last_part(folder, name))
        else:
            path = folder / name
        if isinstance(key, str) != isinstance(next(iter(images), key), str):
            report.add("image ids that are text and others that are numbers", label)
        images[key] = ListedImage(name if isinstance(name, str) else "", path, int(width), int(height))
        where[key] = label
    paths = dict.fromkeys(image.path for image in images.values() if image.path is not None)
    headers: dict[Path, Header | str] = dict(known)
    headers.update(read_headers(path for path in paths if path not in known))
    missing = [key for key, image in images.items() if image.path is not None and image.path not in headers]
    hints = _Hints(folder, [images[key].name for key in missing])
    if hints.common:
        report.hints["file not found"] = hints.common
    for key in missing:
        report.add("file not found", where[key], hints.of(images[key].name))
    _compare_with_headers(report, images, where, headers, use.reader)
    report.headers = {path: header for path in paths if isinstance(header := headers.get(path), Header)}
    return images


def _compare_with_headers(
    report: Report,
    images: dict[Any, ListedImage],
    where: dict[Any, str],
    headers: dict[Path, Header | str],
    reader: Reader,
) -> None:
    """Add images whose header is not what the file says, and set their size to what is loaded."""
    opens: dict[str, bool] = {}
    near = 0
    unseen: Counter[str] = Counter()
    for key, image in images.items():
        header = headers.get(image.path) if image.path is not None else None
        if isinstance(header, str):
            report.add("file not readable", where[key], f"is {header}")
        if image.path is None or not isinstance(header, Header):
            continue
        if header.format not in opens:
            opens[header.format] = reader.opens(image.path)
        if not opens[header.format]:
            report.add("file not readable", where[key], f"is {header.format}, which OpenCV does not read")
        if header.width * header.height > MAX_PIXELS:
            report.add("file not readable", where[key], f"has more than the {MAX_PIXELS:,} pixels allowed")
        if max(header.width, header.height) > MAX_RATIO * min(header.width, header.height):
            size = _by((header.width, header.height))
            report.add("file not readable", where[key], f"is {size}, too thin to be resized")
        listed, loaded = (image.width, image.height), reader.loaded(header)
        near_enough = max(abs(a - b) for a, b in zip(listed, loaded, strict=True)) <= 1
        if listed == (0, 0):
            continue
        image.width, image.height = loaded if near_enough else (0, 0)  # unknown which of the two is meant
        if listed == loaded:
            if header.orientation > 1 and header.turned == (header.width, header.height):
                unseen["as shown" if reader.turns(header) else f"as stored, as {header.format} is loaded"] += 1
        elif near_enough:
            near += 1
        elif listed == (header.width, header.height):
            report.add(
                "size is the one before Exif turns the image, and it is loaded turned",
                where[key],
                f"is {_by(listed)} in the file and {_by(loaded)} as loaded",
            )
        else:
            report.add(
                "size differs from the image's",
                where[key],
                f"is {_by(listed)} in the file and {_by(loaded)} as loaded{_factor(listed, loaded)}",
            )
    for how, number in unseen.items():
        report.notes.append(f"Exif turns or mirrors {count(number, 'image')} without a change of size: annotate {how}")
    if near:
        report.notes.append(f"the size of {count(near, 'image')} is a pixel off the image's")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _factor(listed: tuple[int, int], loaded: tuple[int, int]) -> str:
    if listed == loaded[::-1]:
        return ", width and height exchanged"
    across, down = loaded[0] / listed[0], loaded[1] / listed[1]
    return f", {across:.3g} times as large" if math.isclose(across, down, rel_tol=0.02) else ""


class _Hints:
    """Guesses where files that are not in the image folder might be."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        self.common = self._another_prefix(names) if names else ""
        self.present: dict[Path, dict[str, str]] = {}

    def _another_prefix(self, names: list[str]) -> str:
        """Return a remedy for all missing files, if there is one."""
        if not self.folder.is_dir():
            return f"{self.folder} is not a folder: set data_root and data_prefix"
        for parent in list(self.folder.parents)[:2]:
            if all(os.path.isfile(parent / name) for name in names):  # noqa: PTH113  (False for an impossible name)
                return f"all are below {parent}: set data_prefix's img to that folder, not {self.folder}"
        return ""

    def of(self, name: str) -> str:
        if self.common:
            return ""
        place = self.folder / Path(name).parent
        if place not in self.present:
            listed = place.iterdir() if place.is_dir() else ()
            self.present[place] = {_alike(entry.name): entry.name for entry in listed}
        present = self.present[place].get(_alike(Path(name).name))
        return f"(there is {short(present)})" if present else _hint_of_last_part(self.folder, name)


def _alike(name: str) -> str:
    """Return what names have in common that differ by case, extension or the composition of letters."""
    return same_name(Path(name).stem).casefold()


def _hint_of_last_part(folder: Path, name: str) -> str:
    last = name.rsplit("/", 1)[-1]
    is_there = os.path.isfile(folder / last)  # noqa: PTH113
    return f"(the folder has {short(last)}: leave out what stands before it)" if is_there else ""
