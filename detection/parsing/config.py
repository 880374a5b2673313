"""MMDetection's configs: resolved by name, read as data, and refused where they would run code."""

import ast
import difflib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope

from shvit import terminal
from shvit.errors import InputError, first_line
from shvit.files import is_there

from .reader import CONFIGS, FOLDER_VARIABLE, TRUST, DataConfig
from .vocabulary import FIELDS, SCOPES, Refused, check_config

OURS = ("shvit.detection", "shvit.detection.plugin.reading")
"""Modules that are imported for every config: our parts, and the reading of annotation files."""

MAX_FIELDS = 1000


def list_configs() -> list[str]:
    """Return the names of the bundled configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def load_config(name: str, options: Sequence[str] = (), trust: bool = False) -> Config:
    """Load a config with its bases, and register what it imports.

    Args:
        name: one of `list_configs()`, or a .py file.
        options: `key.key=value`, on top of the file.
        trust: run what code the file has, import what it names, and build what it asks for.

    Raises:
        InputError: no such config, it is more than data, has a type that is not known or a misspelt field, or does not
            describe a detector.
    """
    path = CONFIGS / f"{name}.py" if name in list_configs() else Path(name)
    os.environ.setdefault(FOLDER_VARIABLE, str(CONFIGS))
    if not is_there(path):
        close = difflib.get_close_matches(path.stem, list_configs(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"give a .py file, or one of {', '.join(list_configs())}"
        raise InputError(f"{name}: no such config; {hint}")
    if path.suffix != ".py":
        raise InputError(f"{path}: a config is a .py file")
    try:
        with quiet():
            config = Config.fromfile(str(path), import_custom_modules=False) if trust else DataConfig.read(path)
        given = parse_options(options)
        config.merge_from_dict(given)
    except InputError:
        raise
    except Exception as error:  # mmengine raises what Python raises for the file's mistakes, and types of its own
        raise InputError(f"{path}: not a usable config ({first_line(error)}); correct it") from error
    _check_fields(config, path)
    _import(config, path, trust)
    if not trust:
        _check_values(config, path, given)
    return config


def set_data_root(config: Config, folder: Path) -> None:
    """Replace the data_root of a config's datasets and metrics, in place, by `folder`."""
    root = f"{folder.resolve() if '..' in folder.parts else folder}/"  # a run's own config is read again
    for split in ("train", "val", "test"):
        loader = config.get(f"{split}_dataloader")
        if loader is None:
            continue
        dataset = innermost(loader.dataset)
        before = dataset.get("data_root") or ""
        dataset.data_root = root
        for metric in metrics_of(config.get(f"{split}_evaluator")):
            named = metric.get("ann_file") or ""
            if named.startswith(before) and not (before == "" and Path(named).is_absolute()):
                metric.ann_file = root + named.removeprefix(before)


def innermost(dataset: ConfigDict) -> ConfigDict:
    """Return the config of the dataset that has the images, inside those that repeat it."""
    while "ann_file" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


def metrics_of(evaluator: ConfigDict | Sequence[ConfigDict] | None) -> list[ConfigDict]:
    """Return the configs of an evaluator's metrics, of which there may be one or several."""
    if not evaluator:
        return []
    return list(evaluator) if isinstance(evaluator, list | tuple) else [evaluator]


def class_names(config: Config) -> tuple[str, ...]:
    """Return the names of the detector's classes, in the order of its labels."""
    from mmdet.registry import DATASETS

    dataset = innermost(config.test_dataloader.dataset)
    classes = (dataset.get("metainfo") or {}).get("classes") or DATASETS.get(dataset.type).METAINFO["classes"]
    return (classes,) if isinstance(classes, str) else tuple(classes)


WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """Parse `key.key=value`, where values are Python's literals, True, False and None in any case, or else texts.

    Raises:
        InputError: an option without a `=`.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise InputError(f"option {option!r} is not of the form key.key=value, such as train_cfg.max_epochs=3")
        try:
            parsed[key] = WORDS[value.lower()] if value.lower() in WORDS else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


@contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries' hints and progress messages in a block, also those on stdout."""
    with terminal.quiet(), redirect_stdout(io.StringIO()):
        yield


# --- what is in it ----------------------------------------------------------------------------------------------------


def _check_fields(config: Config, path: Path) -> None:
    """Raise InputError where fields are misspelled, which MMEngine would ignore, or do not describe a detector."""
    if len(config) > MAX_FIELDS:
        raise InputError(f"{path}: has {len(config):,} fields and variables; a config has at most {MAX_FIELDS:,}")
    for field in config:
        if field not in FIELDS and (close := difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.93)):
            raise InputError(f"{path}: unknown field {field!r}; did you mean {close[0]!r}?")

    def is_dict(value: object, *keys: str) -> bool:
        return isinstance(value, dict) and all(key in value for key in keys)

    model = config.get("model")
    if not is_dict(model, "type") or not is_dict(model.get("backbone"), "type"):
        raise InputError(
            f"{path}: has no model with a backbone; inherit from a bundled config, such as {list_configs()[0]}"
        )
    for split in ("train", "val", "test"):
        loader = config.get(f"{split}_dataloader")
        if loader is None and split != "test":
            continue
        dataset = innermost(loader["dataset"]) if is_dict(loader) and is_dict(loader.get("dataset")) else None
        if not is_dict(dataset, "type", "ann_file", "pipeline"):
            raise InputError(f"{path}: {split}_dataloader has no dataset with a type, an ann_file and a pipeline")
    if not is_dict(config.get("custom_imports", {})):
        raise InputError(f'{path}: custom_imports is not a dict, such as dict(imports=["shvit.detection"])')


def _import(config: Config, path: Path, trust: bool) -> None:
    """Register ours and MMDetection's classes, and import what the config names."""
    from importlib import import_module

    named = config.get("custom_imports", {}).get("imports") or []
    named = [named] if isinstance(named, str) else list(named)
    other = [name for name in named if name not in OURS]
    if other and not trust:
        raise InputError(f"{path}: wants {', '.join(map(str, other))} imported; {TRUST}")
    scope = config.setdefault("default_scope", "mmdet")
    if scope not in SCOPES and not trust:
        raise InputError(f"{path}: default_scope {scope!r} is not one of {', '.join(SCOPES)}; {TRUST}")
    try:
        with quiet():
            from mmdet.utils import register_all_modules

            register_all_modules(init_default_scope=False)
            for name in [*OURS, *named]:
                import_module(name)
    except ImportError as error:
        raise InputError(f"{path}: custom_imports names what cannot be imported ({error})") from error
    init_default_scope(scope)


def _check_values(config: Config, path: Path, options: dict[str, Any]) -> None:
    """Raise InputError for values that an untrusted config must not have; options on the command line are trusted."""
    try:
        check_config(config.to_dict(), _leaves(options))
    except Refused as error:
        raise InputError(f"{path}: {error}; correct it, or {TRUST}") from error


def _leaves(options: dict[str, Any]) -> Iterator[str]:
    """Yield the fields that options give, those inside of dicts one by one: mmengine merges these with the config's."""
    for key, value in options.items():
        if isinstance(value, dict) and value:
            yield from _leaves({f"{key}.{inner}": each for inner, each in value.items()})
        else:
            yield key


def only_known(config: Config, options: Sequence[str] = ()) -> Config:
    """Return the config without its own variables, so that only what was checked reaches MMEngine.

    Args:
        options: whose fields are left in.
    """
    named = {name.partition(".")[0] for name in parse_options(options)}
    known = {name: value for name, value in config.items() if name in FIELDS or name in named}
    return Config(known, filename=config.filename)
