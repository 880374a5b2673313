"""What a recipe can say. Recipes themselves are values, in recipes.py.

The defaults are the paper's run of S1 on ImageNet-1k (facts from the paper and the reference code, main.py and
engine.py of ysj9909/SHViT); every other recipe says where it differs.
"""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from shvit.errors import InputError
from shvit.files import read_bytes

MAX_BYTES = 16 << 20  # of a recipe file; a run's has the names of its classes too
PathOrNone = TypeVar("PathOrNone", Path, Path | None)
STRICT = {
    "extra": "forbid",
    "strict": True,
    "allow_inf_nan": False,
}  # how pydantic reads these dataclasses from a file: no unknown key, no cast


@dataclass(frozen=True)
class Data:
    """The images."""

    __pydantic_config__ = STRICT

    root: Path | None = None
    """A folder with train/ and val/ (or validation/) of class folders, or .tar files of these names; a folder or a tar
    with class folders alone, of which about a tenth is held out. elpv-dataset's cells by default."""
    group: str | None = None
    """Where there are class folders alone: a regular expression whose first group is what images of one original or
    film have in common in their names (below the class folder); they stay on one side. By default copies by Roboflow
    (.rf.) and those with _aug or -aug in their name stay with their original."""
    changed: Literal["refuse", "continue"] = "refuse"
    """Whether a run goes on when its images are not those that it began with: finished epochs stay finished, and the
    schedule is fitted to the images that are there."""
    name: str = ""
    """A dataset that `timm.data.create_dataset` knows by a prefix: wds/ (WebDataset shards), hfds/ and hfids/ (Hugging
    Face datasets, whole and streamed), torch/, tfds/. `root` is then its folder or cache."""
    train_split: str = "train"
    """Of a dataset with a name. For shards also a pattern with their count, such as 'train-{0000..0099}.tar|128000'."""
    val_split: str = "validation"
    """Of a dataset with a name."""
    num_classes: int | None = None
    """Classes of a dataset with a name that does not tell them."""
    workers: int = 1
    """Processes that read and augment, for each process that trains; 0 to do it in that process."""
    max_corrupt: int = 10
    """Damaged images that are named and passed over before the run stops, in each process that trains."""


@dataclass(frozen=True)
class Augment:
    """What happens to a training image, in timm's terms."""

    __pydantic_config__ = STRICT

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the area that a random crop keeps."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest shape of that crop, width over height."""
    interpolation: str = "bicubic"
    """Of the crop's resize: bicubic, bilinear, random (either)."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of a top-bottom flip."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's policy: rand-…, augmix-…, 3a, original; None for none."""
    color_jitter: float = 0.4
    """Strength of random brightness, contrast and saturation; not applied beside `auto_augment`."""
    random_erasing: float = 0.25
    """Probability that a rectangle is replaced by noise of each pixel."""
    mixup: float = 0.8
    """α of mixup; 0 for none."""
    cutmix: float = 1.0
    """α of cutmix; 0 for none."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Share of cutmix where both are on."""
    smoothing: float = 0.1
    """Label smoothing."""
    repeats: int = 3
    """Repeated augmentation: copies of an image among which an epoch is drawn; 1 for none. An epoch keeps its
    length, so each image is seen in about one of `repeats` epochs."""


@dataclass(frozen=True)
class Optim:
    """The optimizer and its schedule, updated at every step."""

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
    """Of weights; norms and biases have none."""
    schedule: str = "cosine"
    """A name that `timm.scheduler.create_scheduler_v2` knows."""
    warmup_epochs: int = 5
    """Epochs of linear rise, part of the run's epochs."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    min_lr: float = 1e-5
    """Learning rate that the schedule ends at."""
    clip_grad: float | None = 0.02
    """Gradient clipping; with `agc` the largest ratio of a gradient's norm to its weight's. None for none."""
    clip_mode: Literal["agc", "norm", "value"] = "agc"
    """Adaptive (each unit by its weights' norm), by total norm, or by value."""
    layer_decay: float | None = None
    """Factor of the learning rate from each group of layers to the one below it, for fine-tuning; None for none."""


@dataclass(frozen=True)
class Distill:
    """A teacher, as in DeiT without a token: one head learns the labels, a second one the teacher."""

    __pydantic_config__ = STRICT

    teacher: str | None = None
    """A name that timm knows, or None for no distillation. It is fed the student's images in its own normalization,
    resized to its own size where it takes no other (DeiT, LeViT, Swin)."""
    checkpoint: Path | None = None
    """The teacher's weights; timm's pretrained ones by default."""
    kind: Literal["hard", "soft"] = "hard"
    """Learn the teacher's highest class, or its distribution."""
    alpha: float = 0.5
    """Weight of the teacher's loss; the labels' is 1 - α."""
    tau: float = 1.0
    """Temperature of `soft`."""


@dataclass(frozen=True)
class Compute:
    """How it is computed. A run can go on with another `device`, `device_batch_size` or number of processes."""

    __pydantic_config__ = STRICT

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is a GPU."""
    device_batch_size: int = 256
    """Most images at once in one process; a larger share of the batch is done in turns that are added up."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the forward pass by autocast; weights and their average are always float32."""
    channels_last: bool = True
    """Memory order of images and weights."""
    compile: bool = False
    """torch.compile the model: minutes at the start, faster steps."""
    grad_checkpointing: bool = False
    """Compute blocks' activations twice to keep fewer."""
    sync_bn: bool = False
    """BatchNorm statistics over all processes rather than over each one's part of the batch (CUDA alone)."""
    deterministic: bool = False
    """PyTorch's deterministic algorithms, at a price; on the CPU runs repeat bit for bit without it."""


@dataclass(frozen=True)
class Save:
    """What is kept, and how often."""

    __pydantic_config__ = STRICT

    every_minutes: float = 5.0
    """Between two states of the run (last.pt); one more after each evaluation, and at SIGTERM and SIGINT."""
    keep: int = 2
    """States kept: last.pt, and before it last-1.pt, …; the newest that can be read is gone on from."""
    log_steps: int = 10
    """Steps between two looks at the loss: TensorBoard scalars, and the check that it is finite."""
    eval_epochs: int = 1
    """Epochs between two evaluations."""


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    __pydantic_config__ = STRICT

    model: str = "shvit_s1"
    """A name that timm knows."""
    img_size: int = 224
    """Height and width in pixels."""
    first_img_size: int | None = None
    """Progressive resizing: height and width at the beginning, which grow by 32 px in equal shares of the epochs."""
    epochs: int = 300
    """Passes over the training images."""
    batch_size: int = 2048
    """Images in an optimizer step, over all processes and turns."""
    drop_path: float = 0.0
    """Stochastic depth; the reference uses none."""
    checkpoint: Path | None = None
    """Weights to begin with, in any layout; a head for other classes begins anew."""
    pretrained: bool = False
    """Begin with timm's published weights, where no checkpoint is given."""
    freeze_bn: bool = False
    """Keep BatchNorm's statistics as they are."""
    ema_decay: float = 0.99996
    """Of the averaged weights, for each step."""
    ema_warmup: bool = True
    """Let that decay rise from 0, so that short runs have a useful average too (the reference does not)."""
    seed: int = 0
    """Of weights, order and augmentation."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    distill: Distill = field(default_factory=Distill)
    compute: Compute = field(default_factory=Compute)
    save: Save = field(default_factory=Save)

    def at_home(self) -> "Recipe":
        """With the user's home in place of a leading ~, which shells replace in words alone."""
        data = replace(self.data, root=at_home(self.data.root))
        distill = replace(self.distill, checkpoint=at_home(self.distill.checkpoint))
        return replace(self, checkpoint=at_home(self.checkpoint), data=data, distill=distill)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: `optim.lr` per 512 images of a batch."""
        return self.optim.lr * self.batch_size / 512

    def img_size_at(self, epoch: int) -> int:
        """Height and width in pixels of the training images in an epoch, counted from 0."""
        if self.first_img_size is None:
            return self.img_size
        sizes = [*range(self.first_img_size, self.img_size, 32), self.img_size]
        return sizes[min(epoch * len(sizes) // self.epochs, len(sizes) - 1)]

    @property
    def mixes(self) -> bool:
        """Whether labels become soft: mixup or cutmix is on."""
        return self.augment.mixup > 0 or self.augment.cutmix > 0

    @property
    def pairs(self) -> int:
        """What the size of a batch on the device must be a multiple of: timm mixes images in pairs."""
        return 2 if self.mixes else 1

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, as YAML and JSON hold them; of paths, what is not UTF-8 is escaped."""
        plain = asdict(self)
        return json.loads(json.dumps(plain, default=lambda path: str(path).encode(errors="backslashreplace").decode()))


def at_home(path: PathOrNone) -> PathOrNone:
    """The path with the user's home in place of a leading ~; as it is where there is no such user."""
    try:
        return path and path.expanduser()
    except RuntimeError:
        return path


MAY_CHANGE = (
    "data.root",
    "data.workers",
    "data.max_corrupt",
    "data.changed",
    "compute.device",
    "compute.device_batch_size",
    "save.",
)
"""Fields (or the beginnings of their names) that do not change what a run computes: it can go on with others."""


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file: the fields themselves, or the `recipe` of a run folder's recipe.yaml.

    Fields that are left out have the defaults of `Recipe`. Values are read by their fields' types: see typed_yaml.py.

    Raises:
        InputError: the file cannot be read, has an unknown field, one twice, or a value of another type.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from .typed_yaml import Unclear, load_typed

    try:
        content = load_typed(read_bytes(path, MAX_BYTES), Recipe, str(path), below="recipe")
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not a readable recipe ({' '.join(str(error).split())[:300]})") from error
    except Unclear as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a recipe is a mapping of fields, such as `epochs: 30`; "
                         "`shvit train s1 --help` lists them")  # fmt: skip
    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error.errors()[0])}") from error


def _first_problem(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        import difflib

        if name in _field_names(Recipe) and len(error["loc"]) == 1:
            part, _, field_name = name.rpartition(".")
            return f"{name!r} is no field of its own; write {field_name} below {part}, as {part}: {{{field_name}: …}}"

        close = difflib.get_close_matches(name, _field_names(Recipe), n=1)
        return f"unknown field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
    found = repr(error["input"])
    found = found if len(found) <= 80 else f"{found[:80]}…"
    return f"{name} is {found}; {error['msg'][0].lower()}{error['msg'][1:]}"


def _field_names(kind: Any, prefix: str = "") -> list[str]:
    """The dotted names of a recipe's fields."""
    names = []
    for entry in fields(kind):
        names.append(prefix + entry.name)
        if is_dataclass(entry.type):
            names += _field_names(entry.type, f"{prefix}{entry.name}.")
    return names


def differences(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two recipes' `as_dict` differ in what they compute, as dotted names with both values."""
    found = []
    for name in sorted(first.keys() | second.keys()):
        a, b = first.get(name), second.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b and not f"{prefix}{name}".startswith(MAY_CHANGE):
            found.append(f"{prefix}{name} ({a} and {b})")
    return found
