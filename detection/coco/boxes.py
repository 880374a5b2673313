"""Checks that boxes have COCO's form and enclose their masks, and finds the mistake that explains those that do not."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .content import is_polygon

SLACK = 2  # pixels by which boxes may reach beyond their image unmentioned: annotation tools round
NEAR = 4  # pixels by which any edge may be off a mask's: tiny objects, whose IoU a pixel halves
SURE_IOU = 0.5  # boxes drawn by hand have 0.5 to 0.9 with masks made later
MIN_IOU = 0.3  # a wrong form or scale has 0 to 0.25 with most masks
INSIDE = 0.9  # part of the smaller rectangle within the other from which on a box is loose, not misplaced
MAX_SHARE = 0.05  # of a file's boxes: a slip here and there is less, and a wrong form or scale has most of them
EXPLAINED = 0.8  # part of the boxes in doubt that one mistake must explain to be named
EXPLAINED_IOU = 0.75
MIN_CALLS = 3  # boxes that one mistake must explain: any one box is a shift of its mask

Rectangle = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


# --- masks ------------------------------------------------------------------------------------------------------------


def mask_extent(segmentation: Any, runs: list[int] | None, width: int, height: int) -> Rectangle | None:
    """Return the rectangle around a mask that is valid, not empty and for an image of the given size.

    Args:
        runs: the run lengths, where the mask has some.
    """
    if isinstance(segmentation, list) and segmentation and all(map(is_polygon, segmentation)):
        rectangle = extent(segmentation)
    elif runs and width and segmentation.get("size") == [height, width] and sum(runs) == height * width:
        rectangle = extent_of_runs(runs, height)
    else:
        return None
    return rectangle if _area(rectangle) else None


def extent(polygons: list[list[float]]) -> Rectangle:
    """Return the rectangle around polygons."""
    return (
        min(min(each[::2]) for each in polygons),
        min(min(each[1::2]) for each in polygons),
        max(max(each[::2]) for each in polygons),
        max(max(each[1::2]) for each in polygons),
    )


def extent_of_runs(runs: list[int], height: int) -> Rectangle:
    """Return the rectangle around the pixels of COCO's run lengths, which go down the columns, background first."""
    left, top, right, bottom = float("inf"), float("inf"), 0, 0
    begin = 0
    for number, length in enumerate(runs):
        end = begin + length
        if number % 2 and length:
            (first, upper), (last, lower) = divmod(begin, height), divmod(end - 1, height)
            left, right = min(left, first), max(right, last + 1)
            top = min(top, upper if first == last else 0)
            bottom = max(bottom, lower + 1 if first == last else height)
        begin = end
    return (left, top, right, bottom) if right else (0, 0, 0, 0)


# --- rectangles -------------------------------------------------------------------------------------------------------


def _area(rectangle: Rectangle) -> float:
    left, top, right, bottom = rectangle
    return max(right - left, 0) * max(bottom - top, 0)


def _common(one: Rectangle, other: Rectangle) -> Rectangle:
    """Return the intersection of two rectangles; its area is 0 where they do not overlap."""
    return max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])


def _iou(one: Rectangle, other: Rectangle) -> float:
    common = _area(_common(one, other))
    union = _area(one) + _area(other) - common
    return common / union if union > 0 else 0.0


def _within(one: Rectangle, other: Rectangle, pixels: float) -> bool:
    """Return whether no edge is further than a distance from the other rectangle's."""
    return all(abs(a - b) <= pixels for a, b in zip(one, other, strict=True))


# --- forms ------------------------------------------------------------------------------------------------------------


class BoxForms:
    """Counts of the forms that boxes can have, judged by the image, and by the masks where there are any."""

    NAMES = (
        "bbox is [x1, y1, x2, y2], not [x, y, width, height]",
        "bbox is [center x, center y, width, height], not [x, y, width, height]",
    )
    NORMALIZED = "bbox is normalized to 0..1"

    def __init__(self) -> None:
        self.total = self.normalized = self.right = self.drawn = 0
        self.fits: Counter[str] = Counter()

    def add(self, box: list[float], width: int, height: int, mask: Rectangle | None) -> None:
        """Count the forms in which a box is inside of its image, or around its mask."""
        a, b, c, d = box

        def fits(left: float, top: float, right: float, bottom: float) -> bool:
            if mask is not None:
                return _within((left, top, right, bottom), mask, SLACK)
            inside = min(left, top) >= -SLACK and right <= width + SLACK and bottom <= height + SLACK
            return inside and right > left and bottom > top

        self.total += 1
        self.drawn += mask is not None
        self.normalized += max(box) <= 1 and min(c, d) > 0
        self.right += fits(a, b, a + c, b + d)
        self.fits[self.NAMES[0]] += fits(a, b, c, d)
        self.fits[self.NAMES[1]] += fits(a - c / 2, b - d / 2, a + c / 2, b + d / 2)

    def named(self) -> str | None:
        """Return the kind of problem where nearly all boxes have another form, and many cannot have the right one."""
        if self.total and self.normalized > self.total / 2:
            return self.NORMALIZED
        wrong = self.total - self.right
        few = wrong <= self.total / 2 if self.drawn else wrong < max(3, self.total / 10)
        return None if few else next((name for name in self.NAMES if self.fits[name] >= 0.95 * self.total), None)


# --- boxes and masks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A box that is not around its mask."""

    where: str
    """The annotation, as messages name it."""
    box: list[float]
    """The box as it is in the file."""
    mask: Rectangle
    width: int
    """The image's."""
    height: int

    @property
    def drawn(self) -> Rectangle:
        x, y, width, height = self.box
        return x, y, x + width, y + height


@dataclass
class MaskFits:
    """Boxes compared with their masks: those in doubt, and among them those that are certainly wrong."""

    compared: int = 0
    doubtful: list[Pair] = field(default_factory=list)
    misplaced: list[Pair] = field(default_factory=list)
    """Boxes beside their masks."""
    loose: list[Pair] = field(default_factory=list)
    """Boxes around a small part of their mask, or far around it, as around the hidden part of an object."""

    def add(self, pair: Pair, used: bool = True) -> None:
        """Compare a box with its mask inside of the image, where both are.

        Args:
            used: MMDetection does not skip it, as it does where the box is thinner than a pixel.
        """
        image = (0, 0, pair.width, pair.height)
        box, mask = _common(pair.drawn, image), _common(pair.mask, image)
        if not _area(box) or not _area(mask):
            return
        self.compared += 1
        iou = _iou(box, mask)
        if iou >= SURE_IOU or _within(box, mask, NEAR):
            return
        self.doubtful.append(pair)
        if used and iou < MIN_IOU:
            inside = _area(_common(box, mask)) >= INSIDE * min(_area(box), _area(mask))
            (self.loose if inside else self.misplaced).append(pair)

    def wrong(self) -> tuple[list[Pair], str]:
        """Return the boxes for which a file is refused, and the mistake that explains them, if one does.

        None where they are few, and none that are only loose: people draw them so, and only a mistake that explains
        nearly all of them tells that nobody did.
        """
        most = MAX_SHARE * self.compared
        if len(self.doubtful) > most and (explanation := self._explanation()):
            return self.doubtful, explanation
        return (self.misplaced if len(self.misplaced) > most else []), ""

    def _explanation(self) -> str:
        pairs = self.doubtful
        if len(pairs) < MIN_CALLS:
            return ""
        shares = {text: _share(pairs, put) for text, put in FORMS.items()}
        best = max(shares, key=lambda text: shares[text])
        if shares[best] >= EXPLAINED:
            return best
        return next((text for text, put in (_shift(pairs), *_scales(pairs)) if _share(pairs, put) >= EXPLAINED), "")


Put = Callable[[Pair], tuple[Rectangle, Rectangle]]
"""What makes of a pair the two rectangles that are one if a certain mistake was made."""


def _share(pairs: list[Pair], put: Put) -> float:
    """Return the fraction of the pairs that a mistake explains."""
    return sum(_iou(*put(pair)) >= EXPLAINED_IOU for pair in pairs) / len(pairs)


def _form(corners: Callable[[float, float, float, float, int, int], Rectangle]) -> Put:
    """Return a function that reads a box's four numbers in another form, given the image's width and height."""

    def put(pair: Pair) -> tuple[Rectangle, Rectangle]:
        a, b, c, d = pair.box
        return corners(a, b, c, d, pair.width, pair.height), pair.mask

    return put


FORMS: dict[str, Put] = {
    "the boxes are [x1, y1, x2, y2]: convert them": _form(lambda a, b, c, d, w, h: (a, b, c, d)),
    "the boxes are [center x, center y, width, height]: convert them": _form(
        lambda a, b, c, d, w, h: (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
    ),
    "the boxes are [x, y, height, width]: convert them": _form(lambda a, b, c, d, w, h: (a, b, a + d, b + c)),
    "the boxes have half the width and height of their masks: double both": _form(
        lambda a, b, c, d, w, h: (a, b, a + 2 * c, b + 2 * d)
    ),
    "the boxes are [y, x, height, width], or the masks have x and y exchanged: convert them": _form(
        lambda a, b, c, d, w, h: (b, a, b + d, a + c)
    ),
    "the boxes are [y1, x1, y2, x2]: convert them": _form(lambda a, b, c, d, w, h: (b, a, d, c)),
    "the boxes are normalized to 0..1: multiply by the image's width and height": _form(
        lambda a, b, c, d, w, h: (a * w, b * h, (a + c) * w, (b + d) * h)
    ),
    "the masks begin at their box's corner: add its x and y": _form(lambda a, b, c, d, w, h: (0, 0, c, d)),
    "the run lengths go along the rows, and COCO's go down the columns: encode the masks again": _form(
        lambda a, b, c, d, w, h: (b * w / h, 0, (b + d) * w / h, h)
    ),
    "the boxes are mirrored, or the masks: mirror both as the images are": _form(
        lambda a, b, c, d, w, h: (w - a - c, b, w - a, b + d)
    ),
    "the boxes are upside down, or the masks: turn both as the images are": _form(
        lambda a, b, c, d, w, h: (a, h - b - d, a + c, h - b)
    ),
}
"""Mistakes in the form of boxes or masks, and what to do about each."""


def _scales(pairs: list[Pair]) -> list[tuple[str, Put]]:
    """Return the mistakes of boxes or masks that are for images of another size: one factor, or one size, for all.

    Where all images have one size, both explain the same; a factor that differs across and down is a size.
    """
    ratios = [_ratio(pair) for pair in pairs]
    factor = _medians(ratios)
    both = list(zip(ratios, pairs, strict=True))
    boxes = _medians([(across * pair.width, down * pair.height) for (across, down), pair in both])
    masks = _medians([(pair.width / across, pair.height / down) for (across, down), pair in both])
    mistakes: list[tuple[str, Put]] = [
        (
            f"the boxes are {factor[0]:.2g} times their masks, as when images are resized after annotation: scale "
            "boxes and masks as the images were",
            lambda pair: (pair.drawn, _scaled(pair.mask, factor[0], factor[1])),
        ),
        (
            f"the boxes are for images of about {boxes[0]:.0f}×{boxes[1]:.0f}: scale them to the images' sizes",
            lambda pair: (pair.drawn, _scaled(pair.mask, boxes[0] / pair.width, boxes[1] / pair.height)),
        ),
        (
            f"the masks are for images of about {masks[0]:.0f}×{masks[1]:.0f}: scale them to the images' sizes",
            lambda pair: (_scaled(pair.drawn, masks[0] / pair.width, masks[1] / pair.height), pair.mask),
        ),
    ]
    return mistakes if math.isclose(*factor, rel_tol=0.02) else mistakes[1:]


def _shift(pairs: list[Pair]) -> tuple[str, Put]:
    """Return the mistake of boxes that are beside their masks, all by the same number of pixels."""
    across, down = _medians([(one.drawn[0] - one.mask[0], one.drawn[1] - one.mask[1]) for one in pairs])
    way = f"{abs(across):.0f} px {'right' if across > 0 else 'left'} of and {abs(down):.0f} px " + (
        "below" if down > 0 else "above"
    )

    def put(pair: Pair) -> tuple[Rectangle, Rectangle]:
        left, top, right, bottom = pair.mask
        return pair.drawn, (left + across, top + down, right + across, bottom + down)

    return f"the boxes are {way} their masks: shift the boxes or the masks", put


def _ratio(pair: Pair) -> tuple[float, float]:
    """Return how many times further from the image's corner the middle of a box is than the middle of its mask."""
    across, down = (
        max(pair.drawn[axis] + pair.drawn[axis + 2], 1e-3) / max(pair.mask[axis] + pair.mask[axis + 2], 1e-3)
        for axis in (0, 1)
    )
    return across, down


def _medians(values: list[tuple[float, float]]) -> tuple[float, float]:
    return median(one for one, _ in values), median(other for _, other in values)


def _scaled(rectangle: Rectangle, across: float, down: float) -> Rectangle:
    left, top, right, bottom = rectangle
    return left * across, top * down, right * across, bottom * down
