"""A model from a name, and from a checkpoint: which names are accepted, and what a checkpoint determines."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import clean_state_dict
from timm.utils import reparameterize_model
from torch import nn

from . import shvit  # noqa: F401  (registers the models)
from .checkpoint import adapt_input, load_strictly, read_checkpoint, read_state_dict
from .errors import InputError

__all__ = ["check_model_name", "create_model", "has_scheme", "register_scheme"]

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".onnx")
MAX_SHOWN = 80  # characters of a name that is refused


# --- names ------------------------------------------------------------------------------------------------------------

Create = Callable[[str, Path | None], nn.Module]
"""From what follows the colon of a name, and a checkpoint, to a model in eval mode."""
_schemes: dict[str, Create] = {}


def register_scheme(scheme: str, create: Create) -> None:
    """Let `create_model` take names of the form `scheme:…`; a scheme registered before is replaced."""
    _schemes[scheme] = create


def has_scheme(name: str) -> bool:
    """Return whether a model's name has a registered scheme, as `detector:CONFIG`."""
    scheme, colon, _ = name.partition(":")
    return bool(colon) and scheme in _schemes


def check_model_name(name: str, what: str = "model") -> None:
    """Raise InputError unless timm can build a model of this name without reading a file or a network.

    Args:
        name: an architecture that timm knows, ours included, with or without the tag of published weights
            (`resnet18.a1_in1k`). Names of the Hugging Face hub (`hf-hub:ORG/NAME`) and of folders (`local-dir:…`) are
            refused: they name weights, which are given as a checkpoint.
        what: what it is the name of, for messages.
    """
    shown = repr(name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "…")
    architecture, dot, tag = name.partition(".")
    known = timm.is_model(name)
    if known and (not dot or tag in (tags := _tags(architecture))):
        return
    if name.lower().endswith(WEIGHTS):
        raise InputError(f"{shown} is a file of weights and not a model's name; give such a file as --checkpoint")
    if known:
        choice = f"choose from {', '.join(f'{architecture}.{each}' for each in tags)}, or" if tags else "give"
        raise InputError(f"unknown {what} {shown}: {architecture} has no weights of that tag; {choice} {architecture} "
                         "alone")  # fmt: skip
    if ":" in name:
        raise InputError(f"unknown {what} {shown}: names with a source are not taken; name the architecture, and give "
                         "its weights as --checkpoint FILE")  # fmt: skip
    raise InputError(f"unknown {what} {shown}; {_suggest(name, timm.list_models())}")


def _tags(architecture: str) -> list[str]:
    """Return the tags of an architecture's published weights."""
    names = timm.list_models(f"{architecture}.*", include_tags=True)
    return [name.partition(".")[2] for name in names if "." in name]


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:MAX_SHOWN], known, n=4)
    ours = [model for model in known if model.startswith("shvit")]
    return f"choose from {', '.join(sorted(close) or ours)} (`shvit list '*'` shows all)"


# --- models -----------------------------------------------------------------------------------------------------------


def create_model(
    name: str,
    checkpoint: str | os.PathLike | None = None,
    num_classes: int | None = None,
    ema: bool = False,
    reset_head: bool | None = False,
    **kwargs: Any,
) -> nn.Module:
    """Create a model by `timm.create_model`, with the channels, classes, heads and deployment of its checkpoint.

    Args:
        name: any name that timm knows, or one of a registered scheme, as `detector:CONFIG`.
        checkpoint: a file of any layout that `read_checkpoint` takes; of timm's layout for models other than SHViT.
        num_classes: classes of the model; the checkpoint's where None.
        ema, reset_head: as in `load_checkpoint`; with None the head is re-initialized where the file's classes differ.
        kwargs: passed to `timm.create_model`; with `in_chans`, the first layer of a checkpoint of 3 channels is adapted
            to them, as timm does with pretrained weights.

    Returns:
        The model in eval mode, deployed if the checkpoint is.

    Raises:
        InputError: an unknown model, or as `load_checkpoint`.
    """
    path = None if checkpoint is None else Path(checkpoint)
    if has_scheme(name):
        if ema or num_classes is not None or kwargs:
            raise InputError(f"{name} takes a checkpoint alone; leave out EMA weights, classes and other arguments")
        scheme, _, rest = name.partition(":")
        return _schemes[scheme](rest, path)
    check_model_name(name)
    if path is None:
        return timm.create_model(name, num_classes=num_classes, **kwargs).eval()
    is_shvit = name.split(".")[0] in timm.list_models(module="shvit")
    create = _create_shvit if is_shvit else _create_other
    return create(name, path, num_classes, ema, reset_head, **kwargs)


def _create_shvit(
    name: str, path: Path, num_classes: int | None, ema: bool, reset_head: bool | None, **kwargs: Any
) -> nn.Module:
    source = read_checkpoint(path, ema)
    classes = source.num_classes if num_classes is None else num_classes
    options = {"distilled": source.distilled, "in_chans": source.in_chans, **kwargs}
    model = timm.create_model(name, num_classes=classes, **options).eval()
    if source.deployed:
        reparameterize_model(model, inplace=True)  # not `deploy`, which makes two heads one
    if reset_head is None:
        reset_head = source.num_classes != classes
    state_dict = adapt_input(source.state_dict, source.stem, options["in_chans"], path)
    load_strictly(model, state_dict, source.path, reset_head or classes == 0)
    return model


def _create_other(
    name: str, path: Path, num_classes: int | None, ema: bool, reset_head: bool | None, **kwargs: Any
) -> nn.Module:
    """Create a timm model that is not a SHViT, from a checkpoint under timm's own names."""
    state_dict = clean_state_dict(read_state_dict(path, ema))
    cfg = timm.get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg else None
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier or ()))
    weight = state_dict.get(f"{heads[0]}weight") if heads else None
    if num_classes is None and weight is not None and weight.ndim:
        num_classes = weight.shape[0]
    if reset_head is None:
        reset_head = weight is not None and weight.shape[:1] != (num_classes,)
    model = timm.create_model(name, num_classes=num_classes, **kwargs).eval()
    for layer in first_layers(name):
        state_dict = adapt_input(state_dict, f"{layer}.weight", kwargs.get("in_chans"), path)
    load_strictly(model, state_dict, path, reset_head, heads)
    return model


def checkpoint_chans(name: str, checkpoint: str | os.PathLike) -> int | None:
    """Return the channels that a checkpoint's first layer takes; None if unknown. Raises as `create_model`."""
    if name.split(".")[0] in timm.list_models(module="shvit"):
        return read_checkpoint(checkpoint).in_chans
    state_dict = clean_state_dict(read_state_dict(Path(checkpoint)))
    weights = (state_dict.get(f"{layer}.weight") for layer in first_layers(name))
    return next((weight.shape[1] for weight in weights if weight is not None and weight.ndim == 4), None)


def first_layers(name: str) -> tuple[str, ...]:
    """Return the names of a model's layers that see the image's channels, as timm's configuration has them."""
    cfg = timm.get_pretrained_cfg(name)
    first = cfg.first_conv if cfg else None
    return (first,) if isinstance(first, str) else tuple(first or ())
