"""The models that timm knows, and figures of ours.

Counts come from the model itself, published figures from the manifest.
"""

import fnmatch
from dataclasses import dataclass

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import shvit.shvit  # noqa: F401  (registers ours: the program's own import of shvit does not)
from shvit.errors import InputError

from .manifest import read_manifest

__all__ = ["Model", "describe", "names"]


@dataclass(frozen=True)
class Model:
    """One line of `shvit list`. Only SHViT models are built and counted; figures of others are None."""

    model: str
    params: int | None
    gmacs: float | None
    """1e9 multiply-adds for one image of `img_size`."""
    img_size: tuple[int, int] | None
    """Height and width in pixels."""
    top1: float | None
    """Published, in percent."""
    top1_source: str | None
    weights: dict[str, str]
    """Name and address of each published checkpoint."""


def names(pattern: str) -> list[str]:
    """Return the models whose names match a glob; raise InputError where none does."""
    models = fnmatch.filter(timm.list_models(), pattern)
    if not models:
        raise InputError(f"no model matches {pattern!r}; try 'shvit*', 'resnet*', or '*' for all that timm knows")
    return models


def describe(name: str) -> Model:
    """Return what `shvit list` shows for one model."""
    cfg = timm.get_pretrained_cfg(name)
    size = (cfg.input_size[1], cfg.input_size[2]) if cfg else None
    if size is None or name not in timm.list_models(module="shvit"):
        return Model(name, None, None, size, None, None, _timm_weights(name))
    published = [entry for entry in read_manifest() if (entry.model, entry.task) == (name, "classification")]
    first, weights = published[0], {entry.name: entry.url for entry in published}
    return Model(name, *count(name, size), size, first.accuracy["top1"], first.accuracy_source, weights)


def _timm_weights(name: str) -> dict[str, str]:
    """Return name and address of the weights that timm loads for a model by default; empty where it has none."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        return {}
    address = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else str(cfg.url)
    return {f"{name}.{cfg.tag}" if cfg.tag else name: address}


def count(name: str, img_size: tuple[int, int]) -> tuple[int, float]:
    """Return (parameters, GMACs at `img_size`) of a model, counted on the meta device: nothing is computed."""
    with torch.device("meta"):
        model, image = timm.create_model(name).eval(), torch.empty(1, 3, *img_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    params = sum(parameter.numel() for parameter in model.parameters())
    return params, counter.get_total_flops() / 2e9  # two operations are one multiply-add
