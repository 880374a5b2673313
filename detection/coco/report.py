"""Result of a check of an annotation file: its problems, counted, and the images and annotations that are used."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .content import count
from .headers import Header

LISTED = 10  # examples in a refusal, and names in a note
MAX_ROWS = 24  # classes in a table

KINDS = {  # kind of problem: what it is counted in, and what to do
    # categories
    "class not in the file": ("class", "write the file's categories into metainfo.classes"),
    "no id or name": ("category", "give each both"),
    "category id used twice": ("category", "number them anew"),
    "category ids that are text and others that are numbers": ("category", "write all as numbers"),
    "class name used twice": ("name", "rename or merge the categories"),
    "other order than metainfo.classes, which would mix classes up": (
        "category",
        "write metainfo.classes in the file's order, the same in all files",
    ),
    # images
    "image id missing": ("image", "give each a number or a text"),
    "image id used twice": ("image", "number the images anew, and their annotations' image_id with them"),
    "image ids that are text and others that are numbers": ("image", "write all as numbers"),
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
    "coordinates far outside of the image": ("annotation", "correct or remove them"),
    "bbox outside of the image": ("annotation", "correct or remove them"),
    "bbox is not around its mask": (
        "annotation",
        "correct the boxes or the masks, or leave segmentation out where the detector takes boxes only",
    ),
    "area is not a number": ("annotation", "correct it, or leave it out to have it computed"),
    "iscrowd is not 0 or 1": ("annotation", "correct them"),
    "no polygon, which the masks need": (
        "annotation",
        "draw them, or train RetinaNet or Faster R-CNN, which take boxes only",
    ),
    "polygon not in a list": ("annotation", "write [[x1, y1, x2, y2, …]], a list of polygons"),
    "polygon of pairs": ("annotation", "write [[x1, y1, x2, y2, …]], not [[x1, y1], [x2, y2], …]"),
    "polygon is not [x1, y1, x2, y2, x3, y3, …] in pixels": ("annotation", "correct or remove the polygons"),
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
    """A problem of one entry of a file."""

    kind: str
    """A key of `KINDS`."""
    where: str
    """The entry, such as `annotation 3` or `image 7 (a.jpg)`."""
    detail: str = ""


@dataclass
class Report:
    """Problems of one annotation file, and the images and annotations in it that are used."""

    path: Path
    purpose: str = "training"
    """`training` or `evaluation`."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of problems by kind."""
    problems: list[Problem] = field(default_factory=list)
    """The first `LISTED` problems of each kind."""
    hints: dict[str, str] = field(default_factory=dict)
    """Remedies by kind of problem, where the file allows a more specific one than `KINDS`."""
    notes: list[str] = field(default_factory=list)
    """Lines about what is valid but perhaps not intended."""
    images: int = 0
    """Number of images after MMDetection's filters."""
    annotations: int = 0
    """Number of annotations to learn from, or to evaluate against."""
    by_class: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Numbers of these images and annotations, by class of the config."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of skipped annotations, by reason."""
    headers: dict[Path, Header] = field(default_factory=dict)

    def add(self, kind: str, where: str, detail: str = "") -> None:
        assert kind in KINDS, kind
        self.counts[kind] += 1
        if self.counts[kind] <= LISTED:
            self.problems.append(Problem(kind, where, detail))

    def refusal(self) -> str:
        """Return all problems in one line."""
        total = self.counts.total()
        kinds = [f"{each}: {self._extent_of(each)} ({self.hints.get(each) or KINDS[each][1]})" for each in self.counts]
        examples = [f"{each.where} {each.detail}".strip() for each in self.problems if each.where][:LISTED]
        first = f"first ten: {', '.join(examples)}" if total > LISTED else ", ".join(examples)
        return "; ".join(
            [f"{self.path}: {count(total, 'problem')}: {kinds[0]}", *kinds[1:], *([first] if first else [])]
        )

    def _extent_of(self, kind: str) -> str:
        if KINDS[kind][0] == "reason":
            return next(each.detail for each in self.problems if each.kind == kind)
        return count(self.counts[kind], KINDS[kind][0])

    def lines(self) -> Iterator[str]:
        """Yield the lines to print before the images are used."""
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in self.skipped.items())
        yield (
            f"{self.path}: {count(self.images, 'image')} and {count(self.annotations, 'annotation')} for {self.purpose}"
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
    names.sort(key=lambda name: -reports[0].by_class[name][1])
    rows = [(name, *(figure for report in reports for figure in report.by_class[name])) for name in names]
    columns = [heading for report in reports for heading in (f"{report.purpose} images", "annotations")]
    table = Table("class", *columns)
    shown = rows if len(rows) <= MAX_ROWS else [*rows[: MAX_ROWS // 2], None, *rows[-MAX_ROWS // 2 :]]
    for row in shown:
        table.add_row(*(["…"] * (1 + len(columns)) if row is None else map(str, row)))
    if rows:
        console.print(table)
