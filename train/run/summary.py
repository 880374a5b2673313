"""What is printed before training: a table of the images of each class, and how classes are balanced."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Column, Table

from shvit.create import checkpoint_chans

from ..data.datasets import Splits, duplicates_note
from ..data.image_folders import Files, TarFiles
from ..data.pixels.preprocessing import Preprocessing
from ..labels.balance import balanced_class_weight, class_probabilities
from ..labels.images import LabeledImages
from ..labels.statistics import LabelStatistics
from ..recipe import Recipe

MAX_ROWS = 30  # classes; of more, those with the fewest training images are shown


def print_splits(splits: Splits, console: Console) -> None:
    """Print the number of images of each class in training and validation, and notes on them; reads files."""
    if isinstance(splits.train.source, Files | TarFiles):  # others would have to decode each image
        console.print(_values_table(splits) if _holds_values(splits) else _table(splits))
    for note in (*splits.notes, duplicates_note(splits)):
        if note:
            console.print(f"  {note}")


def _holds_values(splits: Splits) -> bool:
    return isinstance(splits.train, LabeledImages) and splits.train.task == "regression"


def _values_table(splits: Splits) -> Table:
    """Return a table of a regression's values."""
    names = ("images", "lowest", "mean", "highest")
    table = Table(splits.train.classes[0], *(Column(name, justify="right") for name in names))
    for name, part in (("training", splits.train), ("validation", splits.val)):
        assert isinstance(part, LabeledImages)
        values = part.chosen
        table.add_row(name, str(len(values)), *(f"{each:.4g}" for each in (values.min(), values.mean(), values.max())))
    return table


def _table(splits: Splits) -> Table:
    rows = list(zip(splits.train.classes, splits.train.class_counts, splits.val.class_counts, strict=True))
    table = Table("class", Column("training", justify="right"), Column("validation", justify="right"))
    shown = sorted(rows, key=lambda row: row[1])[:MAX_ROWS] if len(rows) > MAX_ROWS else rows
    for name, trained, validated in shown:
        table.add_row(name, str(trained), str(validated))
    if len(shown) < len(rows):
        table.add_row(f"and {len(rows) - len(shown)} classes with more", "", "")
    table.add_section()
    table.add_row(f"{len(rows)} classes", str(len(splits.train)), str(len(splits.val)))
    return table


def describe_channels(recipe: Recipe, preprocessing: Preprocessing) -> Iterator[str]:
    """Yield a line on each thing that is done because of the images' channels, or of how they are fitted."""
    pixels, augment, chans = preprocessing.pixels, recipe.augment, recipe.in_chans
    loaded = (
        checkpoint_chans(recipe.model, recipe.checkpoint) if recipe.checkpoint else 3 if recipe.pretrained else None
    )
    if loaded not in (None, chans):
        yield f"the first layer's weights, of {loaded} channels, are adapted to {chans} as timm does"
    left_out = [f"--augment.auto-augment {augment.auto_augment}"] if augment.auto_augment else []
    if augment.color_jitter and not augment.auto_augment:
        left_out = [f"--augment.color-jitter {augment.color_jitter:g}"]
    if left_out and not pixels.uses_pillow:
        yield f"{left_out[0]} is for RGB images and is left out for {pixels}; crops, flips, erasing and mixing are used"
    if recipe.data.crop_mode in ("squash", "border") and min(augment.scale) < 1:
        yield (
            f"--data.crop-mode {recipe.data.crop_mode} is for evaluation; training takes crops of "
            f"{100 * min(augment.scale):.3g} % of an image and more; for whole ones, --augment.scale 1 1"
        )


def describe_targets(recipe: Recipe, classes: Sequence[str]) -> str:
    """Return what the targets of a recipe's images are, as what follows "images"."""
    if recipe.task == "regression":
        return f"with the value {classes[0]}"
    return f"with {len(classes)} labels" if recipe.task == "multi_label" else f"of {len(classes)} classes"


def describe_balance(recipe: Recipe, classes: Sequence[str], statistics: LabelStatistics) -> str:
    """Return a line on the rarest and the most frequent class, and on what class weights or sampling make of them."""
    counts = statistics.class_counts
    assert counts is not None
    ends = [counts.index(find(counts)) for find in (min, max)]
    if recipe.class_weight is not None:
        n = statistics.images
        ratios = [max(n - count, 0) / count for count in counts]  # of the images without a label to those with it
        weights = ratios if recipe.task == "multi_label" else balanced_class_weight(counts).tolist()
        rarest, most = (f"{weights[i]:.3g} for {classes[i]} ({counts[i]} training images)" for i in ends)
        return f"class weights of the loss: {rarest} to {most}"
    drawn = class_probabilities(counts, recipe.balanced_sampling)
    rarest, most = (
        f"{100 * drawn[i]:.3g} % {classes[i]} ({counts[i]} training images, {100 * counts[i] / sum(counts):.3g} %)"
        for i in ends
    )
    return f"balanced sampling of strength {recipe.balanced_sampling:g}: an epoch is about {rarest} and {most}"
