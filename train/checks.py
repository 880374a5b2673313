"""Checks of a recipe's fields: their ranges, and those that another field makes useless."""

import math
from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from pathlib import Path

from shvit.create import check_model_name
from shvit.errors import InputError, refuse
from shvit.files import is_there
from shvit.weights.manifest import read_manifest

from .data.eval_loader import max_workers
from .data.pixels.formats import MAX_CHANS
from .data.streams import is_stream
from .recipe import Data, Distill, Recipe

RANGES = (  # a field, the lowest and the highest value
    ("in_chans", 1, MAX_CHANS),
    ("epochs", 1, 1e6),
    ("batch_size", 1, 1e6),
    ("drop_path", 0, 0.99),
    ("ema_decay", 0, 1),
    ("balanced_sampling", 0, 1),
    ("seed", 0, 2**31),
    ("data.workers", 0, max_workers()),
    ("data.max_corrupt", 0, 1e9),
    ("data.num_classes", 1, 1e6),
    ("data.crop_pct", 0.05, 2),
    ("augment.hflip", 0, 1),
    ("augment.vflip", 0, 1),
    ("augment.color_jitter", 0, 1),
    ("augment.random_erasing", 0, 1),
    ("augment.mixup", 0, 100),
    ("augment.cutmix", 0, 100),
    ("augment.mixup_prob", 0, 1),
    ("augment.mixup_switch_prob", 0, 1),
    ("augment.smoothing", 0, 0.99),
    ("augment.repeats", 1, 100),
    ("optim.lr", 1e-12, 1e30),
    ("optim.eps", 1e-30, 1),
    ("optim.weight_decay", 0, 1e3),
    ("optim.warmup_epochs", 0, 1e6),
    ("optim.warmup_lr", 0, 1e30),
    ("optim.min_lr", 0, 1e30),
    ("optim.clip_grad", 1e-12, 1e30),
    ("optim.layer_decay", 1e-3, 1),
    ("distill.alpha", 0, 1),
    ("distill.tau", 1e-3, 1e3),
    ("compute.device_batch_size", 1, 1e6),
    ("save.every_minutes", 0, 1e6),
    ("save.keep", 1, 1000),
    ("save.log_steps", 1, 1e6),
    ("save.eval_epochs", 1, 1e6),
)
PAIRS = (  # a field of two ends, the lowest and the highest value
    ("augment.scale", 1e-4, 1),
    ("augment.ratio", 1e-2, 1e2),
)


def check_fields(recipe: Recipe) -> None:
    """Check all that needs no device, images or weights.

    Raises:
        InputError: a name is not known, a field is out of range, or a given one would be ignored.
    """
    check_model_name(recipe.model)
    if recipe.distill.teacher is not None:
        check_model_name(recipe.distill.teacher, "teacher")
    for name, lowest, highest in RANGES:
        value = attrgetter(name)(recipe)
        if value is not None and not lowest <= value <= highest:
            raise InputError(f"--{name.replace('_', '-')} {value} is out of range; choose {lowest:g} to {highest:g}")
    for name, lowest, highest in PAIRS:
        low, high = attrgetter(name)(recipe)
        if not lowest <= low <= high <= highest:
            raise InputError(f"--{name} {low} {high} is out of range; choose {lowest:g} to {highest:g} for both, the "
                             "lower one first")  # fmt: skip
    if not all(0 <= beta < 1 for beta in recipe.optim.betas):
        raise InputError(f"--optim.betas {' '.join(map(str, recipe.optim.betas))}: choose from 0 to below 1")
    first = recipe.first_img_size or recipe.img_size
    if first.height > recipe.img_size.height or first.width > recipe.img_size.width:
        raise InputError(f"--first-img-size {first} must be at most --img-size {recipe.img_size} in height and width")
    _check_channels(recipe)
    _refuse_ignored(recipe)
    _refuse_balance(recipe)
    _refuse_published(
        recipe.checkpoint, "--checkpoint", f", or start from timm's: --model {recipe.model} --pretrained True"
    )
    _refuse_published(recipe.distill.checkpoint, "--distill.checkpoint")


def _check_channels(recipe: Recipe) -> None:
    """Check what depends on the number of channels: constants for each, named datasets, and a teacher of RGB."""
    chans, mean, std = recipe.in_chans, recipe.data.mean, recipe.data.std
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != chans or not all(map(math.isfinite, values))):
            raise InputError(f"--data.{name} has {len(values)} values; give one for each of {chans} channels")
    if std is not None and min(std) <= 0:
        raise InputError(f"--data.std {' '.join(map(str, std))}: must be above 0")
    if chans not in (1, 3) and recipe.data.name:
        raise InputError(
            f"--in-chans {chans}: {recipe.data.name} has images in RGB; give a folder of TIFF or .npy files"
        )
    if chans != 3 and recipe.distill.teacher:
        raise InputError(f"--in-chans {chans}: a teacher takes images in RGB; leave out --distill.teacher")


def _refuse_ignored(recipe: Recipe) -> None:
    """Refuse fields that have no effect without another one, which is not given."""
    data, distill = Data(), Distill()
    if recipe.data.labels is None:
        tables = ["val_labels", "file_column", "label_columns", "label_separator"]
        refuse("there is no --data.labels", **_changed(recipe.data, data, "data", tables))
        if recipe.task != "classification":
            raise InputError(f"--task {recipe.task} needs labels that folders do not tell; give --data.labels, a table "
                             "(CSV or Parquet) of files and labels")  # fmt: skip
    else:
        refuse("labels are a table's, --data.labels", **_changed(recipe.data, data, "data", ["name"]))
    if recipe.task != "multi_label":
        refuse(f"the task is {recipe.task}", multi_label_loss=_unless(recipe.multi_label_loss, "bce"),
               **_changed(recipe.data, data, "data", ["label_separator"]))  # fmt: skip
    if recipe.task != "classification":
        refuse(f"a teacher knows classes, and the task is {recipe.task}", **{"distill.teacher": recipe.distill.teacher})
    if not recipe.distill.teacher:
        others = [each.name for each in fields(distill) if each.name != "teacher"]
        refuse("there is no --distill.teacher", **_changed(recipe.distill, distill, "distill", others))
    if not recipe.data.name:
        named = ["train_split", "val_split", "num_classes"]
        refuse("there is no --data.name", **_changed(recipe.data, data, "data", named))
    else:
        refuse("a named dataset has its own splits", **_changed(recipe.data, data, "data", ["group"]))


def _refuse_balance(recipe: Recipe) -> None:
    """Refuse class weights together with balanced sampling, and either of them for a stream."""
    given = {"class_weight": recipe.class_weight, "balanced_sampling": recipe.balanced_sampling or None}
    if recipe.task == "multi_label":
        refuse("an image has any number of labels; --class-weight balances these", balanced_sampling=given.pop(
            "balanced_sampling"))  # fmt: skip
    if recipe.task == "regression":
        refuse("a regression has no classes", **given)
    if is_stream(recipe.data):
        refuse(f"a stream ({recipe.data.name}) does not tell the number of images of each class", **given)
    if recipe.class_weight and recipe.balanced_sampling:
        raise InputError("--class-weight and --balanced-sampling both make up for rare classes, which would count "
                         "twice; give one of them")  # fmt: skip


def _unless(value: str, default: str) -> str | None:
    """Return an option's value; None for its default."""
    return None if value == default else value


def _changed(part: Data | Distill, default: Data | Distill, prefix: str, names: Sequence[str]) -> dict[str, str]:
    """Return the fields whose values are not the defaults, as text."""
    values = {f"{prefix}.{name}": (getattr(part, name), getattr(default, name)) for name in names}
    return {name: repr(value) for name, (value, standard) in values.items() if value != standard}


def _refuse_published(checkpoint: Path | None, option: str, other: str = "") -> None:
    """Refuse the name of published weights in place of a file: no process of many could fetch it for the others."""
    if checkpoint is None or is_there(checkpoint) or str(checkpoint) not in {each.name for each in read_manifest()}:
        return
    raise InputError(f"{option} {checkpoint}: no such file, but a name of published weights; `shvit weights pull "
                     f"{checkpoint}` downloads the file and prints its path{other}")  # fmt: skip
