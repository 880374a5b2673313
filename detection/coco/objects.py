"""Checks of one COCO file's annotations, one by one and taken together."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .boxes import SLACK, BoxForms, MaskFits, Pair, Rectangle, extent, mask_extent
from .content import (
    count,
    is_box,
    is_drawable,
    is_number,
    is_polygon,
    is_side,
    is_text_of,
    is_within_reach,
    is_zero_box,
    key_of,
    names_of,
    run_lengths,
    short,
)
from .headers import Reader
from .report import LISTED, Report

CROWD = "iscrowd"
FAR = "coordinates far outside of the image"


@dataclass(frozen=True)
class Use:
    """A config's use of an annotation file."""

    classes: tuple[str, ...]
    masks: bool
    """True if polygons or run lengths are read."""
    learn: bool
    """True for training, False for evaluation."""
    reader: Reader = field(default_factory=Reader)
    filter_empty: bool = False
    """Images without annotations of the classes are skipped."""
    min_size: int = 0
    """Images with a shorter side are skipped."""


@dataclass
class ListedImage:
    """An entry of the file's images, to which annotations refer."""

    name: str
    path: Path | None
    width: int
    """Width with which annotations are compared; 0 where it is unknown."""
    height: int
    boxes: list[Any] = field(default_factory=list)
    to_learn: Counter[str] = field(default_factory=Counter)
    """Number of annotations to learn from, by class name."""
    of_classes: bool = False
    """True if any annotation is of the config's classes, crowds included."""


class Objects:
    """A check of one file's annotations, one after the other, with its totals."""

    def __init__(self, report: Report, images: dict[Any, ListedImage], names: dict[Any, str], use: Use):
        self.report = report
        self.images = images
        self.names = names
        self.use = use
        self.forms = BoxForms()
        self.mask_fits = MaskFits()
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
        image.of_classes |= name in self.use.classes and not is_zero_box(box)
        segmentation = entry.get("segmentation")
        runs = run_lengths(segmentation.get("counts")) if isinstance(segmentation, dict) else None
        mask = mask_extent(segmentation, runs, image.width, image.height)
        if image.width and name in self.use.classes:
            self.forms.add(box, image.width, image.height, mask)
        reason = self._skipped(entry, name, box)
        if image.width and name in self.use.classes and mask is not None and not _is_normalized(mask):
            self.mask_fits.add(Pair(where, box, mask, image.width, image.height), used=reason in ("", CROWD))
        if reason:
            report.skipped[reason] += 1
        else:
            image.to_learn[name] += 1
        if reason in ("", CROWD):
            if image.width:
                self._hold_box(box, image, where)
            if self.use.masks:
                self._check_mask(segmentation, runs, box, image, where)

    def _image(self, entry: dict[str, Any], where: str) -> ListedImage | None:
        given = entry.get("image_id")
        image = self.images.get(key_of(given))
        if image is None:
            text = is_text_of(given, self.images)
            kind = (
                "image_id that is text where the file's ids are numbers" if text else "image_id of no image in the file"
            )
            self.report.add(kind, where, f"has image_id {short(given)}")
        return image

    def _class_name(self, entry: dict[str, Any], where: str) -> str | None:
        given = entry.get("category_id")
        name = self.names.get(key_of(given))
        if name is None:
            text = is_text_of(given, self.names)
            kind = "category_id that is text where the file's ids are numbers" if text else (
                "category_id that the file does not define"
            )  # fmt: skip
            self.report.add(kind, where, f"has category_id {short(given)}")
        elif name not in self.use.classes:
            self.others[name] += 1
        return name

    def _skipped(self, entry: dict[str, Any], name: str, box: list[float]) -> str:
        """Return why MMDetection or pycocotools skips a valid annotation; an empty text if it does not."""
        if name not in self.use.classes:
            return "of other categories"
        if is_zero_box(box):
            return "without width or height"
        if self.use.learn:
            if entry.get("ignore"):
                return "with ignore set"
            if box[2] < 1 or box[3] < 1:
                return "thinner than a pixel"
            if entry["area"] <= 0:
                return "of area 0"
        return CROWD if entry.get("iscrowd") == 1 else ""

    def _hold_box(self, box: list[float], image: ListedImage, where: str) -> None:
        x, y, width, height = box
        if not is_within_reach([x, y, x + width, y + height], image.width, image.height):
            self.report.add(FAR, where, f"has bbox {short(box)} in {image.width}×{image.height}")
            return
        if max(x, 0) >= min(x + width, image.width) or max(y, 0) >= min(y + height, image.height):
            self.outside.append((where, f"has bbox {short(box)} in {image.width}×{image.height}"))
            return
        beyond = max(-x, -y, x + width - image.width, y + height - image.height)
        if beyond > SLACK:
            self.beyond.append(beyond)

    def _check_mask(
        self, segmentation: Any, runs: list[int] | None, box: list[float], image: ListedImage, where: str
    ) -> None:
        report = self.report
        if isinstance(segmentation, dict):
            self._check_run_lengths(segmentation, runs, image, where)
        elif not isinstance(segmentation, list) or not segmentation:
            report.add("no polygon, which the masks need", where, "" if not segmentation else short(segmentation))
        elif all(map(is_number, segmentation)):
            report.add("polygon not in a list", where)
        elif any(_has_pairs(each) for each in (segmentation, *segmentation)):
            report.add("polygon of pairs", where)
        elif wrong := [each for each in segmentation if not is_polygon(each)]:
            report.add("polygon is not [x1, y1, x2, y2, x3, y3, …] in pixels", where, f"has {short(wrong[0])}")
        elif far := [each for each in segmentation if not self._is_near(each, image)]:
            report.add(FAR, where, f"has {short(far[0])} in {image.width}×{image.height}")
        elif min(box[2:]) >= 1:  # thinner ones, of which COCO itself has some, are evaluated against as they are
            self._check_extent(segmentation, image, where)

    @staticmethod
    def _is_near(polygon: list[float], image: ListedImage) -> bool:
        """Return whether a polygon can be drawn; an image whose size is in doubt is a problem of its own."""
        return is_drawable(polygon) and (not image.width or is_within_reach(polygon, image.width, image.height))

    def _check_extent(self, polygons: list[list[float]], image: ListedImage, where: str) -> None:
        left, top, right, bottom = rectangle = extent(polygons)
        if _is_normalized(rectangle):
            self.report.add("polygon is normalized to 0..1", where, f"has {short(polygons[0])}")
        elif left == right or top == bottom:
            self.report.add("mask is empty", where, f"has {short(polygons[0])}")
        elif image.width and (right <= 0 or bottom <= 0 or left >= image.width or top >= image.height):
            self.report.add("polygon outside of the image", where, f"in {image.width}×{image.height}")

    def _check_run_lengths(self, mask: dict[str, Any], runs: list[int] | None, image: ListedImage, where: str) -> None:
        size = mask.get("size")
        if not (isinstance(size, list) and len(size) == 2 and all(map(is_side, size))) or (
            image.width and size != [image.height, image.width]
        ):
            detail = f"has size {short(size)}, not {[image.height, image.width]}"
            self.report.add("run lengths of another size than the image", where, detail)
        elif runs is None or sum(runs) != size[0] * size[1]:
            total = "that cannot be read" if runs is None else f"of {sum(runs):,} pixels, not {size[0] * size[1]:,}"
            self.report.add("run lengths that are not as many pixels as the image", where, f"has counts {total}")
        elif not sum(runs[1::2]):
            self.report.add("mask is empty", where)

    def conclude(self) -> None:
        """Report problems of all annotations taken together, and count what is left."""
        report, use = self.report, self.use
        if form := self.forms.named():
            for where, detail in self.outside[:LISTED] or [("all of them", "")]:
                report.add(form, where, detail)
            report.counts[form] = self.forms.total
        else:
            for where, detail in self.outside:
                report.add("bbox outside of the image", where, detail)
            self._conclude_mask_fits()
        if self.beyond:
            report.notes.append(
                f"{count(len(self.beyond), 'box')} beyond the image by more than {SLACK} px (up to "
                f"{max(self.beyond):.0f}): MMDetection's Resize clips to the image"
            )
        self._check_same_files()
        self._count()
        if self.others:
            report.notes.append(
                f"{count(self.others.total(), 'annotation')} of {count(len(self.others), 'category')} that "
                f"metainfo.classes does not have ({names_of(self.others)}) are left out"
            )
        if not report.annotations and not report.counts:
            why = ", ".join(f"{number:,} {reason}" for reason, number in report.skipped.items())
            if not why:
                why = "it has no annotations" if report.images or not use.learn else "it has no images"
            elif len(report.skipped) == 1:
                why = f"all are {next(iter(report.skipped))}"
            report.add("no annotation is left to learn from" if use.learn else "nothing to evaluate against", "", why)

    def _conclude_mask_fits(self) -> None:
        """Report boxes that do not enclose their masks: a problem where they are many, a note where they are few."""
        fits, kind = self.mask_fits, "bbox is not around its mask"
        wrong, why = fits.wrong()
        for pair in wrong:
            left, top, right, bottom = pair.mask
            around = [round(each, 1) for each in (left, top, right - left, bottom - top)]
            self.report.add(kind, pair.where, f"has bbox {short(pair.box)} and a mask with bbox {around}")
        if why:
            self.report.hints[kind] = why
        elif not wrong and fits.misplaced:
            self._note_pairs("beside their masks", fits.misplaced)
        if not why and fits.loose:
            self._note_pairs("far larger or far smaller than their masks", fits.loose)

    def _note_pairs(self, how: str, pairs: list[Pair]) -> None:
        named = f"{', '.join(pair.where for pair in pairs[:LISTED])}{', …' if len(pairs) > LISTED else ''}"
        self.report.notes.append(f"boxes {how}: {len(pairs):,} of {self.mask_fits.compared:,} ({named})")

    def _check_same_files(self) -> None:
        """Report files that several entries name, unless the entries have the same annotations."""
        entries = defaultdict(list)
        for key, image in self.images.items():
            if image.path is not None:
                entries[image.path].append((key, image.boxes))
        doubles = 0
        for path, same in entries.items():
            if len(same) > 1 and any(sorted(boxes) != sorted(same[0][1]) for _, boxes in same):
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
    """Return whether a value is a list of points, [[x, y], [x, y], …]."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(each, list) and len(each) == 2 and all(map(is_number, each)) for each in value)
    )


def _is_normalized(rectangle: Rectangle) -> bool:
    """Return whether a mask is inside of the image's first pixel, as coordinates in 0..1 are."""
    return min(rectangle) >= 0 and max(rectangle) <= 1
