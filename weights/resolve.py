"""Weights as a command line names them (a file, a published name, pretrained), and what is known about them."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shvit.checkpoint import read_checkpoint, write_checkpoint
from shvit.create import check_model_name, has_scheme
from shvit.documents import parse_json
from shvit.errors import InputError, first_line, refuse
from shvit.files import is_file, is_folder, is_there, read_text, sha256
from shvit.img_size import ImgSize

from .cache import cache_folder, expected_hash, obtain
from .connection import bounded_waits
from .imagenet import imagenet_names, is_imagenet
from .layouts import variant_of
from .manifest import Published, find, read_manifest
from .run_info import BEST_FIGURES, RunInfo, read_run_info

__all__ = ["Weights", "find_weights", "resolve_weights"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
RUN_WEIGHTS = {"best_ema.safetensors": "ema_", "best.safetensors": ""}
"""The weights in a run folder, with the beginning of the names of their figures in its metrics.jsonl."""
MAX_METRICS_BYTES = 256 << 20
Log = Callable[[str], None]


@dataclass(frozen=True)
class Weights:
    """A model's weights, and what is known about them."""

    model: str
    """A name that timm knows, or `detector:CONFIG`."""
    checkpoint: Path | None
    """The file; None for random weights."""
    name: str | None
    """Name as it was given: the file's path, or a published name."""
    ema: bool
    """Take the file's EMA weights."""
    info: RunInfo | None
    """Metadata of the training run; for published weights, the publisher's."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by index; empty where they are not known. ImageNet's ids become names."""
        classes = self.info.classes if self.info else ()
        return imagenet_names() if is_imagenet(classes) else classes


def resolve_weights(
    model: str | None,
    checkpoint: str | Path | None,
    ema: bool = False,
    pretrained: bool = False,
    log: Log = lambda line: None,
) -> Weights:
    """Return weights and what is known about them.

    Args:
        model: a name that timm knows; where None, the checkpoint's own.
        checkpoint: a file of any layout, or a name of `shvit weights list`, from the cache or downloaded.
        pretrained: take the model's published weights in place of a checkpoint.
        log: is called with a line about what is done that was not asked for.

    Raises:
        InputError: options that exclude each other, no such file or name, weights that cannot be fetched, or the
            model is not known.
    """
    if model is not None and not has_scheme(model):
        check_model_name(model)
    if pretrained:
        refuse("--pretrained takes the model's published weights", checkpoint=checkpoint, ema=ema)
        if model is None:
            raise InputError("--pretrained: of which model? give --model NAME, or a published name as --checkpoint")
        return _pretrained(model, log)
    if checkpoint is None:
        refuse("without a checkpoint there are no EMA weights", ema=ema)
        if model is None:
            raise InputError("which model? give --checkpoint FILE (or a name of `shvit weights list`), or --model NAME")
        return Weights(model, None, None, ema, None)
    path, entry = find_weights(checkpoint, log)
    if model is not None and has_scheme(model):
        return Weights(model, path, str(checkpoint), ema, None)
    info = read_run_info(path)
    if info is None:
        entry = entry or _known(path)
        info = _published_info(entry) if entry else None
    own = info.model if info else _variant(path, ema, model)
    if model is None:
        log(_summary(str(checkpoint), own, info))
    elif info is not None and model.partition(".")[0] != info.model.partition(".")[0]:
        log(f"{checkpoint}: was trained as {info.model}, and is loaded as --model {model}")
    return Weights(model or own, path, str(checkpoint), ema, info)


def find_weights(checkpoint: str | Path, log: Log = lambda line: None) -> tuple[Path, Published | None]:
    """Return a file, or that of a published name, from the cache or downloaded; and its entry in the manifest.

    Of a run folder it is the file with the best validation accuracy.

    Raises:
        InputError: neither, or it cannot be downloaded.
    """
    path = Path(checkpoint)
    if is_folder(path):
        best = _best_of_run(path)
        log(f"{path}: its best weights are {best.name}")
        return best, None
    if is_there(path):
        return path, None
    names = [entry.name for entry in read_manifest()]
    if str(checkpoint) not in names:
        if path.suffix in SUFFIXES or len(path.parts) > 1:
            hint = f"; {path.stem} is the name of published weights" if path.stem in names else ""
            raise InputError(f"{path}: no such file{hint}")
        close = difflib.get_close_matches(path.name, names, n=3)
        raise InputError(f"{checkpoint}: no such file, and no published checkpoint of that name; choose from "
                         f"{', '.join(close or names)} (`shvit weights list`)")  # fmt: skip
    entry = find(str(checkpoint))
    log(f"{entry.name}: from the cache, or {entry.url}")
    return obtain(entry, entry.url, lambda done, total: None).path, entry


def _best_of_run(folder: Path) -> Path:
    """Return the best weights in a run folder: the EMA weights where they are at least as accurate, as a run says."""
    files = [folder / name for name in RUN_WEIGHTS if is_file(folder / name)]
    if not files:
        raise InputError(f"{folder}: is a folder without {' or '.join(RUN_WEIGHTS)}; give a file of weights, or the "
                         "folder of a run that finished an epoch")  # fmt: skip
    if len(files) == 1 or not is_file(metrics := folder / "metrics.jsonl"):
        return files[0]
    lines = read_text(metrics, MAX_METRICS_BYTES).splitlines()
    entries = [parse_json(line, f"{metrics}: line {number}") for number, line in enumerate(lines, 1)]
    return max(files, key=lambda file: max((_figure(each, RUN_WEIGHTS[file.name]) for each in entries),
                                           default=-math.inf))  # fmt: skip


def _figure(entry: object, start: str) -> float:
    """Return the figure of an evaluation by which weights are chosen, whatever the task; -∞ without one."""
    values = [entry.get(f"{start}{best}") for best in BEST_FIGURES.values()] if isinstance(entry, dict) else []
    return max((float(value) for value in values if isinstance(value, int | float)), default=-math.inf)


TARGETS = {"classification": "{0} classes", "multi_label": "{0} labels", "regression": "the value {1}"}


def _summary(name: str, model: str, info: RunInfo | None) -> str:
    if info is None:
        return f"{name}: {model} by its widths and depths; its classes and size are not known"
    classes = f", {TARGETS[info.task].format(len(info.classes), *info.classes[:1])}" if info.classes else ""
    return f"{name}: {model} at {info.img_size} px{classes}, as it was trained"


def _variant(path: Path, ema: bool, model: str | None) -> str:
    """Return the variant in a file without further information; `model` where that is given."""
    if model is not None:
        return model
    try:
        variant = variant_of(read_checkpoint(path, ema).state_dict)
    except InputError as error:
        if "not a SHViT checkpoint" not in str(error):
            raise
        variant = None
    if variant is None:
        raise InputError(f"{path}: does not say which model it is for, and is none of the SHViTs; give --model NAME")
    return variant


def _known(path: Path) -> Published | None:
    """Return the published checkpoint that the file is a copy of, by its hash."""
    cache = cache_folder()
    known = {digest: entry for entry in read_manifest() if (digest := expected_hash(entry, cache))}
    return known.get(sha256(path)) if known else None


def _published_info(entry: Published) -> RunInfo | None:
    """Return what the publisher says about a classifier."""
    if entry.task != "classification":
        return None
    return RunInfo(model=entry.model, classes=imagenet_names(), img_size=ImgSize(*entry.img_size))


def _pretrained(model: str, log: Log) -> Weights:
    """Return a SHViT's published weights, or those that timm publishes for any other model."""
    if has_scheme(model):
        raise InputError(f"{model}: has no published weights of its own; give --checkpoint")
    entries = [entry for entry in read_manifest() if entry.task == "classification"]
    entry = next((e for e in entries if model == (e.name if "." in model else e.model)), None)
    if entry is not None:
        path, _ = find_weights(entry.name, log)
        return Weights(entry.model, path, entry.name, False, read_run_info(path) or _published_info(entry))
    path = _timm_file(model, log)
    return Weights(model, path, str(path), False, read_run_info(path))


def _timm_file(model: str, log: Log) -> Path:
    """Return timm's weights of a model as a file in the cache."""
    import timm
    from timm.data import infer_imagenet_subset

    cfg = timm.get_pretrained_cfg(model)
    if cfg is None or not cfg.has_weights:
        raise InputError(f"timm has no weights of {model!r}; give --checkpoint, or another model")
    base = model.partition(".")[0]
    path = cache_folder() / "timm" / f"{base}.{cfg.tag or 'default'}.safetensors"
    if is_file(path):
        return path
    log(f"{path.stem}: timm's weights, from {cfg.hf_hub_id or cfg.url}")
    try:
        with bounded_waits():
            made = timm.create_model(model, pretrained=True)
    except Exception as error:  # each of timm's sources has its own
        raise InputError(f"{model}: timm's weights cannot be fetched ({first_line(error)}); check the network, or give "
                         "--checkpoint") from error  # fmt: skip
    known = infer_imagenet_subset(cfg.to_dict()) == "imagenet-1k"
    info = RunInfo(model, imagenet_names() if known else (), ImgSize(*cfg.input_size[1:]))
    write_checkpoint(made.state_dict(), path, info.metadata)
    return path
