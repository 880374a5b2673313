"""MMDetection's configs: found by name, read as the data that they are, and refused where they would run code."""

import ast
import difflib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mmengine.config import Config
from mmengine.registry import init_default_scope

from shvit.errors import InputError, first_line

from .vocabulary import CALLS, FIELDS, NODES, SCOPES, TYPES, UNSAFE_FIELDS, registered

CONFIGS = Path(__file__).parent / "configs"
FOLDER_VARIABLE = "SHVIT_CONFIGS"
"""The environment variable by which a config elsewhere names the folder of ours; the commands set it."""

OURS = ("shvit.detection", "shvit.detection.reading")
"""What every config has imported: our parts, and the reading of annotation files."""

MAX_BYTES = 1 << 20  # of one file
TRUST = "give --trust-config if you know where the file is from"


def bundled() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def open_config(name: str, options: Sequence[str] = (), trust: bool = False) -> Config:
    """A config with its bases, and what it imports registered.

    Args:
        name: one of `bundled()`, or a .py file.
        options: `key.key=value`, on top of the file.
        trust: run what code the file has, import what it names, and build what it asks for.

    Raises:
        InputError: no such config, it is more than data, has a type that is not known or a misspelt field, or does not
            describe a detector.
    """
    path = CONFIGS / f"{name}.py" if name in bundled() else Path(name)
    os.environ.setdefault(FOLDER_VARIABLE, str(CONFIGS))
    if not path.is_file():
        close = difflib.get_close_matches(path.stem, bundled(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"give a .py file, or one of {', '.join(bundled())}"
        raise InputError(f"{name}: no such config; {hint}")
    if path.suffix != ".py":
        raise InputError(f"{path}: a config is a .py file")
    try:
        with quiet(), _found_bases(), nullcontext() if trust else _checked():
            config = Config.fromfile(str(path), import_custom_modules=False, lazy_import=None if trust else False)
        config.merge_from_dict(parse_options(options))
    except InputError:
        raise
    except Exception as error:  # mmengine raises what Python raises for the file's mistakes, and types of its own
        raise InputError(f"{path}: not a usable config ({first_line(error)}); correct it") from error
    _check_fields(config, path)
    _import(config, path, trust)
    if not trust:
        _check_values(config, path)
    return config


def set_data_root(config: Config, folder: Path) -> None:
    """Has the config's datasets and metrics read below `folder` in place of its own data_root."""
    root = f"{folder}/"
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


def innermost(dataset: Any) -> Any:
    """The config of the dataset with the photographs, inside those that repeat it."""
    while "ann_file" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


def metrics_of(evaluator: Any) -> list[Any]:
    """The configs of an evaluator's metrics, of which there may be one or several."""
    if not evaluator:
        return []
    return list(evaluator) if isinstance(evaluator, list | tuple) else [evaluator]


WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """`key.key=value` with Python's literals as values, in any case of True, False and None; anything else is a text.

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
    """A block in which libraries do not tell what else could be installed, or what they do in passing."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.INFO)
        try:
            yield
        finally:
            logging.disable(level)


# --- data, not code ---------------------------------------------------------------------------------------------------


@contextmanager
def _checked() -> Iterator[None]:
    """A block in which mmengine evaluates no config's text that is more than data.

    mmengine fills variables into a file's text, writes it beside, looks for its bases there, and then evaluates it. So
    what is checked is that text, at that moment: whatever path led to the file, and whatever was filled in. Files that
    came with MMDetection or with us are not looked into.
    """
    import mmdet

    ours = (CONFIGS.resolve(), (Path(mmdet.__file__).parent / ".mim").resolve())
    sources: dict[str, Path] = {}
    fill_in, find_bases = Config._substitute_predefined_vars, Config._get_base_files

    def recorded(filename: str, temp_config_name: str) -> None:
        path = Path(filename)
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: more than the {MAX_BYTES:,} bytes allowed of a config")
        sources[temp_config_name] = path
        fill_in(filename, temp_config_name)

    def checked(filename: str) -> list[str]:
        path = sources[filename]
        if not any(path.resolve().is_relative_to(folder) for folder in ours):
            check_is_data(Path(filename).read_text(encoding="utf-8"), path)
        return find_bases(filename)

    with (
        patch.object(Config, "_substitute_predefined_vars", staticmethod(recorded)),
        patch.object(Config, "_get_base_files", staticmethod(checked)),
    ):
        yield


@contextmanager
def _found_bases() -> Iterator[None]:
    """A block in which mmengine does not look for MMDetection's bases among its experiments, where they never are.

    It reads the hundred metafiles of the model zoo for each base, half a second, before it looks into the folder.
    """
    from mmengine.config import utils

    find = utils._get_cfg_metainfo

    def found(package_path: str, cfg_path: str) -> dict[str, Any]:
        if cfg_path.startswith("_base_/"):
            raise ValueError(f"{cfg_path} is no experiment")  # mmengine goes on with the folder
        return find(package_path, cfg_path)

    with patch.object(utils, "_get_cfg_metainfo", found):
        yield


def check_is_data(text: str, path: Path) -> None:
    """Raises InputError at the first thing in a config that is neither a name nor a value, and so might run code."""
    if path.suffix != ".py":
        raise InputError(f"{path}: a config is a .py file")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise InputError(f"{path}{where}: not a config ({first_line(error)}); correct it") from error
    bases = {id(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if problem := _problem(node, bases):
            line = getattr(node, "lineno", None)
            raise InputError(
                f"{path}{f', line {line}' if line else ''}: {problem} is more than a config needs and might run code; "
                f"write values alone, or {TRUST}"
            )


def _problem(node: ast.AST, assigned: set[int]) -> str | None:
    """What of a node is more than data, if anything.

    Args:
        assigned: ids of the names that the file's own assignments begin with; of these alone, one may be `_base_`.
    """
    if not isinstance(node, NODES):
        return type(node).__name__
    if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in CALLS):
        return f"a call of {ast.unparse(node.func)[:60]}"
    if isinstance(node, ast.Attribute) and (node.attr.startswith("_") or not ast.unparse(node).startswith("_base_.")):
        return ast.unparse(node)[:60]
    if isinstance(node, ast.Name):
        stored = not isinstance(node.ctx, ast.Load)
        if node.id.startswith("__") or (stored and node.id in CALLS):
            return f"the name {node.id}"
        if stored and node.id == "_base_" and id(node) not in assigned:
            return "another _base_"
    return None


# --- what is in it ----------------------------------------------------------------------------------------------------


def _check_fields(config: Config, path: Path) -> None:
    """Raises where fields are misspelt, which mmengine would ignore, or do not describe a detector."""
    for field in config:
        if field not in FIELDS and (close := difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.93)):
            raise InputError(f"{path}: unknown field {field!r}; did you mean {close[0]!r}?")

    def is_dict(value: Any, *keys: str) -> bool:
        return isinstance(value, dict) and all(key in value for key in keys)

    model = config.get("model")
    if not is_dict(model, "type") or not is_dict(model.get("backbone"), "type"):
        raise InputError(f"{path}: has no model with a backbone; inherit from a bundled config, such as {bundled()[0]}")
    for split in ("train", "val", "test"):
        loader = config.get(f"{split}_dataloader")
        if loader is None and split != "test":
            continue
        dataset = innermost(loader["dataset"]) if is_dict(loader) and is_dict(loader.get("dataset")) else None
        if not is_dict(dataset, "type", "ann_file", "pipeline"):
            raise InputError(f"{path}: {split}_dataloader has no dataset with a type, an ann_file and a pipeline")
    if not is_dict(config.get("custom_imports", {})):
        raise InputError(f'{path}: custom_imports is no dict, such as dict(imports=["shvit.detection"])')


def _import(config: Config, path: Path, trust: bool) -> None:
    """Registers ours and MMDetection's classes, and imports what the config names."""
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


def _check_values(config: Config, path: Path) -> None:
    """Raises for what mmengine and mmdet would import, evaluate, unpickle or write to, if the config said so."""
    for where, key, value in _items(config.to_dict()):
        place = f"{where}.{key}" if where else key
        if key in UNSAFE_FIELDS and value is not None:
            raise InputError(f"{path}: {place} is not taken from a config that might be somebody else's; {TRUST}")
        if key == "_scope_" and value not in SCOPES:
            raise InputError(f"{path}: {place} {value!r} is not one of {', '.join(SCOPES)}; {TRUST}")
        if key == "ann_file" and value and not str(value).endswith(".json"):
            raise InputError(f"{path}: {place} {value!r} is no .json file")
        if key == "type" and not isinstance(value, dict):
            _check_type(value, where or "the config", path)


def _check_type(value: Any, where: str, path: Path) -> None:
    scope, _, name = str(value).rpartition(".")
    if name in TYPES and scope in ("", *SCOPES):
        return
    if name in registered() and scope in ("", *SCOPES):
        raise InputError(f"{path}: type {value!r} of {where} is not among those that a config gets unasked; {TRUST}")
    close = difflib.get_close_matches(name, TYPES, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"correct it, or {TRUST}"
    raise InputError(f"{path}: unknown type {value!r} of {where}; {hint}")


def _items(value: Any, where: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted place, key, value) of everything below."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield where, str(key), each
            yield from _items(each, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _items(each, f"{where}[{index}]")
