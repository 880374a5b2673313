"""A model's input and preprocessing: written into every artifact, and read back from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import nn

from shvit.create import create_model
from shvit.documents import parse_json, parse_model, to_json
from shvit.errors import InputError, some
from shvit.img_size import MAX_IMG_SIZE, ImgSize, ImgSizeLike
from shvit.train.data.pixels.fit import Fit, check_interpolation, create_fit
from shvit.train.data.pixels.formats import MAX_CHANS, PixelFormat, PixelType
from shvit.weights.resolve import Log, Weights, resolve_weights
from shvit.weights.run_info import RunInfo, Task

Precision = Literal["fp32", "fp16", "bf16", "int8", "w8a8"]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # timm's names of all but the size
MAX_CLASSES = 1_000_000
MAX_SIZES = 64
OUTPUTS: Mapping[Task, tuple[str, ...]] = {
    "classification": ("logits", "probabilities"),
    "multi_label": ("probabilities",),
    "regression": ("value",),
}
"""What an artifact may give for each task, besides feature maps; the first by default."""
THRESHOLD = 0.5
"""The probability from which a label is predicted where none was chosen for it."""
IMAGENET_STD = 0.225  # mean of the three channels'
MAX_RESIZED = 2 * MAX_IMG_SIZE
"""Pixels of the shorter side before the crop: 200 MB for a square image. timm's smallest crop_pct is 0.5."""


def _check_name(name: str) -> str:
    if not (0 < len(name) < 300 and name.isprintable()):
        raise ValueError("it cannot be a name")
    return name


def _check_outputs(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names or len(set(names)) < len(names):
        raise ValueError("they cannot be names of outputs, which are one or more, all different")
    return names


def _check_choice(*choices: int | str) -> AfterValidator:
    def check(value: Any) -> Any:
        if value not in choices:
            raise ValueError(f"choose from {', '.join(map(str, choices))}")
        return value

    return AfterValidator(check)


Name = Annotated[str, AfterValidator(_check_name)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Spec:
    """Input and preprocessing of one model.

    Images are resized so that both sides are at least `img_size / crop_pct` and one of them is just that,
    center-cropped to `img_size`, scaled to 0–1 and normalized as (x - mean) / std, channel order RGB; in gray levels
    first for a model of one channel. Images of other channels or types are arrays, in the order of their files; see
    `pixels`. In JSON a size is one number for a square, and [height, width] otherwise.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (of how it is read; a field that is unknown has a meaning)

    model: Name
    img_size: ImgSize
    in_chans: Annotated[int, Field(ge=1, le=MAX_CHANS)]
    num_classes: Annotated[int, Field(ge=0, le=MAX_CLASSES)]
    mean: tuple[Finite, ...]
    std: tuple[Annotated[Finite, Field(gt=0)], ...]
    interpolation: Annotated[str, _check_choice(*INTERPOLATIONS)]
    crop_pct: Annotated[float, Field(ge=0.05, le=2)]
    crop_mode: Annotated[str, _check_choice("center", "squash", "border")] = "center"
    """timm's: center, squash or border."""
    pixel_type: PixelType = "uint8"
    """Type of the values in image files, whose largest stands for 1; floats are taken as they are."""
    precision: Precision = "fp32"
    """The artifact's weight and compute precision. Core ML's int8 rounds weights alone, its w8a8 activations too."""
    uint8_input: bool = False  # the artifact takes pixels, 0–255, and normalizes them itself
    outputs: Annotated[tuple[Name, ...], AfterValidator(_check_outputs)] = ("logits",)
    """Names of the outputs, in order: logits, or probabilities, or value, or stride_16, … for feature maps."""
    other_sizes: Annotated[tuple[ImgSize, ...], Field(max_length=MAX_SIZES - 1)] = ()
    """Further sizes that it takes."""
    excluded_layers: tuple[Name, ...] = ()  # layers that an int8 artifact excludes from quantization
    task: Task = "classification"
    thresholds: Annotated[tuple[Probability, ...], Field(max_length=MAX_CLASSES)] = ()
    """Of multi-label classification: the probability of each label from which it is predicted; empty for 0.5."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", ImgSize.of(self.img_size))
        object.__setattr__(self, "other_sizes", tuple(map(ImgSize.of, self.other_sizes)))

    @property
    def sizes(self) -> tuple[ImgSize, ...]:
        """Every size that the artifact takes."""
        return (self.img_size, *self.other_sizes)

    @classmethod
    def of(
        cls, name: str, model: nn.Module, img_size: ImgSizeLike | None = None, info: RunInfo | None = None
    ) -> "Spec":
        """Return the preprocessing of a model's run, or else timm's for the model, at `img_size` pixels.

        Args:
            img_size: where None, the run's, or else the model's own.
            info: record of the run, if any.

        Raises:
            InputError: `img_size` is out of range or not the model's only one, images do not have its channels, or the
                run's task is not one of a model with its number of classes.
        """
        from timm.data import resolve_data_config

        config = {**resolve_data_config(model=model), **_of_run(info)}
        chans, *sides = config["input_size"]
        own_size = info.img_size if info else ImgSize(*sides)
        in_chans = getattr(model, "in_chans", len(info.mean) if info and info.mean else chans)
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if in_chans == 1 and len(mean) > 1:
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)  # as timm's loader does
        if not len(mean) == len(std) == in_chans:
            raise InputError(f"{name} takes {in_chans} channels, and nothing tells their mean and standard deviation; "
                             f"give a checkpoint of `shvit train --in-chans {in_chans}`")  # fmt: skip
        size = own_size if img_size is None else ImgSize.of(img_size, "--img-size")
        if max(size) / config["crop_pct"] > MAX_RESIZED:
            raise InputError(f"{name}: {size} px at crop_pct {config['crop_pct']} would resize images to more than "
                             f"{MAX_RESIZED} px; choose a smaller --img-size")  # fmt: skip
        if size != own_size and getattr(model, "pretrained_cfg", {}).get("fixed_input_size"):
            raise InputError(f"{name} takes {own_size} px only; leave out --img-size {size}")
        resizing = {key: config[key] for key in ("interpolation", "crop_pct", "crop_mode")}
        resizing["pixel_type"] = info.pixel_type if info else "uint8"
        check_interpolation(PixelFormat(in_chans, resizing["pixel_type"]), resizing["interpolation"])
        num_classes = getattr(model, "num_classes", 0)
        spec = cls(name, size, in_chans, num_classes, mean, std, **resizing)
        if info is not None and num_classes:
            spec = replace(spec, task=info.task, thresholds=info.thresholds)
        if problem := spec._task_problem():
            raise InputError(f"{name}: its run says that it is {problem}; take the checkpoint from its source again")
        return spec

    def _task_problem(self) -> str | None:
        """Return what contradicts the task, as what the model is; None where nothing does."""
        count, task = len(self.thresholds), self.task.replace("_", "-")
        if self.task == "regression" and self.num_classes != 1:
            return f"a regression with {self.num_classes} outputs, which has one"
        if count and self.task != "multi_label":
            return f"a {task} model with thresholds, which multi-label ones alone have"
        if count not in (0, self.num_classes):
            return f"a {task} model with {count} thresholds for {self.num_classes} labels"
        return None

    @property
    def output_kind(self) -> str:
        """Kind of the outputs: logits, probabilities, value or features."""
        return self.outputs[0] if self.outputs[0] in sum(OUTPUTS.values(), ()) else "features"

    @property
    def chooses_class(self) -> bool:
        """Whether one class of several is true of an image, and the outputs tell which."""
        return self.task == "classification" and self.output_kind != "features" and self.num_classes > 1

    @property
    def label_thresholds(self) -> torch.Tensor:
        """The probability from which each label is predicted, float64 (num_classes,)."""
        thresholds = self.thresholds or (THRESHOLD,) * self.num_classes
        return torch.tensor(thresholds, dtype=torch.float64)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        return (self.in_chans, *self.img_size)

    @property
    def levels(self) -> tuple[float, ...]:
        """Gray levels of a normalized channel's unit: of 255 for 8 bits. For others, whose white means little, a level
        is 1/57 of the standard deviation, as it is with ImageNet's."""
        return tuple(255 * (value if self.pixels.uses_pillow else IMAGENET_STD) for value in self.std)

    def shares_of_white(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return pixels between black, 0, and white, 1, as float64; for others than of 8 bits these are two standard
        deviations below and above the mean."""
        return pixels.double() / 255 if self.pixels.uses_pillow else self.normalize(pixels).double() / 4 + 0.5

    @property
    def pixels(self) -> PixelFormat:
        """How image files are decoded: by Pillow in RGB, or as arrays."""
        return PixelFormat(self.in_chans, self.pixel_type)

    def transform(self, normalize: bool = True) -> Fit:
        """Return timm's evaluation transform: decoded image → float32 (C, H, W), normalized; or its pixels.

        Pixels are uint8, and float32 where the files' are not of 8 bits.
        """
        options = {key: getattr(self, key) for key in PREPROCESSING}
        return create_fit(self.pixels, normalize, input_size=self.shape, **options)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return pixels (B, C, H, W) as float32, normalized as `transform` does it."""
        return self.pixels.normalize(pixels, self.mean, self.std)

    def feed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return an artifact's input for pixels (B, C, H, W): these normalized, or uint8 ones as (B, H, W, C)."""
        return pixels.permute(0, 2, 3, 1).contiguous() if self.uint8_input else self.normalize(pixels)

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str, name: str = "the artifact") -> "Spec":
        """Return the spec that `to_json` wrote; raise InputError for any other text, from a file called `name`."""
        where = f"{name}: its description of its input"
        spec = parse_model(cls, parse_json(text, where), where, "export the model again")
        longest = max(map(max, spec.sizes))
        if longest / spec.crop_pct > MAX_RESIZED:
            raise InputError(f"{where}: {longest} px at crop_pct {spec.crop_pct} would resize images to more "
                             f"than {MAX_RESIZED} px; export the model again")  # fmt: skip
        if not len(spec.mean) == len(spec.std) == spec.in_chans:
            raise InputError(f"{where}: mean {some(spec.mean)} and std {some(spec.std)} must have a number for each of "
                             f"{spec.in_chans} channels; export the model again")  # fmt: skip
        problem = spec._task_problem()
        if problem is None and spec.output_kind not in ("features", *OUTPUTS[spec.task]):
            problem = f"a {spec.task.replace('_', '-')} model that gives {spec.output_kind}"
        if problem is not None:
            raise InputError(f"{where}: it is {problem}; export the model again")
        if spec.uint8_input and not spec.pixels.uses_pillow:
            raise InputError(f"{where}: takes {spec.pixels}, which are not the pixels of an image; export the model "
                             "again")  # fmt: skip
        return spec

    def blank(self, batch_size: int = 1) -> torch.Tensor:
        """Return an input of the right shape: (batch_size, C, H, W), float32 zeros."""
        return torch.zeros(batch_size, *self.shape)


def _of_run(info: RunInfo | None) -> dict[str, Any]:
    """Return the preprocessing of a run, as far as it is known, in the terms of timm's data config."""
    return {name: value for name in PREPROCESSING if (value := getattr(info, name, None)) is not None}


def open_model(
    name: str | None,
    checkpoint: Path | None = None,
    img_size: ImgSizeLike | None = None,
    ema: bool = False,
    classifies: bool = True,
) -> tuple[nn.Module, Spec]:
    """Return a timm model in eval mode and its spec, by the arguments of `resolve_weights` and `open_weights`."""
    return open_weights(resolve_weights(name, checkpoint, ema), img_size, classifies)


def open_weights(
    weights: Weights, img_size: ImgSizeLike | None = None, classifies: bool = True, log: Log = lambda line: None
) -> tuple[nn.Module, Spec]:
    """Return a timm model in eval mode and its spec, with the preprocessing of its run where that is known.

    Args:
        weights: where they have no file, random ones (always the same) of a trained model's scale.
        img_size: input size in pixels, one number or (height, width); where None, the run's, or else the model's own.
        classifies: require a classifier.
        log: called with a line for each value that is not as would be expected.

    Raises:
        InputError: as `create_model` and `Spec.of`, or `classifies` and the model has no classifier.
    """
    name, info = weights.model, weights.info
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = create_model(name, weights.checkpoint, ema=weights.ema, **_made_for(name, info))
        except InputError as error:
            if info is None or info.model == name:
                raise
            raise InputError(f"{error}; it was trained as {info.model}, so leave out --model {name}") from error
        if weights.checkpoint is None:
            randomize_norms(model)
    spec = Spec.of(name, model, img_size, info)
    if classifies and spec.num_classes == 0:
        raise InputError(f"{weights.name or name} has no classifier; give a model with classes")
    if info is not None:
        usual = Spec.of(name, model) if spec.pixels.uses_pillow else spec  # timm has none for other images
        _log_differences(spec, usual, info, weights.name, log)
    return model, spec


def _made_for(name: str, info: RunInfo | None) -> dict[str, Any]:
    """Return the arguments of a model that takes one size only, or other channels than 3."""
    import timm

    cfg = timm.get_pretrained_cfg(name) if info and timm.is_model(name) else None
    made_for: dict[str, Any] = {"img_size": info.img_size} if info and cfg and cfg.fixed_input_size else {}
    return {**made_for, "in_chans": len(info.mean)} if info and info.mean and len(info.mean) != 3 else made_for


def _log_differences(spec: Spec, usual: Spec, info: RunInfo, source: str | None, log: Log) -> None:
    if spec.img_size != info.img_size:
        log(f"{source}: was trained for {info.img_size} px; --img-size {spec.img_size} was asked for")
    unusual = [f"{name} {getattr(spec, name)}" for name in PREPROCESSING if getattr(spec, name) != getattr(usual, name)]
    if unusual:
        log(f"{source}: {', '.join(unusual)}, as in its run; timm has other values for {spec.model}")


@torch.no_grad()
def randomize_norms(model: nn.Module) -> None:
    """Randomize every BatchNorm's weights and statistics.

    A fresh model has branches whose weights are all zero, which runtimes fold away: neither its speed nor its
    agreement with an artifact would mean anything.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
