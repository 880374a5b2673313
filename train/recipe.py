"""The fields of a recipe. The recipes themselves are values, in recipes.py.

The defaults are the paper's run of S1 on ImageNet-1k (facts from the paper and the reference code, main.py and
engine.py of ysj9909/SHViT); every other recipe states where it differs.
"""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from shvit.errors import InputError
from shvit.files import read_bytes
from shvit.img_size import ImgSize
from shvit.weights.run_info import Task

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_BYTES = 16 << 20  # of a recipe file; a run's has the names of its classes too
PathOrNone = TypeVar("PathOrNone", Path, Path | None)
STRICT = {
    "extra": "forbid",
    "strict": True,
    "allow_inf_nan": False,
}  # how pydantic reads these dataclasses from a file: no unknown key, no cast


@dataclass(frozen=True)
class Data:
    """The training and validation images."""

    __pydantic_config__ = STRICT

    root: Path | None = None
    """A folder with train/ and val/ (or validation/) of class folders, or .tar files of these names.
    Of a folder or a tar with class folders alone, about a tenth is kept for validation.
    By default elpv-dataset's solar cells."""
    group: str | None = None
    """Regular expression for class folders without a split, matched with image names below the class folder.
    Images with the same first group, such as frames of one video, stay on one side of the split.
    By default, copies by Roboflow (.rf.) and those with _aug or -aug in their name stay with their original."""
    labels: Path | None = None
    """A table of labels in place of class folders, .csv, .tsv or .parquet.
    It has a column of file names, and one of labels or one for each class.
    `root` is then the folder that the file names are relative to, by default the table's own.
    Where it has a column of splits (train, val), that is the split."""
    val_labels: Path | None = None
    """A second table, of the validation images."""
    file_column: str | None = None
    """Column of file names in the tables; by default one with a usual name, such as file, path or image_id."""
    label_columns: tuple[str, ...] = ()
    """Column of labels in the tables, or a column for each class.
    By default one with a usual name, such as label or class, or else all other columns if they hold numbers."""
    label_separator: str | None = None
    """Separator of several labels in one cell; by default | or ; or a comma, whichever occurs."""
    changed: Literal["refuse", "continue"] = "refuse"
    """Whether a run resumes when its images have changed since it started.
    With 'continue', finished epochs stay finished, and the schedule is fitted to the present images."""
    name: str = ""
    """A dataset that `timm.data.create_dataset` knows by a prefix, with `root` as its folder or cache.
    Prefixes are wds/ (WebDataset shards), hfds/ and hfids/ (Hugging Face, whole and streamed), torch/ and tfds/."""
    train_split: str = "train"
    """Training split of a named dataset.
    For shards also a pattern and the number of images, such as 'train-{0000..0099}.tar|128000'."""
    val_split: str = "validation"
    """Validation split of a named dataset."""
    num_classes: int | None = None
    """Number of classes of a named dataset that has no class names."""
    workers: int = 1
    """Data loader workers of each training process; 0 loads images in that process itself."""
    max_corrupt: int = 10
    """Damaged images that each training process reports and skips before the run stops."""
    crop_mode: Literal["center", "squash", "border"] | None = None
    """How an image is fitted into the size, in evaluation and in every exported file; None: the model's own way.
    Center crops the middle, squash distorts the whole image, border pads it. With squash, training crops are distorted
    alike; with squash or border and `--augment.scale 1 1`, training images are whole, fitted as in evaluation."""
    crop_pct: float | None = None
    """Fraction of the resized image that is kept; None: all with squash or border, otherwise the model's own."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, where white is 1. None: the model's own for images of 1 or 3 channels of 8 bits; for
    others it is computed from training images."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, as the mean."""


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images, in timm's terms."""

    __pydantic_config__ = STRICT

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest fraction of the area that a random crop keeps."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of that crop, width over height; relative to that of the image size."""
    interpolation: str = "bicubic"
    """Interpolation of the crop's resize: bicubic, bilinear, or random (either)."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's policy: rand-…, augmix-…, 3a, original; None for none."""
    color_jitter: float = 0.4
    """Strength of random brightness, contrast and saturation; not applied together with `auto_augment`."""
    random_erasing: float = 0.25
    """Probability that a rectangle is replaced by noise, drawn for each pixel."""
    mixup: float = 0.8
    """α of mixup; 0 for none."""
    cutmix: float = 1.0
    """α of cutmix; 0 for none."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Probability of cutmix rather than mixup, where both are on."""
    smoothing: float = 0.1
    """Label smoothing, of classification alone."""
    repeats: int = 3
    """Repeated augmentation: an epoch is drawn from this many copies of each image; 1 for none.
    The epoch keeps its length, so each image is seen in about one of `repeats` epochs."""


@dataclass(frozen=True)
class Optim:
    """The optimizer and its learning rate schedule, updated at every step."""

    __pydantic_config__ = STRICT

    opt: str = "adamw"
    """A name that `timm.optim.create_optimizer_v2` knows."""
    lr: float = 1e-3
    """Peak learning rate for a global batch of 512; scaled linearly by the batch: 4e-3 at 2048."""
    eps: float = 1e-8
    """AdamW's ε."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    weight_decay: float = 0.025
    """Weight decay; norms and biases have none."""
    schedule: str = "cosine"
    """A name that `timm.scheduler.create_scheduler_v2` knows."""
    warmup_epochs: int = 5
    """Epochs of linear warm-up, part of the run's epochs."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    min_lr: float = 1e-5
    """Final learning rate of the schedule."""
    clip_grad: float | None = 0.02
    """Gradient clipping value; for agc, the largest ratio of a gradient's norm to its weight's. None for none."""
    clip_mode: Literal["agc", "norm", "value"] = "agc"
    """Gradient clipping mode: adaptive (each unit by its weights' norm), by total norm, or by value."""
    layer_decay: float | None = None
    """Layer-wise learning rate decay: the factor from each group of layers to the one below it. None for none."""


@dataclass(frozen=True)
class Distill:
    """Distillation as in DeiT, without a token: one head learns the labels, a second head learns from the teacher."""

    __pydantic_config__ = STRICT

    teacher: str | None = None
    """Teacher model, a name that timm knows; None for no distillation.
    It gets the student's images in its own normalization, resized where it accepts only its own size."""
    checkpoint: Path | None = None
    """The teacher's weights; timm's pretrained ones by default."""
    kind: Literal["hard", "soft"] = "hard"
    """Learn the teacher's top class (hard) or its distribution (soft)."""
    alpha: float = 0.5
    """Weight of the teacher's loss; the labels' is 1 - α."""
    tau: float = 1.0
    """Temperature of soft distillation."""


@dataclass(frozen=True)
class Compute:
    """Device, precision and memory. A run can resume with another device, device batch size or number of processes."""

    __pydantic_config__ = STRICT

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto takes CUDA where there is a GPU."""
    device_batch_size: int = 256
    """Maximum number of images that one process computes at once.
    A larger batch takes several gradient accumulation steps."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the forward pass, by autocast; weights and EMA weights are always float32."""
    channels_last: bool = True
    """Use the channels-last memory format for images and weights."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at the start, faster steps."""
    grad_checkpointing: bool = False
    """Gradient checkpointing: recompute activations in the backward pass to save memory."""
    sync_bn: bool = False
    """Synchronize BatchNorm statistics over all processes, else each has its own (CUDA only)."""
    deterministic: bool = False
    """Use PyTorch's deterministic algorithms, which are slower; on the CPU runs repeat bit for bit without them."""


@dataclass(frozen=True)
class Save:
    """Saving, logging and evaluation intervals."""

    __pydantic_config__ = STRICT

    every_minutes: float = 5.0
    """Minutes between two saves of the training state (last.pt).
    It is also saved after each evaluation and at SIGTERM and SIGINT."""
    keep: int = 2
    """Number of training states to keep: last.pt, last-1.pt, …; a run resumes from the newest readable one."""
    log_steps: int = 10
    """Steps between two log entries: TensorBoard scalars, and a check that the loss is finite."""
    eval_epochs: int = 1
    """Epochs between two evaluations."""


@dataclass(frozen=True)
class Recipe:
    """A training recipe."""

    __pydantic_config__ = STRICT

    model: str = "shvit_s1"
    """Model to train, a name that timm knows."""
    task: Task = "classification"
    """What labels are: one class, any number of labels (multi_label), or a number (regression).
    The last two need --data.labels."""
    img_size: ImgSize = field(default=ImgSize(224, 224))
    """Image size in pixels: one number for a square, or HEIGHTxWIDTH."""
    in_chans: int = 3
    """Image channels, 1 to 16: 3 for RGB, 1 for gray, others for multi-band TIFF and .npy files.
    The first layer of pretrained weights is adapted to them as timm does."""
    first_img_size: ImgSize | None = None
    """Progressive resizing: image size in the first epochs.
    At equal intervals the side that grows most grows by 32 px, and the other in proportion."""
    epochs: int = 300
    """Number of passes over the training images."""
    batch_size: int = 2048
    """Images in an optimizer step, over all processes and gradient accumulation steps."""
    drop_path: float = 0.0
    """Stochastic depth rate; the reference uses none."""
    checkpoint: Path | None = None
    """Initial weights, in any layout; a head for other classes is re-initialized."""
    pretrained: bool = False
    """Start from timm's published weights, unless a checkpoint is given."""
    freeze_bn: bool = False
    """Freeze BatchNorm's running statistics."""
    ema_decay: float = 0.99996
    """Decay of the EMA weights, applied at each step."""
    ema_warmup: bool = True
    """Let the EMA decay rise from 0, so that short runs have useful EMA weights too (the reference does not)."""
    multi_label_loss: Literal["bce", "asl"] = "bce"
    """Loss of multi-label classification: binary cross-entropy (bce), or timm's asymmetric loss (asl; γ 4 and 1, clip
    0.05), by which the many labels that an image does not have weigh less."""
    class_weight: Literal["balanced"] | None = None
    """Class weights in the loss of the labels: None, or 'balanced' as in scikit-learn.
    A class then has the weight n / (classes · its images), whose mean over the n training images is 1.
    In multi-label classification the images with a label weigh as much as those without it.
    The validation loss and the loss of a teacher have no weights."""
    balanced_sampling: float = 0.0
    """Strength of class-balanced sampling: 0 for none, 1 to draw every class equally often.
    A class is drawn in proportion to (its images)^(1 - strength), with replacement. An epoch keeps its length."""
    seed: int = 0
    """Random seed of weights, order and augmentation."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    distill: Distill = field(default_factory=Distill)
    compute: Compute = field(default_factory=Compute)
    save: Save = field(default_factory=Save)

    def __post_init__(self) -> None:
        for name in ("img_size", "first_img_size"):
            if (size := getattr(self, name)) is not None:
                object.__setattr__(self, name, ImgSize.of(size, f"--{name.replace('_', '-')}"))

    def at_home(self) -> "Recipe":
        """Return the recipe with a leading ~ in its paths expanded; shells expand it only at the start of a word."""
        paths = {name: at_home(getattr(self.data, name)) for name in ("root", "labels", "val_labels")}
        data = replace(self.data, **paths)
        distill = replace(self.distill, checkpoint=at_home(self.distill.checkpoint))
        return replace(self, checkpoint=at_home(self.checkpoint), data=data, distill=distill)

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: `optim.lr` per 512 images of a batch."""
        return self.optim.lr * self.batch_size / 512

    def img_size_at(self, epoch: int) -> ImgSize:
        """Return the size of the training images in an epoch, counted from 0."""
        if self.first_img_size is None:
            return self.img_size
        sizes = [*_sizes_between(self.first_img_size, self.img_size), self.img_size]
        return sizes[min(epoch * len(sizes) // self.epochs, len(sizes) - 1)]

    @property
    def mixes(self) -> bool:
        """True if mixup or cutmix is on, so that labels are soft."""
        return self.augment.mixup > 0 or self.augment.cutmix > 0

    @property
    def balances(self) -> bool:
        """True if class weights or balanced sampling need the number of images of each class."""
        return self.class_weight is not None or self.balanced_sampling > 0

    @property
    def pairs(self) -> int:
        """Divisor of the batch size on the device: timm mixes images in pairs."""
        return 2 if self.mixes else 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested values, as YAML and JSON hold them; bytes of paths that are not UTF-8 are escaped."""
        plain = asdict(self)
        for name in ("img_size", "first_img_size"):
            size = plain[name]
            plain[name] = size and (size.height if size.is_square else str(size))
        return json.loads(json.dumps(plain, default=lambda path: str(path).encode(errors="backslashreplace").decode()))


def _sizes_between(first: ImgSize, last: ImgSize) -> list[ImgSize]:
    """Return the sizes from the first up to the last, without it: each side grows by whole multiples of 32 px."""
    growth = [b - a for a, b in zip(first, last, strict=True)]
    longest = max(growth)
    return [
        ImgSize(*(side + 32 * round(grown * part / longest / 32) for side, part in zip(first, growth, strict=True)))
        for grown in range(0, longest, 32)
    ]


def at_home(path: PathOrNone) -> PathOrNone:
    """Return the path with a leading ~ expanded; unchanged if there is no such user."""
    try:
        return path and path.expanduser()
    except RuntimeError:
        return path


MAY_CHANGE = (
    "data.root",
    "data.labels",
    "data.val_labels",
    "data.workers",
    "data.max_corrupt",
    "data.changed",
    "compute.device",
    "compute.device_batch_size",
    "save.",
)
"""Fields (or the beginnings of their names) that do not change what a run computes: it can resume with other values."""


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a YAML file: the fields themselves, or the `recipe` of a run folder's recipe.yaml.

    Fields that are left out have the defaults of `Recipe`. Values are read by their fields' types: see typed_yaml.py.

    Raises:
        InputError: the file cannot be read, has an unknown field, one twice, or a value of another type.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from .typed_yaml import AmbiguousYAML, load_typed

    try:
        content = load_typed(read_bytes(path, MAX_BYTES), Recipe, str(path), below="recipe")
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not a readable recipe ({' '.join(str(error).split())[:300]})") from error
    except AmbiguousYAML as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a recipe is a mapping of fields, such as `epochs: 30`; "
                         "`shvit train s1 --help` lists them")  # fmt: skip
    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error.errors()[0])}") from error


def _first_problem(error: "ErrorDetails") -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        import difflib

        if name in _field_names(Recipe) and len(error["loc"]) == 1:
            part, _, field_name = name.rpartition(".")
            return f"{name!r} is not a top-level field; write {field_name} below {part}, as {part}: {{{field_name}: …}}"

        close = difflib.get_close_matches(name, _field_names(Recipe), n=1)
        return f"unknown field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    found = repr(error["input"])
    found = found if len(found) <= 80 else f"{found[:80]}…"
    message = error["msg"].removeprefix("Value error, ")
    return f"{name} is {found}; {message[0].lower()}{message[1:]}"


def _field_names(kind: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of a recipe's fields."""
    names = []
    for entry in fields(kind):
        names.append(prefix + entry.name)
        if is_dataclass(entry.type):
            names += _field_names(entry.type, f"{prefix}{entry.name}.")
    return names


def differences(
    first: dict[str, Any], second: dict[str, Any], prefix: str = "", defaults: dict[str, Any] | None = None
) -> list[str]:
    """List the fields in which two recipes' `as_dict` differ in what they compute, as dotted names with both values.

    A field that one of them lacks, as it was written before there was such a field, has its default there.
    """
    found = []
    defaults = Recipe().as_dict() if defaults is None else defaults
    for name in sorted(first.keys() | second.keys()):
        a, b = (recipe.get(name, defaults.get(name)) for recipe in (first, second))
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.", defaults.get(name) or {})
        elif a != b and not f"{prefix}{name}".startswith(MAY_CHANGE):
            found.append(f"{prefix}{name} ({a} and {b})")
    return found
