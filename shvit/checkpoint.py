"""Reading checkpoints of any layout, safely and strictly, and writing them.

Layouts of one SHViT's parameters: the reference's names, timm's names (also ours), and ours deployed. A file holds
them flat, or below `model`, `model_ema`, `state_dict` or `state_dict_ema`, with or without a prefix such as
`module.` or `backbone.`. Only tensors are ever read: no pickled code runs.
"""

import argparse
import logging
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .errors import InputError, first_line, some
from .files import atomic_write, check_file, is_folder, open_file
from .shvit import rename_reference_keys

__all__ = ["Checkpoint", "load_checkpoint", "read_checkpoint", "read_metadata", "write_checkpoint"]

_logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]
Layout = Literal["reference", "timm", "deployed"]
MAX_BYTES = 4 << 30  # S4 with optimizer and EMA is 0.3 GB
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
STEM = "patch_embed.0."  # every layout's first parameter begins with it


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A model's parameters as read from a file, under our names."""

    path: Path
    state_dict: StateDict = field(repr=False)
    layout: Layout
    """Names of the parameters: the reference's, timm's (which are ours), or a deployed model's."""
    dropped: tuple[str, ...] = ()  # parameters beside the backbone of a larger model, which are not ours

    @property
    def deployed(self) -> bool:
        return self.layout == "deployed"

    @property
    def distilled(self) -> bool:
        return any(key.startswith("head_dist.") for key in self.state_dict)

    @property
    def stem(self) -> str:
        """Name of the first convolution's weight."""
        return f"{STEM}weight" if self.deployed else f"{STEM}c.weight"

    @property
    def classifier(self) -> str:
        """Name of the classifier's weight, which may be missing."""
        return "head.weight" if self.deployed else "head.l.weight"

    @property
    def in_chans(self) -> int:
        return self.state_dict[self.stem].shape[1]

    @property
    def num_classes(self) -> int:
        """Rows of the classifier; 0 where the file has none."""
        return self.state_dict[self.classifier].shape[0] if self.classifier in self.state_dict else 0


def read_checkpoint(path: str | os.PathLike, ema: bool = False) -> Checkpoint:
    """Read a SHViT checkpoint of any layout.

    Args:
        path: a `.safetensors` file, or one written by `torch.save`.
        ema: take the EMA weights (`model_ema` or `state_dict_ema`), and refuse a file without them.

    Raises:
        InputError: the file cannot be read, is too large, would run code, holds NaN, or is not a SHViT checkpoint.
    """
    path = Path(path)
    state_dict = read_state_dict(path, ema)
    prefix = min((key[: -len(rest)] for key in state_dict for rest in _stem_names(key)), key=len, default=None)
    if prefix is None:
        content = some(list(state_dict)) or "nothing"
        raise InputError(f"{path}: not a SHViT checkpoint (no parameter named {STEM}…); it holds {content}")
    own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    renamed = rename_reference_keys(own)
    if len(renamed) < len(own):
        twice = [name for key in own for name in rename_reference_keys({key: None}) if name != key and name in own]
        raise InputError(f"{path}: holds {some(twice)} twice, under the reference's name and ours")
    dropped = tuple(key for key in state_dict if not key.startswith(prefix))
    if dropped and not prefix.endswith("backbone."):
        raise InputError(f"{path}: parameters outside the model's prefix {prefix!r}: {some(dropped)}")
    layout: Layout = "deployed" if f"{STEM}weight" in own else "timm" if renamed.keys() == own.keys() else "reference"
    checkpoint = Checkpoint(path, renamed, layout, dropped)
    for name, axes in ((checkpoint.stem, 4), (checkpoint.classifier, 2)):
        shape = renamed[name].shape if name in renamed else None
        if shape is not None and (len(shape) != axes or 0 in shape):
            raise InputError(f"{path}: {name} has shape {tuple(shape)}, and should have {axes} axes, none of length 0")
    return checkpoint


def _stem_names(key: str) -> list[str]:
    """Return the part of `key` from the stem's first weight on, if it is that weight."""
    return [name for name in (f"{STEM}c.weight", f"{STEM}weight") if key == name or key.endswith("." + name)]


EMA_KEYS = ("state_dict_ema", "model_ema")


def holds_ema(path: str | os.PathLike) -> bool:
    """Return whether a file has EMA weights beside the weights; raises as `read_checkpoint`."""
    content = _read_content(Path(path))
    return any(isinstance(content.get(key), Mapping) for key in EMA_KEYS)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return the texts that a file holds beside its tensors, by name; raises as `read_checkpoint`."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    _check_size(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return dict(file.metadata() or {})
        except (SafetensorError, OSError, ValueError) as error:
            raise _not_safetensors(path, error) from error
    if not is_archive(path):
        return {}  # a pickle from before PyTorch 1.6, older than any file of ours
    content = _read_torch(path, mmap=True)
    texts = content.items() if isinstance(content, Mapping) else ()
    return {name: text for name, text in texts if isinstance(name, str) and isinstance(text, str)}


def _read_content(path: Path) -> Mapping[Any, Any]:
    _check_size(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}; a checkpoint is a dict of tensors")
    return content


def read_state_dict(path: Path, ema: bool = False) -> StateDict:
    """Return the tensors of any model's checkpoint, under the file's names; raises as `read_checkpoint`."""
    content = _read_content(path)
    wanted = EMA_KEYS if ema else ("state_dict", "model")
    nested = next((content[key] for key in wanted if isinstance(content.get(key), Mapping)), None)
    if ema and nested is None:
        raise InputError(f"{path}: has no EMA weights (model_ema or state_dict_ema); leave out the EMA option")
    state_dict = dict(content if nested is None else nested)
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path}: entry {name!r} is of type {type(tensor).__name__}; a checkpoint is a dict of tensors"
            )
        _check_plain(path, name, tensor)
    size = sum(tensor.nbytes for tensor in state_dict.values())  # many may be views of one memory
    if size > MAX_BYTES:
        raise InputError(f"{path}: tensors of {size / 1e9:.1f} GB are more than the {MAX_BYTES / 1e9:.1f} GB allowed")
    for name, tensor in state_dict.items():
        if tensor.dtype in FLOATS and tensor.numel():
            _check_values(path, name, tensor)
    return state_dict


MAX_VALUE = 1e15
"""Largest weight, bias or norm statistic: products of larger ones leave float32, and outputs are NaN."""


def _check_values(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise InputError for values that only a run has that diverged."""
    low, high = map(float, torch.aminmax(tensor))
    if not math.isfinite(low) or not math.isfinite(high):
        raise InputError(f"{path}: parameter {name} holds NaN or infinite values; the training run diverged")
    if name.endswith("running_var") and low < 0:
        raise InputError(f"{path}: parameter {name} holds negative variances ({low:.3g}), whose roots are NaN; take an "
                         "earlier checkpoint")  # fmt: skip
    learned = name.endswith(("weight", "bias", "running_mean", "running_var"))
    if learned and max(-low, high) > MAX_VALUE:
        raise InputError(f"{path}: parameter {name} holds values up to {max(-low, high):.1e}, and its products do not "
                         f"fit float32; at most {MAX_VALUE:.0e} are read, take an earlier checkpoint")  # fmt: skip


def _check_plain(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise unless a tensor is dense, stores a value for each element, and has a data type that models use."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in FLOATS + INTEGERS:
        parts = ("nested" if tensor.is_nested else tensor.layout, tensor.dtype, tensor.device)
        form = ", ".join(str(part).removeprefix("torch.") for part in parts)
        raise InputError(f"{path}: parameter {name} is {form}; save it as a dense tensor of floats or integers")
    stored = tensor.untyped_storage().nbytes()
    if tensor.nbytes > stored:
        raise InputError(
            f"{path}: parameter {name} is of {tensor.nbytes} bytes, of which {stored} are stored; save a copy"
        )


def _check_size(path: Path) -> None:
    if is_folder(path):
        raise InputError(f"{path}: is a folder; name the checkpoint file in it")
    check_file(path)
    size = path.stat().st_size
    if path.suffix != ".safetensors" and is_archive(path):
        size = max(size, _unpacked_bytes(path))
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size / 1e9:.1f} GB is more than the {MAX_BYTES / 1e9:.1f} GB allowed")


def is_archive(path: Path) -> bool:
    """Return whether a file begins as torch.save's zip archives do."""
    with open_file(path) as file:
        return file.read(2) == b"PK"


def _unpacked_bytes(path: Path) -> int:
    """Return the size of an archive's content; one that cannot be measured is refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # BadZipFile, and others for damaged names and sizes
        raise InputError(f"{path}: not a readable checkpoint ({_reason(error)}); fetch it again") from error


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _not_safetensors(path, error) from error


def _not_safetensors(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a readable safetensors file ({_reason(error)}); fetch it again")


def _read_torch(path: Path, mmap: bool = False) -> Any:
    try:
        with path.open("rb") as file:
            if not file.read(2).startswith((b"PK", b"\x80")):  # a zip archive; before PyTorch 1.6 a pickle
                raise ValueError("it was not written by torch.save")
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about formats that are refused, in one line
            # Namespace: the reference's arguments
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: refused, because {_why_unsafe(path)}; nothing of it was run") from error
    except Exception as error:  # torch.load raises many types for a damaged file
        reason = _reason(error) if isinstance(error, RuntimeError | ValueError | OSError) else "it is damaged"
        raise InputError(f"{path}: not a readable checkpoint ({reason}); fetch it again") from error


def _why_unsafe(path: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a pickle too broken, or too old, to be looked into
        return "it is not a checkpoint of tensors alone"
    return f"its pickle calls for {some(sorted(names))}" if names else "it is not a checkpoint of tensors alone"


def _reason(error: Exception) -> str:
    """Return the first sentence of an error's message."""
    return first_line(error).partition(". ")[0]


# --- loading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike, ema: bool = False, reset_head: bool = False
) -> tuple[str, ...]:
    """Load a SHViT checkpoint of any layout into `model`, strictly.

    Args:
        model: a SHViT; deployed, if the checkpoint is.
        path: a file of any layout, `.safetensors`, `.pth` or `.pt`.
        ema: load the EMA weights that the file holds beside the others.
        reset_head: leave the model's head(s) as they are: for other classes, or for a backbone without a head.

    Returns:
        The names of the model's parameters that were left as they are (empty without `reset_head`).

    Raises:
        InputError: as `read_checkpoint`, or model and file differ: what is missing, left over or of another shape
            is named.
    """
    checkpoint = read_checkpoint(path, ema)
    _check_layout(checkpoint, model, reset_head)
    return load_strictly(model, checkpoint.state_dict, checkpoint.path, reset_head)


def _check_layout(checkpoint: Checkpoint, model: nn.Module, reset_head: bool) -> None:
    if checkpoint.deployed != getattr(model, "deployed", False):
        forms = {True: "a deployed model", False: "a model that is not deployed"}
        raise InputError(
            f"{checkpoint.path}: holds {forms[checkpoint.deployed]}, and it was to go into "
            f"{forms[not checkpoint.deployed]}; load before you deploy, or deploy before you load"
        )
    if checkpoint.distilled and not reset_head and not getattr(model, "distilled", False):
        fused = " and fuse() it" if checkpoint.deployed else ""
        raise InputError(
            f"{checkpoint.path}: has a distillation head; create the model with distilled=True{fused}, or have its "
            "head re-initialized"
        )


def adapt_input(state_dict: StateDict, weight: str, in_chans: int | None, path: Path) -> StateDict:
    """Return a state dict whose first convolution takes other channels, by timm's rule for pretrained weights.

    Args:
        weight: name of the convolution's weight; a state dict without it is returned as it is.
        in_chans: channels of the images; None for those of the weights.
        path: the file, for messages.

    Raises:
        InputError: the weights are for other channels than 3 and other than those.
    """
    from timm.models import adapt_input_conv

    own = state_dict[weight].shape[1] if weight in state_dict and state_dict[weight].ndim == 4 else in_chans
    if in_chans is None or own == in_chans:
        return state_dict
    if own != 3:
        raise InputError(f"{path}: its first layer takes {own} channels, and {in_chans} are asked for; only "
                         "those for 3 can be adapted")  # fmt: skip
    return {**state_dict, weight: adapt_input_conv(in_chans, state_dict[weight])}


def load_strictly(
    model: nn.Module,
    state_dict: StateDict,
    path: Path,
    reset_head: bool = False,
    heads: tuple[str, ...] = ("head.", "head_dist."),
) -> tuple[str, ...]:
    """Load parameters as `load_state_dict(strict=True)` does, with an error that names what differs.

    With `reset_head`, parameters whose names begin with one of `heads` stay as the model has them; their names are
    returned.
    """
    target = model.state_dict()
    initialized = tuple(name for name in target if reset_head and name.startswith(heads))
    source = {name: tensor for name, tensor in state_dict.items() if not (reset_head and name.startswith(heads))}
    missing = [name for name in target if name not in source and name not in initialized]
    left_over = [name for name in source if name not in target]
    reshaped = [name for name in source if name in target and source[name].shape != target[name].shape]
    only_head = all(name.startswith(heads) for name in (*missing, *left_over, *reshaped))
    if missing and only_head and not any(name.startswith(heads) for name in source):
        raise InputError(
            f"{path}: has no head, and the model has one; create the model with num_classes=0, or have its head "
            "re-initialized"
        )
    rows = [name for name in reshaped if target[name].ndim > 1 and source[name].shape[1:] == target[name].shape[1:]]
    if rows and only_head and not missing and not left_over:
        name = rows[0]
        raise InputError(
            f"{path}: made for {source[name].shape[0]} classes, and the model has {target[name].shape[0]}; "
            "give it that many classes, or have its head re-initialized"
        )
    problems = []
    if missing:
        problems.append(f"missing {some(missing)}")
    if left_over:
        problems.append(f"left over {some(left_over)}")
    if reshaped:
        shapes = [
            f"{name} is {tuple(source[name].shape)} and should be {tuple(target[name].shape)}" for name in reshaped
        ]
        problems.append(some(shapes))
    integers = [name for name in source if source[name].dtype in INTEGERS]
    rounded = [name for name in integers if name in target and target[name].is_floating_point()]
    if rounded:
        problems.append(f"integers where floats should be: {some(rounded)}")
    if problems:
        raise InputError(f"{path}: does not fit {type(model).__name__} of this variant: {'; '.join(problems)}")
    model.load_state_dict({**{name: target[name] for name in initialized}, **source}, strict=True)
    if initialized:
        _logger.warning(f"{path}: the head is not loaded; {some(initialized)} stay as they were initialized")
    return initialized


# --- writing ----------------------------------------------------------------------------------------------------------


def write_checkpoint(
    state_dict: Mapping[str, torch.Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as `.safetensors`, or as a `torch.save` file `{"model": …}` for `.pth` and `.pt`.

    The file is written atomically.

    Args:
        metadata: texts by name, which `read_metadata` reads: into the metadata of a `.safetensors` file, beside
            `model` in others.

    Raises:
        InputError: another suffix, or the folder cannot be written to.
    """
    from safetensors.torch import save

    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    with atomic_write(path) as partial:
        if path.suffix == ".safetensors":
            partial.write_bytes(save(tensors, metadata={"format": "pt", **(metadata or {})}))
        elif path.suffix in (".pth", ".pt"):
            torch.save({"model": tensors, **(metadata or {})}, partial)
        else:
            raise InputError(f"{path}: unknown suffix {path.suffix!r}; choose .safetensors, .pth or .pt")
