"""How a run's images become a model's input: resolved once at its start, stored with it, and used ever after."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import timm
from timm.data import resolve_data_config

from shvit.img_size import ImgSize
from shvit.weights.run_info import RunInfo

from ...recipe import Recipe
from .fit import INTERPOLATIONS, Fit, create_fit
from .formats import PixelFormat
from .statistics import Statistics, channel_statistics, find_pixel_type

if TYPE_CHECKING:
    from ..datasets import Images

MAX_12_BITS = 4095.5 / 65535


@dataclass(frozen=True)
class Preprocessing:
    """The evaluation transform of a run, in timm's terms, and its pixels."""

    pixels: PixelFormat
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `timm.data.create_transform`."""
        names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        return {name: getattr(self, name) for name in names}

    @property
    def stored(self) -> dict[str, Any]:
        """Fields of `RunInfo`, with which a run and its weights keep this."""
        names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        return {**{name: getattr(self, name) for name in names}, "pixel_type": self.pixels.pixel_type}

    def at(self, img_size: ImgSize) -> "Preprocessing":
        """Return the same for another size."""
        return replace(self, input_size=(self.input_size[0], *img_size))

    def create_fit(self) -> Fit:
        """Create the evaluation transform, from a decoded image to the model's input."""
        return create_fit(self.pixels, **self.config)


def resolve_preprocessing(
    recipe: Recipe,
    images: "Images | None" = None,
    stored: RunInfo | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Preprocessing:
    """Return a run's preprocessing: what it stored; else the recipe's, timm's for the model, and what images tell.

    Args:
        images: the training images; None for a stream, whose images are Pillow's.
        stored: what an earlier process of the run has written.
        log: called with a line on the values that were computed.

    Raises:
        InputError: as `find_pixel_type` and `channel_statistics`.
    """
    usual = _usual(recipe)
    if stored is not None and stored.mean is not None:
        kept = {name: getattr(stored, name) for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
        return replace(usual, pixels=PixelFormat(recipe.in_chans, stored.pixel_type), **kept)
    data = recipe.data
    pixels = usual.pixels
    if images is not None and pixels.in_chans != 3:
        pixels = PixelFormat(recipe.in_chans, find_pixel_type(images, recipe.in_chans))
    if not pixels.uses_pillow:
        interpolation = usual.interpolation if usual.interpolation in INTERPOLATIONS else "bicubic"
        usual = replace(usual, pixels=pixels, interpolation=interpolation)
        if images is not None and (data.mean is None or data.std is None):
            statistics = channel_statistics(images.read_as(pixels), pixels, usual.input_size)
            usual = replace(usual, mean=statistics.mean, std=statistics.std)
            log(_describe(pixels, statistics))
    return replace(usual, mean=data.mean or usual.mean, std=data.std or usual.std)


def _usual(recipe: Recipe) -> Preprocessing:
    """Return what the recipe says, and timm's configuration of the model."""
    cfg = timm.get_pretrained_cfg(recipe.model)
    config = resolve_data_config({"input_size": (3, *recipe.img_size)}, cfg.to_dict() if cfg else {})
    mode, pct = recipe.data.crop_mode, recipe.data.crop_pct
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if recipe.in_chans == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)  # as timm's loader does
    return Preprocessing(
        pixels=PixelFormat(recipe.in_chans),
        input_size=(recipe.in_chans, *config["input_size"][1:]),
        mean=mean,
        std=std,
        interpolation=config["interpolation"],
        crop_pct=pct or (1.0 if mode in ("squash", "border") else config["crop_pct"]),  # whole images, as was asked for
        crop_mode=mode or config["crop_mode"],
    )


def _describe(pixels: PixelFormat, statistics: Statistics) -> str:
    def listed(values: tuple[float, ...]) -> str:
        return " ".join(f"{value:.4g}" for value in values)

    lowest, highest = min(statistics.lowest), max(statistics.highest)
    line = (f"{pixels}: mean {listed(statistics.mean)}, standard deviation {listed(statistics.std)}, of "
            f"{statistics.images} training images, whose values are {lowest:.4g} to {highest:.4g}")  # fmt: skip
    if pixels.pixel_type == "uint16" and highest <= MAX_12_BITS:
        line += "; no value needs more than 12 of the 16 bits, and all images must keep to that range"
    return line
