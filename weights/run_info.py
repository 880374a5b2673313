"""Metadata of trained weights (model, classes, size, normalization), stored with them."""

import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from shvit.documents import load_json, load_yaml, parse_json, to_json
from shvit.errors import InputError
from shvit.files import is_file
from shvit.img_size import ImgSize

__all__ = ["RUN_KEY", "TASKS", "RunInfo", "Task", "is_name", "read_run_info", "same_name"]

Task = Literal["classification", "multi_label", "regression"]
"""What a model's outputs are: logits of which one class is true, logits of labels of which any number is, or a value
in the unit of its labels."""
TASKS: tuple[Task, ...] = get_args(Task)
BEST_FIGURES: Mapping[Task, str] = {"classification": "top1", "multi_label": "map", "regression": "r2"}
"""The figure of a run's log by which its best weights are chosen; with `ema_` before it for the EMA weights."""

RUN_KEY = "shvit.run"
"""The entry of a checkpoint's metadata (a top-level key of a `torch.save` file) that holds it, as JSON."""
FORMAT = 1
MAX_BYTES = 32 << 20
MAX_CLASSES = 1_000_000
MAX_NAME = 500  # characters
MAX_DATA_VALUES = 10_000  # of the data's identity, nested ones included
CROP_MODES = ("center", "squash", "border")
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "pixel_type")
"""The fields of a run's preprocessing, as it keeps them in recipe.yaml."""
PIXEL_TYPES = ("uint8", "uint16", "float32")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
RUN_FILES = re.compile(r"last(-\d+)?\.pt|best(_ema)?\.safetensors")
"""The files of a run folder whose recipe.yaml speaks for them."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""The files of timm's layout on the hub whose config.json speaks for them."""


@dataclass(frozen=True)
class RunInfo:
    """Metadata of trained weights.

    Raises:
        InputError: a value that no run has; class names that are empty, repeated, or have control characters.
    """

    model: str
    """Name of a model in timm."""
    classes: tuple[str, ...]
    """Names, by class index; empty where they are not known. Of a regression, the name of its value."""
    img_size: ImgSize
    """Size of the images that accuracy was measured at."""
    mean: tuple[float, ...] | None = None
    """One value for each channel; None: timm's for the model, as for the four fields below."""
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    pixel_type: Any = "uint8"
    """Type of the values in the image files, by whose largest value integers are divided: uint8, uint16 or float32."""
    task: Task = "classification"
    thresholds: tuple[float, ...] = ()
    """Of multi-label classification: the probability of each label from which it is predicted, chosen on validation
    images; empty where none were chosen."""
    data: Mapping[str, Any] | None = None
    """The identity of the images that it was trained on, and how they were split: plain values, as recipe.yaml has
    them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", ImgSize.of(self.img_size, "img_size"))
        if problem := self._problem():
            raise InputError(problem)

    def _problem(self) -> str | None:
        if not is_name(self.model) or ":" in self.model:  # a prefix would have something else opened
            return f"model is {str(self.model)[:80]!r}; it must be a name that timm knows"
        if not isinstance(self.classes, tuple) or len(self.classes) > MAX_CLASSES:
            return f"classes must be at most {MAX_CLASSES:,} names"
        wrong = next((name for name in self.classes if not is_name(name)), None)
        if wrong is not None:
            return (
                f"class name {str(wrong)[:80]!r} cannot be used; names have 1 to {MAX_NAME} characters, none of them a "
                "control character"
            )
        if len(set(map(same_name, self.classes))) < len(self.classes):
            return "a class name is given twice, if only with its accents written in two ways; each needs its own"
        constants = (self.mean, self.std)
        if any(each is not None and not _are_constants(each) for each in constants) or (
            self.std is not None and min(self.std) <= 0
        ):
            return f"mean {str(self.mean)[:80]} and std {str(self.std)[:80]} must be a number for each channel"
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            return f"interpolation is {str(self.interpolation)[:80]!r}; it must be one of {', '.join(INTERPOLATIONS)}"
        if self.crop_mode is not None and self.crop_mode not in CROP_MODES:
            return f"crop_mode is {str(self.crop_mode)[:80]!r}; it must be one of {', '.join(CROP_MODES)}"
        if self.crop_pct is not None and not (_is_number(self.crop_pct) and 0.05 <= self.crop_pct <= 2):
            return f"crop_pct is {str(self.crop_pct)[:80]}; it must be 0.05 to 2"
        if self.pixel_type not in PIXEL_TYPES:
            return f"pixel_type is {str(self.pixel_type)[:80]!r}; it must be one of {', '.join(PIXEL_TYPES)}"
        if problem := self._task_problem():
            return problem
        if self.data is not None and (not isinstance(self.data, Mapping) or _values(self.data) > MAX_DATA_VALUES):
            return "data must be a mapping of few plain values"
        return None

    def _task_problem(self) -> str | None:
        if self.task not in TASKS:
            return f"task is {str(self.task)[:80]!r}; it must be one of {', '.join(TASKS)}"
        if self.task == "regression" and len(self.classes) != 1:
            return f"a regression has {len(self.classes)} classes; it must have one, the name of its value"
        if not isinstance(self.thresholds, tuple) or not all(_is_number(t) and 0 <= t <= 1 for t in self.thresholds):
            return f"thresholds are {str(self.thresholds)[:80]}; they must be probabilities"
        if len(self.thresholds) not in (0, len(self.classes)):
            return f"{len(self.thresholds)} thresholds for {len(self.classes)} labels; each needs one"
        if self.thresholds and self.task != "multi_label":
            return f"thresholds are given, and {self.task} has none"
        return None

    @property
    def metadata(self) -> dict[str, str]:
        """Entry for a checkpoint's metadata."""
        return {RUN_KEY: to_json({"format": FORMAT, **asdict(self)})}


def read_run_info(path: str | os.PathLike) -> RunInfo | None:
    """Return what is known about a checkpoint's weights; None where nothing is.

    It is looked for in the file itself; then, for the files of a run folder, in the recipe.yaml beside it; then, for
    timm's layout on the hub, in the config.json beside it.

    Raises:
        InputError: the checkpoint cannot be read, or what it says of its run is not usable.
    """
    from shvit.checkpoint import read_metadata

    path = Path(path)
    text = read_metadata(path).get(RUN_KEY)
    if text is not None:
        return _from_json(text, path)
    recipe, config = path.with_name("recipe.yaml"), path.with_name("config.json")
    if RUN_FILES.fullmatch(path.name) and is_file(recipe):
        return read_recipe_file(recipe)
    if path.name in HUB_FILES and is_file(config):
        return _from_hub(config)
    return None


def read_recipe_file(path: Path) -> RunInfo | None:
    """Return what a run folder's recipe.yaml says; None where it is not a run's. Raise InputError if unusable."""
    try:
        content = load_yaml(path, MAX_BYTES)
    except InputError as error:
        raise InputError(f"{error}; repair it, or move the checkpoint away from it") from error
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        return None
    recipe, data = content["recipe"], content.get("data")
    options = recipe.get("data")
    if isinstance(data, dict) and isinstance(options, dict) and options.get("group") is not None:
        data = {**data, "group": options["group"]}  # by which the images were split
    known = {"model": recipe.get("model"), "img_size": recipe.get("img_size"), "data": data}
    known["task"] = recipe.get("task", "classification")
    if isinstance(stored := content.get("preprocessing"), dict):
        known |= {name: stored[name] for name in PREPROCESSING if name in stored}
    return _checked({**known, "classes": content.get("classes", [])}, path)


def _from_json(text: str, path: Path) -> RunInfo:
    where = f"{path}: what it says of its run ({RUN_KEY})"
    if len(text) > MAX_BYTES:
        raise InputError(f"{where} has {len(text) / 1e6:.0f} MB, more than the {MAX_BYTES / 1e6:.0f} allowed")
    try:
        content = parse_json(text, where)
    except InputError as error:
        raise InputError(f"{error}; take the file from its source again") from error
    if not isinstance(content, dict):
        raise InputError(f"{where} is not a JSON object; take the file from its source again")
    version = content.pop("format", None)
    if version != FORMAT:
        raise InputError(f"{where} has format {str(version)[:20]}, and this version reads {FORMAT}; update shvit")
    return _checked(content, path)


def _from_hub(path: Path) -> RunInfo | None:
    """Return what timm's config.json says; None for another library's."""
    try:
        content = load_json(path, MAX_BYTES)
    except InputError as error:
        raise InputError(f"{error}; repair it, or move the checkpoint away from it") from error
    cfg = content.get("pretrained_cfg") if isinstance(content, dict) else None
    if not isinstance(cfg, dict) or not isinstance(content.get("architecture"), str):
        return None
    size, labels = cfg.get("input_size"), content.get("label_names", cfg.get("label_names"))
    constants = {name: cfg.get(name) for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    sides = size[1:] if isinstance(size, list) and len(size) == 3 else None
    return _checked({"model": content["architecture"], "img_size": sides, "classes": labels or [], **constants}, path)


def _checked(content: dict[str, Any], path: Path) -> RunInfo:
    known = [field.name for field in fields(RunInfo)]
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items() if name in known
    }
    try:
        return RunInfo(**values)
    except TypeError as error:
        missing = [name for name in ("model", "classes", "img_size") if name not in content]
        raise InputError(f"{path}: what it says of its run has no {', '.join(missing)}") from error
    except InputError as error:
        raise InputError(f"{path}: what it says of its run is not usable: {error}") from error


def is_name(value: object) -> bool:
    """Return whether a value is text that can be printed and written anywhere: without control characters."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= MAX_NAME
        and not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in value)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_constants(values: object) -> bool:
    return isinstance(values, tuple) and len(values) in range(1, 17) and all(map(_is_number, values))


def _values(value: object, limit: int = MAX_DATA_VALUES, depth: int = 4) -> int:
    """Return how many plain values something nested has; more than `limit` where it has others, or is too deep."""
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) < 10_000):
        return 1
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else None
    if children is None or isinstance(value, str) or depth == 0:
        return limit + 1
    if isinstance(value, Mapping) and not all(isinstance(key, str) for key in value):
        return limit + 1
    total = 1
    for child in children:
        total += _values(child, limit, depth - 1)
        if total > limit:
            break
    return total


def same_name(name: str) -> str:
    """Return the form in which spellings of a name are equal: macOS writes accents in file names apart."""
    return unicodedata.normalize("NFC", name)
