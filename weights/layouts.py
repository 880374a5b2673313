"""Identification of a checkpoint file, and conversion of its parameters to another layout."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from shvit.checkpoint import Layout, StateDict, read_checkpoint
from shvit.create import create_model
from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.shvit import VARIANTS, to_reference

__all__ = ["Identity", "convert", "identify", "variant_of"]


@dataclass(frozen=True)
class Identity:
    """Content of a checkpoint file, which loads strictly into the model described here."""

    layout: Layout
    model: str
    num_classes: int
    distilled: bool
    params: int
    beside: int
    """Tensors of a larger model (a detector's neck and heads) beside the SHViT."""


def variant_of(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """Return the variant with these parameters' widths and depths (our names, deployed or not); None if none has."""
    embed_dim, depth = [], []
    for stage in range(3):
        blocks = f"stages.{stage}.blocks."
        depth.append(len({name.split(".")[3] for name in state_dict if name.startswith(blocks)}))
        convs = (state_dict.get(f"{blocks}0.conv.{name}") for name in ("m.c.weight", "weight"))
        embed_dim.append(next((conv.shape[0] for conv in convs if conv is not None and conv.ndim), 0))
    for name, variant in VARIANTS.items():
        if (variant.embed_dim, variant.depth) == (tuple(embed_dim), tuple(depth)):
            return name
    return None


def identify(path: str | os.PathLike, ema: bool = False) -> Identity:
    """Read a SHViT checkpoint and load it strictly; raise InputError also where it fits none of the variants."""
    return _open(path, ema)[0]


def convert(path: str | os.PathLike, to: Layout, ema: bool = False) -> tuple[Identity, StateDict]:
    """Return what `path` holds, and its parameters in the layout `to`; timm and reference differ in names alone.

    Raises:
        InputError: as `identify`, or the file is deployed, which cannot be undone.
    """
    identity, state_dict, model = _open(path, ema)
    if identity.layout == "deployed" and to != "deployed":
        raise InputError(f"{path}: holds a deployed model, whose norms are folded for good; convert the checkpoint "
                         "it was made from")  # fmt: skip
    if to == "reference":
        return identity, to_reference(state_dict)
    if to == "deployed" and (identity.layout != "deployed" or identity.distilled):
        return identity, deploy(model).state_dict()
    return identity, state_dict


def _open(path: str | os.PathLike, ema: bool) -> tuple[Identity, StateDict, nn.Module]:
    """Return what the file holds, its parameters under our names, and the model with them."""
    checkpoint = read_checkpoint(path, ema)
    state_dict = checkpoint.state_dict
    name = variant_of(state_dict)
    if name is None:
        raise InputError(f"{path}: holds a SHViT of other widths or depths than {', '.join(VARIANTS)}; "
                         "train and convert one of these")  # fmt: skip
    model = create_model(name, path, ema=ema)
    params = sum(parameter.numel() for parameter in model.parameters())
    about = (checkpoint.layout, name, checkpoint.num_classes, checkpoint.distilled, params, len(checkpoint.dropped))
    return Identity(*about), state_dict, model
