"""COCO annotation files, checked against the images and the config before anything is built on them.

Every problem of a file is counted and the first ones are listed, in one line; what is sound but not what it seems is a
note.
"""

import difflib
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from shvit.errors import InputError
from shvit.train.data import MAX_PIXELS

from .coco import count, is_box, is_number, is_polygon, key_of, load_content, repair, run_lengths, short
from .config import innermost, metrics_of
from .detector import class_names
from .headers import Header, Reader, copies, read_headers

LISTED = 10  # examples in a refusal, and names in a note
MAX_ROWS = 24  # classes in a table
SLACK = 2  # pixels by which boxes may reach beyond their image unmentioned: annotation tools round

KINDS = {  # kind of problem: what it is counted in, and what to do
    # categories
    "class not in the file": ("class", "write the file's categories into metainfo.classes"),
    "no id or name": ("category", "give each both"),
    "category id used twice": ("category", "number them anew"),
    "class name used twice": ("name", "rename or merge the categories"),
    "other order than metainfo.classes, which would mix classes up": (
        "category",
        "write metainfo.classes in the file's order, the same in all files",
    ),
    # images
    "image id missing": ("image", "give each a number or a text"),
    "image id used twice": ("image", "number the images anew, and their annotations' image_id with them"),
    "file_name missing": ("image", "name the file"),
    "width or height missing or not a number": ("image", "write both as numbers, in pixels"),
    "file outside of the image folder": ("image", "name files relative to data_prefix"),
    "file not found": ("image", "set data_prefix, or remove the images from the file"),
    "file not readable": ("image", "replace or convert the files, or remove them from the annotation file"),
    "size differs from the image's": (
        "image",
        "take the images that were annotated, scale the annotations as the images were, or correct width and height if "
        "these alone are wrong",
    ),
    "size is the one before Exif turns the image, and it is loaded turned": (
        "image",
        "annotate the images as shown, or remove the orientation from the files",
    ),
    "same file under several ids with other annotations": ("file", "merge the entries"),
    # annotations
    "annotation id used twice": ("annotation", "number them anew, or remove the doubles"),
    "not an annotation": ("entry", "remove it"),
    "image_id that is text where the file's ids are numbers": ("annotation", "write numbers"),
    "image_id of no image in the file": ("annotation", "correct or remove them"),
    "category_id that is text where the file's ids are numbers": ("annotation", "write numbers"),
    "category_id that the file does not define": ("annotation", "add the category, or correct or remove them"),
    "bbox is not [x, y, width, height] in pixels": ("annotation", "correct or remove them"),
    "bbox is [x1, y1, x2, y2], not [x, y, width, height]": ("annotation", "convert them"),
    "bbox is [center x, center y, width, height], not [x, y, width, height]": ("annotation", "convert them"),
    "bbox is normalized to 0..1": (
        "annotation",
        "multiply by the image's width and height; YOLO's x and y are centers",
    ),
    "bbox outside of the image": ("annotation", "correct or remove them"),
    "area is not a number": ("annotation", "correct it, or leave it out to have it computed"),
    "iscrowd is not 0 or 1": ("annotation", "correct them"),
    "no polygon, which the masks need": (
        "annotation",
        "draw them, or train RetinaNet or Faster R-CNN, which take boxes only",
    ),
    "polygon not in a list": ("annotation", "write [[x1, y1, x2, y2, …]], a list of polygons"),
    "polygon of pairs": ("annotation", "write [[x1, y1, x2, y2, …]], not [[x1, y1], [x2, y2], …]"),
    "polygon has not three corners or more": ("annotation", "correct or remove the polygons"),
    "polygon is normalized to 0..1": ("annotation", "multiply by the image's width and height"),
    "polygon outside of the image": ("annotation", "correct or remove them"),
    "mask is empty": ("annotation", "correct or remove them"),
    "run lengths of another size than the image": ("annotation", "encode the masks at the image's [height, width]"),
    "run lengths that are not as many pixels as the image": ("annotation", "encode the masks again"),
    # the file
    "no annotation is left to learn from": ("reason", "annotate objects of the config's classes"),
    "nothing to evaluate against": (
        "reason",
        "annotate validation images, or train without validation: --options val_dataloader=None val_cfg=None "
        "val_evaluator=None",
    ),
}


@dataclass(frozen=True)
class Problem:
    """What is wrong with one entry of a file."""

    kind: str
    """A key of `KINDS`."""
    where: str
    """The entry: `annotation 3`, `image 7 (a.jpg)`."""
    detail: str = ""


@dataclass
class Report:
    """What one annotation file holds: what is wrong, and what a detector is left with."""

    path: Path
    counts: Counter[str] = field(default_factory=Counter)
    """Problems by kind."""
    problems: list[Problem] = field(default_factory=list)
    """The first `LISTED` of each kind."""
    hints: dict[str, str] = field(default_factory=dict)
    """What to do about a kind of problem, where the file tells more than `KINDS`."""
    notes: list[str] = field(default_factory=list)
    """Lines about what is sound but may not be meant."""
    images: int = 0
    """That MMDetection is left with after its filters."""
    annotations: int = 0
    """To learn from, or to evaluate against."""
    by_class: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Images and annotations of each of the config's classes, of those."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Annotations that are not among those, by reason."""
    headers: dict[Path, Header] = field(default_factory=dict)

    def add(self, kind: str, where: str, detail: str = "") -> None:
        assert kind in KINDS, kind
        self.counts[kind] += 1
        if self.counts[kind] <= LISTED:
            self.problems.append(Problem(kind, where, detail))

    def refusal(self) -> str:
        """Return all problems in one line."""
        total = self.counts.total()
        kinds = [f"{kind}: {self._extent_of(kind)} ({self._remedy(kind)})" for kind in self.counts]
        examples = [f"{each.where} {each.detail}".strip() for each in self.problems if each.where][:LISTED]
        first = f"first ten: {', '.join(examples)}" if total > LISTED else ", ".join(examples)
        return "; ".join(
            [f"{self.path}: {count(total, 'problem')}: {kinds[0]}", *kinds[1:], *([first] if first else [])]
        )

    def _extent_of(self, kind: str) -> str:
        if KINDS[kind][0] == "reason":
            return next(each.detail for each in self.problems if each.kind == kind)
        return count(self.counts[kind], KINDS[kind][0])

    def _remedy(self, kind: str) -> str:
        return self.hints.get(kind) or KINDS[kind][1]

    def lines(self) -> Iterator[str]:
        """Yield what to say before the images are used."""
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in self.skipped.items())
        yield (
            f"{self.path}: {count(self.images, 'image')}, {count(self.annotations, 'annotation')}"
            f"{f' (skipped: {left_out})' if left_out else ''}"
        )
        yield from (f"{self.path}: {note}" for note in self.notes)

    def summary(self) -> dict[str, Any]:
        """Return figures for a command's result."""
        return {
            "ann_file": str(self.path),
            "images": self.images,
            "annotations": self.annotations,
            "skipped": dict(self.skipped),
            "notes": self.notes,
        }


def show(reports: list[Report], console: Console) -> None:
    """Print the reports: a line or more for each file, and a table of images and annotations by class."""
    for report in reports:
        for line in report.lines():
            console.print(line)
    names = list(reports[0].by_class) if reports else []
    rows = [(name, *(figure for report in reports for figure in report.by_class[name])) for name in names]
    rows.sort(key=lambda row: -row[2])
    columns = [f"{report.path.name}: {what}" for report in reports for what in ("images", "annotations")]
    table = Table("class", *columns)
    shown = rows if len(rows) <= MAX_ROWS else [*rows[: MAX_ROWS // 2], None, *rows[-MAX_ROWS // 2 :]]
    for row in shown:
        table.add_row(*(["…"] * (1 + len(columns)) if row is None else map(str, row)))
    if rows:
        console.print(table)


@dataclass(frozen=True)
class Use:
    """What a config's loader does with a file."""

    classes: tuple[str, ...]
    masks: bool
    """Whether polygons or run lengths are read."""
    learn: bool
    """Trained with, rather than evaluated against."""
    reader: Reader = Reader()
    filter_empty: bool = False
    """Images without annotations of the classes are skipped."""
    min_size: int = 0
    """Images with a shorter side are skipped."""


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


def annotation_file(dataset: Any) -> Path:
    return Path(dataset.get("data_root") or "", dataset.ann_file)


def image_folder(dataset: Any) -> Path:
    return Path(dataset.get("data_root") or "", dataset.get("data_prefix", {}).get("img") or "")


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


def _check_class_names(config: Config, split: str, loader: Any, classes: tuple[str, ...]) -> None:
    """Raises where a loader's class names are not usable, or not those of the test loader, which name the detector's."""
    metainfo = (innermost(loader.dataset).get("metainfo") or {}) if loader is not None else {}
    said = metainfo.get("classes")
    where = f"{config.filename}: {split}_dataloader's metainfo.classes"
    if isinstance(said, str):
        raise InputError(f"{where} is the text {short(said)}; write a tuple, with a comma: ({short(said)},)")
    if said is not None and (not said or not all(isinstance(each, str) for each in said)):
        raise InputError(f"{where} is {short(said)}; write the names of one class or more")
    if twice := [name for name, number in Counter(said or ()).items() if number > 1]:
        raise InputError(f"{where} has {short(twice[0])} twice; name each class once")
    if loader is not None and said is None and innermost(loader.dataset).type.rpartition(".")[2] == "CocoDataset":
        from mmdet.datasets import CocoDataset

        said = CocoDataset.METAINFO["classes"]
    if said is not None and tuple(said) != classes:
        raise InputError(
            f"{where} has {_names(said)}, and test_dataloader's {_names(classes)}; give all loaders the same"
        )


def _check_metric(config: Config, split: str, metric: Any, path: Path) -> None:
    named = metric.get("ann_file")
    if named and Path(named).resolve() != path.resolve():
        raise InputError(f"{split}_evaluator reads {named} and {split}_dataloader {path}; give both one ann_file")
    if "segm" in _measured(metric) and config.model.get("roi_head") and not has_masks(config):
        raise InputError(f'{split}_evaluator measures masks (segm), and the model has no mask head; set metric="bbox"')


def has_masks(config: Config) -> bool:
    """Whether the detector learns masks."""
    return bool((config.model.get("roi_head") or {}).get("mask_head"))


def _measured(metric: Any) -> list[str]:
    measured = metric.get("metric") or "bbox"
    return [measured] if isinstance(measured, str) else list(measured)


def _use(config: Config, split: str, dataset: Any, classes: tuple[str, ...]) -> Use:
    steps = {str(step.get("type")).rpartition(".")[2]: step for step in dataset.get("pipeline") or []}
    image = steps.get("LoadPhotograph") or steps.get("LoadImageFromFile") or {}
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
    """Check one file that is trained with; see `inspect`.

    Raises:
        InputError: it has problems, all of which are counted.
    """
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
    content = load_content(path)
    report = Report(path)
    raw_ids = [each.get("id") if isinstance(each, dict) else None for each in content["annotations"]]
    report.notes += repair(content)
    names = _check_categories(report, content["categories"], use.classes)
    images = _check_images(report, content["images"], folder, use, known or {})
    check = _Annotations(report, images, names, use)
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
    for category in entries:
        key = key_of(category.get("id")) if isinstance(category, dict) else None
        if key is None or not isinstance(category.get("name"), str):
            report.add("no id or name", short(category))
        elif key in names:
            report.add("category id used twice", f"category {short(key)} ({short(category['name'])})")
        else:
            names[key] = category["name"]
    for name, number in Counter(names.values()).items():
        if number > 1:
            ids = [key for key, other in names.items() if other == name]
            report.add(
                "class name used twice", short(name), f"(categories {', '.join(map(short, ids))}, all with annotations)"
            )
    for name in classes:
        if name not in names.values():
            close = difflib.get_close_matches(name, names.values(), n=1, cutoff=0.8)
            hint = f"did you mean {short(close[0])}?" if close else f"it has {_names(names.values())}"
            report.add("class not in the file", short(name), f"({hint})")
    order = [name for name in names.values() if name in classes]
    if set(order) == set(classes) and len(order) == len(classes) and order != list(classes):
        for here, name in zip(order, classes, strict=True):
            if here != name:
                report.add(
                    "other order than metainfo.classes, which would mix classes up", short(here), f"for {short(name)}"
                )
    return names


@dataclass
class _Image:
    """An entry of images that annotations refer to."""

    name: str
    path: Path | None
    width: int
    """That annotations are held against; 0 where it is not known."""
    height: int
    boxes: list[Any] = field(default_factory=list)
    to_learn: Counter[str] = field(default_factory=Counter)
    """Annotations by class name, of those to learn from."""
    of_classes: bool = False
    """Whether any annotation is of the config's classes, a crowd too."""


def _check_images(
    report: Report, entries: list[Any], folder: Path, use: Use, known: dict[Path, Header]
) -> dict[Any, _Image]:
    """Return what the annotations refer to, by id; sizes are 0 where the file has none that can be used."""
    images: dict[Any, _Image] = {}
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
        if not (_is_side(width) and _is_side(height)):
            report.add(
                "width or height missing or not a number", label, f"has width {short(width)} and height {short(height)}"
            )
            width = height = 0
        path = None
        if not isinstance(name, str) or not name or "\0" in name:
            report.add("file_name missing", label)
        elif Path(name).is_absolute() or ".." in Path(name).parts or name[1:3] == ":/":
            report.add("file outside of the image folder", label, _hint_of_last_part(folder, name))
        else:
            path = folder / name
        images[key] = _Image(name if isinstance(name, str) else "", path, int(width), int(height))
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
    _hold_against_headers(report, images, where, headers, use.reader)
    report.headers = {path: header for path in paths if isinstance(header := headers.get(path), Header)}
    return images


def _hold_against_headers(
    report: Report, images: dict[Any, _Image], where: dict[Any, str], headers: dict[Path, Header | str], reader: Reader
) -> None:
    """Add images whose header is not what the file says, and set their size to what is loaded."""
    opens: dict[str, bool] = {}
    unseen = near = 0
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
        said, loaded = (image.width, image.height), reader.loaded(header)
        if said == (0, 0):
            continue
        if said == loaded:
            unseen += header.orientation > 1 and header.turned == (header.width, header.height)
        elif max(abs(a - b) for a, b in zip(said, loaded, strict=True)) <= 1:
            near += 1
            image.width, image.height = loaded
        elif said == (header.width, header.height):
            report.add(
                "size is the one before Exif turns the image, and it is loaded turned",
                where[key],
                f"is {_by(said)} in the file and {_by(loaded)} as loaded",
            )
        else:
            report.add(
                "size differs from the image's",
                where[key],
                f"is {_by(said)} in the file and {_by(loaded)} as loaded{_factor(said, loaded)}",
            )
    if unseen:
        report.notes.append(
            f"Exif turns or mirrors {count(unseen, 'image')} without a change of size; annotations must be of the image "
            "as shown"
        )
    if near:
        report.notes.append(f"the size of {count(near, 'image')} is a pixel off the image's")


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _factor(said: tuple[int, int], loaded: tuple[int, int]) -> str:
    if said == loaded[::-1]:
        return ", width and height exchanged"
    across, down = loaded[0] / said[0], loaded[1] / said[1]
    return f", {across:.3g} times as large" if math.isclose(across, down, rel_tol=0.02) else ""


class _Hints:
    """Where files that are not in the image folder might be."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        self.common = self._another_prefix(names) if names else ""
        self.present: dict[Path, dict[str, str]] = {}

    def _another_prefix(self, names: list[str]) -> str:
        """Return what is true of all that are missing."""
        if not self.folder.is_dir():
            return f"{self.folder} is not a folder: set data_root and data_prefix"
        for parent in list(self.folder.parents)[:2]:
            if all((parent / name).is_file() for name in names):
                return f"all are below {parent}: set data_prefix's img to that folder, not {self.folder}"
        return ""

    def of(self, name: str) -> str:
        if self.common:
            return ""
        place = self.folder / Path(name).parent
        if place not in self.present:
            listed = place.iterdir() if place.is_dir() else ()
            self.present[place] = {_alike(entry.name): entry.name for entry in listed}
        found = self.present[place].get(_alike(Path(name).name))
        return f"(there is {short(found)})" if found else _hint_of_last_part(self.folder, name)


def _alike(name: str) -> str:
    """Return what names have in common that differ by case, extension or the composition of letters."""
    return unicodedata.normalize("NFC", Path(name).stem).casefold()


def _hint_of_last_part(folder: Path, name: str) -> str:
    last = name.rsplit("/", 1)[-1]
    return f"(the folder has {short(last)}: leave out what stands before it)" if (folder / last).is_file() else ""


def _is_side(value: Any) -> bool:
    return is_number(value) and float(value).is_integer() and 0 < value < 1 << 20


def _names(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(short(name)[1:-1] for name in names[:5]) + (" …" if len(names) > 5 else "")


# --- annotations ------------------------------------------------------------------------------------------------------


class _Annotations:
    """The annotations of one file, one after the other, and what they add up to."""

    def __init__(self, report: Report, images: dict[Any, _Image], names: dict[Any, str], use: Use):
        self.report = report
        self.images = images
        self.names = names
        self.use = use
        self.forms = _BoxForms()
        self.outside: list[tuple[str, str]] = []
        self.beyond: list[float] = []
        self.others: Counter[str] = Counter()

    def add(self, entry: Any, where: str) -> None:
        """Check one annotation; count it where it is sound."""
        report = self.report
        if not isinstance(entry, dict):
            report.add("not an annotation", short(entry))
            return
        image = self._image(entry, where)
        name = self._class_name(entry, where)
        box = entry.get("bbox")
        if not is_box(box):
            report.add("bbox is not [x, y, width, height] in pixels", where, f"has bbox {short(box)}")
        if not _is_area(entry.get("area")) and is_box(box):
            report.add("area is not a number", where, f"has area {short(entry.get('area'))}")
        if entry.get("iscrowd") not in (0, 1):
            report.add("iscrowd is not 0 or 1", where, f"has iscrowd {short(entry.get('iscrowd'))}")
        if image is None or name is None or not is_box(box) or not _is_area(entry.get("area")):
            return
        image.boxes.append((name, *box))
        image.of_classes |= name in self.use.classes
        if reason := self._skipped(entry, name, box):
            report.skipped[reason] += 1
            if reason not in ("iscrowd",):
                return
        if image.width:
            self._hold_box(entry, box, image, where)
        if self.use.masks:
            self._check_mask(entry.get("segmentation"), image, where)
        if not reason:
            image.to_learn[name] += 1

    def _image(self, entry: dict[str, Any], where: str) -> _Image | None:
        given = entry.get("image_id")
        image = self.images.get(key_of(given))
        if image is None:
            text = isinstance(given, str) and given.strip().isdigit() and int(given) in self.images
            kind = (
                "image_id that is text where the file's ids are numbers" if text else "image_id of no image in the file"
            )
            self.report.add(kind, where, f"has image_id {short(given)}")
        return image

    def _class_name(self, entry: dict[str, Any], where: str) -> str | None:
        given = entry.get("category_id")
        name = self.names.get(key_of(given))
        if name is None:
            text = isinstance(given, str) and given.strip().isdigit() and int(given) in self.names
            kind = "category_id that is text where the file's ids are numbers" if text else (
                "category_id that the file does not define"
            )  # fmt: skip
            self.report.add(kind, where, f"has category_id {short(given)}")
        elif name not in self.use.classes:
            self.others[name] += 1
        return name

    def _skipped(self, entry: dict[str, Any], name: str, box: list[float]) -> str:
        """Why MMDetection does not learn from a sound annotation, or pycocotools not evaluate against it, if so."""
        if name not in self.use.classes:
            return "of other categories"
        if self.use.learn:
            if entry.get("ignore"):
                return "with ignore set"
            if box[2] < 1 or box[3] < 1:
                return "thinner than a pixel"
            if entry["area"] <= 0:
                return "of area 0"
        return "iscrowd" if entry.get("iscrowd") == 1 else ""

    def _hold_box(self, entry: dict[str, Any], box: list[float], image: _Image, where: str) -> None:
        x, y, width, height = box
        self.forms.add(box, image, entry)
        if max(x, 0) >= min(x + width, image.width) or max(y, 0) >= min(y + height, image.height):
            if self.use.learn or width * height > 0:
                self.outside.append((where, f"has bbox {short(box)} in {image.width}×{image.height}"))
            return
        beyond = max(-x, -y, x + width - image.width, y + height - image.height)
        if beyond > SLACK:
            self.beyond.append(beyond)

    def _check_mask(self, segmentation: Any, image: _Image, where: str) -> None:
        report = self.report
        if isinstance(segmentation, dict):
            self._check_run_lengths(segmentation, image, where)
        elif not isinstance(segmentation, list) or not segmentation:
            report.add("no polygon, which the masks need", where, "" if not segmentation else short(segmentation))
        elif all(map(is_number, segmentation)):
            report.add("polygon not in a list", where)
        elif any(_has_pairs(each) for each in (segmentation, *segmentation)):
            report.add("polygon of pairs", where)
        elif wrong := [each for each in segmentation if not is_polygon(each)]:
            report.add("polygon has not three corners or more", where, f"has {short(wrong[0])}")
        else:
            self._check_extent(segmentation, image, where)

    def _check_extent(self, polygons: list[list[float]], image: _Image, where: str) -> None:
        left, top, right, bottom = extent(polygons)
        if 0 <= left and 0 <= top and right <= 1 and bottom <= 1:
            self.report.add("polygon is normalized to 0..1", where, f"has {short(polygons[0])}")
        elif left == right or top == bottom:
            self.report.add("mask is empty", where, f"has {short(polygons[0])}")
        elif image.width and (right <= 0 or bottom <= 0 or left >= image.width or top >= image.height):
            self.report.add("polygon outside of the image", where, f"in {image.width}×{image.height}")

    def _check_run_lengths(self, mask: dict[str, Any], image: _Image, where: str) -> None:
        size, runs = mask.get("size"), run_lengths(mask.get("counts"))
        if not (isinstance(size, list) and len(size) == 2 and all(map(_is_side, size))) or (
            image.width and size != [image.height, image.width]
        ):
            detail = f"has size {short(size)}, not {[image.height, image.width]}"
            self.report.add("run lengths of another size than the image", where, detail)
        elif runs is None or sum(runs) != size[0] * size[1]:
            total = "that are none" if runs is None else f"of {sum(runs):,} pixels, not {size[0] * size[1]:,}"
            self.report.add("run lengths that are not as many pixels as the image", where, f"has counts {total}")
        elif not sum(runs[1::2]):
            self.report.add("mask is empty", where)

    def conclude(self) -> None:
        """Add what shows in all of them together, and what is left."""
        report, use = self.report, self.use
        if form := self.forms.named():
            for where, detail in self.outside[:LISTED] or [("all of them", "")]:
                report.add(form, where, detail)
            report.counts[form] = self.forms.total
        else:
            for where, detail in self.outside:
                report.add("bbox outside of the image", where, detail)
        if self.beyond:
            report.notes.append(
                f"{count(len(self.beyond), 'box')} reach beyond the image by more than {SLACK} px (up to "
                f"{max(self.beyond):.0f}); MMDetection's Resize clips them to it"
            )
        self._check_same_files()
        self._count()
        if self.others:
            report.notes.append(
                f"{count(self.others.total(), 'annotation')} of {count(len(self.others), 'category')} that "
                f"metainfo.classes does not have ({_names(self.others)}) are left out"
            )
        if not report.annotations and not report.counts:
            why = ", ".join(f"{number:,} {reason}" for reason, number in report.skipped.items())
            if not why:
                why = "it has no annotations" if report.images or not use.learn else "it has no images"
            elif len(report.skipped) == 1:
                why = f"all are {next(iter(report.skipped))}"
            report.add("no annotation is left to learn from" if use.learn else "nothing to evaluate against", "", why)

    def _check_same_files(self) -> None:
        """Add files that several entries name, unless the entries have the same annotations."""
        entries = defaultdict(list)
        for key, image in self.images.items():
            if image.path is not None:
                entries[image.path].append((key, sorted(image.boxes)))
        doubles = 0
        for path, same in entries.items():
            if len(same) > 1 and any(boxes != same[0][1] for _, boxes in same):
                ids = ", ".join(short(key) for key, _ in same[:5])
                self.report.add(
                    "same file under several ids with other annotations", short(path.name)[1:-1], f"({ids})"
                )
            doubles += len(same) - 1
        if doubles:
            self.report.notes.append(f"{count(doubles, 'image')} listed again under another id")

    def _count(self) -> None:
        """Count what is left after MMDetection's filters."""
        report, use = self.report, self.use
        images: Counter[str] = Counter()
        annotations: Counter[str] = Counter()
        empty = small = without = 0
        for image in self.images.values():
            if use.filter_empty and not image.of_classes:
                empty += 1
                continue
            if 0 < min(image.width, image.height) < use.min_size:
                small += 1
                report.skipped[f"in images below {use.min_size} px"] += image.to_learn.total()
                continue
            report.images += 1
            without += not image.to_learn
            images.update(image.to_learn.keys())
            annotations.update(image.to_learn)
        report.skipped = +report.skipped
        report.annotations = annotations.total()
        report.by_class = {name: (images[name], annotations[name]) for name in use.classes}
        if empty:
            report.notes.append(f"{count(empty, 'image')} without annotations skipped (filter_empty_gt)")
        if small:
            report.notes.append(f"{count(small, 'image')} with a side below {use.min_size} px skipped (min_size)")
        if without:
            report.notes.append(f"{count(without, 'image')} with nothing on them to {'learn' if use.learn else 'find'}")
        absent = [name for name in use.classes if not annotations[name]]
        if absent and report.annotations:
            report.notes.append(
                f"no annotation of {len(absent)} of {len(use.classes)} classes: "
                f"{', '.join(short(name)[1:-1] for name in absent[:LISTED])}{', …' if len(absent) > LISTED else ''}"
            )


def _is_area(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e15 < value < 1e15


def _has_pairs(value: Any) -> bool:
    """Whether a value is points, [[x, y], [x, y], …]."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(each, list) and len(each) == 2 and all(map(is_number, each)) for each in value)
    )


def extent(polygons: list[list[float]]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of polygons."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return min(xs), min(ys), max(xs), max(ys)


class _BoxForms:
    """Which form boxes have, by the image, and by the polygons or the area where there are any."""

    NAMES = (
        "bbox is [x1, y1, x2, y2], not [x, y, width, height]",
        "bbox is [center x, center y, width, height], not [x, y, width, height]",
    )
    NORMALIZED = "bbox is normalized to 0..1"

    def __init__(self) -> None:
        self.total = self.normalized = self.right = self.proven = 0
        self.fits: Counter[str] = Counter()

    def add(self, box: list[float], image: _Image, entry: dict[str, Any]) -> None:
        a, b, c, d = box
        self.total += 1
        self.normalized += max(box) <= 1
        segmentation = entry.get("segmentation")
        drawn = None
        if isinstance(segmentation, list) and segmentation and all(map(is_polygon, segmentation)):
            drawn = extent(segmentation)
        self.proven += drawn is not None
        area = entry["area"]

        def fits(left: float, top: float, right: float, bottom: float) -> bool:
            corners = (left, top, right, bottom)
            if drawn is not None:
                return all(abs(one - other) <= SLACK for one, other in zip(corners, drawn, strict=True))
            inside = min(left, top) >= -SLACK and right <= image.width + SLACK and bottom <= image.height + SLACK
            return inside and right > left and bottom > top

        self.right += fits(a, b, a + c, b + d) or (drawn is None and math.isclose(area, c * d, rel_tol=1e-3))
        self.fits[self.NAMES[0]] += fits(a, b, c, d)
        self.fits[self.NAMES[1]] += fits(a - c / 2, b - d / 2, a + c / 2, b + d / 2)

    def named(self) -> str | None:
        """Return the kind of problem, where nearly all boxes have another form and many cannot have the right one."""
        if self.total and self.normalized > self.total / 2:
            return self.NORMALIZED
        wrong = self.total - self.right
        if wrong < max(3, self.total / 10) and not (self.proven and wrong > self.total / 2):
            return None
        return next((name for name in self.NAMES if self.fits[name] >= 0.95 * self.total), None)
