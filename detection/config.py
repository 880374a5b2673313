"""MMDetection's configs: found by name, read as the data that they are, and refused where they would run code."""

import ast
import difflib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import Registry, init_default_scope

from shvit.errors import InputError

CONFIGS = Path(__file__).parent / "configs"
FOLDER_VARIABLE = "SHVIT_CONFIGS"
"""The environment variable by which a config elsewhere names the folder of ours; the commands set it."""

MAX_BYTES = 1 << 20
MAX_FILES = 50
CALLS = {"dict", "list", "tuple", "len", "range", "int", "float", "str"}
NODES = (
    *(ast.Module, ast.Assign, ast.Name, ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Set, ast.Call, ast.keyword),
    *(ast.Attribute, ast.Subscript, ast.Slice, ast.Starred, ast.JoinedStr, ast.FormattedValue, ast.IfExp, ast.Compare),
    *(ast.ListComp, ast.DictComp, ast.comprehension, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.cmpop, ast.boolop),
    *(ast.unaryop, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.expr_context),
)
TRUSTED = ("mmdet", "mmengine", "mmcv", "shvit")
"""Packages whose modules a config may have imported."""

OPERATORS = {"RoIAlign", "RoIPool", "nms", "soft_nms"}
"""Types that mmdet and mmcv look up, or evaluate, by themselves."""

FIELDS = (  # of mmengine's Runner, and what mmdet's configs add
    *("model", "work_dir", "train_dataloader", "val_dataloader", "test_dataloader", "train_cfg", "val_cfg", "test_cfg"),
    *("auto_scale_lr", "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator", "default_hooks"),
    *("custom_hooks", "data_preprocessor", "load_from", "resume", "launcher", "env_cfg", "log_processor", "log_level"),
    *("visualizer", "default_scope", "randomness", "experiment_name", "custom_imports", "train_pipeline"),
    *("test_pipeline", "vis_backends", "data_root", "dataset_type", "backend_args", "_base_"),
)


def bundled() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def open_config(name: str, options: Sequence[str] = (), trust: bool = False) -> Config:
    """A config with its bases, and what it imports registered.

    Args:
        name: one of `bundled()`, or a .py file.
        options: `key.key=value` in MMDetection's form, on top of the file.
        trust: run what code the file has, and import what it names.

    Raises:
        InputError: no such config, it would run code, has an unknown type or a misspelt field, or does not parse.
    """
    path = CONFIGS / f"{name}.py" if name in bundled() else Path(name)
    os.environ.setdefault(FOLDER_VARIABLE, str(CONFIGS))
    if not path.is_file():
        close = difflib.get_close_matches(path.stem, bundled(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"give a .py file, or one of {', '.join(bundled())}"
        raise InputError(f"{name}: no such config; {hint}")
    if not trust:
        for file in _files(path):
            check_is_data(file)
    try:
        with quiet():
            config = Config.fromfile(str(path), import_custom_modules=False)
        config.merge_from_dict(parse_options(options))
    except InputError:
        raise
    except Exception as error:  # mmengine raises what Python raises for the file's mistakes, and types of its own
        raise InputError(f"{path}: not a usable config ({_reason(error)}); correct it") from error
    _import(config, path, trust)
    _check_fields(config, path)
    if not trust:
        _check_types(config, path)
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
            if str(metric.get("ann_file", "")).startswith(before):
                metric.ann_file = root + metric.ann_file.removeprefix(before)


def innermost(dataset: Any) -> Any:
    """The config of the dataset with the photographs, inside those that repeat or mix it."""
    while "ann_file" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


def metrics_of(evaluator: Any) -> list[Any]:
    """The configs of an evaluator's metrics, of which there may be one or several."""
    if not evaluator:
        return []
    return list(evaluator) if isinstance(evaluator, list | tuple) else [evaluator]


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


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """`key.key=value` with Python's literals as values, or texts; what parses as none is a text.

    Raises:
        InputError: an option without a `=`.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise InputError(f"option {option!r} is not of the form key.key=value, such as train_cfg.max_epochs=3")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


# --- data, not code ---------------------------------------------------------------------------------------------------


def _files(path: Path) -> Iterator[Path]:
    """The file and those that it inherits from, but for the ones that came with MMDetection or with us.

    Raises:
        InputError: a base that is no text, is not there, or too many of them.
    """
    seen: list[Path] = []
    left = [path.resolve()]
    while left:
        file = left.pop()
        if file in seen or file.is_relative_to(CONFIGS.resolve()):
            continue
        seen.append(file)
        if len(seen) > MAX_FILES:
            raise InputError(f"{path}: inherits from more than {MAX_FILES} files")
        yield file
        for base in _bases(file):
            if "::" in base:
                if not base.startswith("mmdet::") or ".." in base:
                    raise InputError(f"{file}: inherits from {base!r}; of packages mmdet:: alone is taken")
                continue
            left.append((file.parent / base).resolve())


def _parse(path: Path) -> ast.Module:
    if path.suffix != ".py":
        raise InputError(f"{path}: a config is a .py file")
    if not path.is_file():
        raise InputError(f"{path}: no such config")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes are more than the {MAX_BYTES:,} allowed of a config")
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise InputError(f"{path}{where}: not a config ({_reason(error)}); correct it") from error


def _bases(path: Path) -> list[str]:
    """What the file inherits from, with the folder's variable filled in."""
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "_base_":
            try:
                value = ast.literal_eval(node.value)
            except ValueError as error:
                raise InputError(f"{path}, line {node.lineno}: _base_ must be a text or a list of texts") from error
            bases = [value] if isinstance(value, str) else list(value)
            folder = os.environ[FOLDER_VARIABLE]
            return [re.sub(r"\{\{\s*\$" + FOLDER_VARIABLE + r"\s*:\s*\S*?\}\}", folder, str(base)) for base in bases]
    return []


def check_is_data(path: Path) -> None:
    """Raises InputError at the first thing in a config that is neither a name nor a value, and so might run code."""
    for node in ast.walk(_parse(path)):
        problem = None
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not isinstance(node, NODES):
            problem = f"{type(node).__name__} is"
        elif isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in CALLS):
            problem = f"a call of {ast.unparse(node.func)[:60]} is"
        elif isinstance(node, ast.Attribute) and not ast.unparse(node).startswith("_base_."):
            problem = f"{ast.unparse(node)[:60]} is"
        elif isinstance(node, ast.Name) and node.id.startswith("__"):
            problem = f"{node.id} is"
        if problem:
            line = getattr(node, "lineno", None)
            raise InputError(
                f"{path}{f', line {line}' if line else ''}: {problem} more than a config needs and might run code; "
                "write values alone, or give --trust-config if you know where the file is from"
            )


def _import(config: Config, path: Path, trust: bool) -> None:
    """Registers ours and MMDetection's classes, and imports what the config names."""
    from importlib import import_module

    from mmdet.utils import register_all_modules

    named = config.get("custom_imports", {}).get("imports", [])
    named = [named] if isinstance(named, str) else list(named)
    other = [name for name in named if str(name).partition(".")[0] not in TRUSTED]
    if other and not trust:
        raise InputError(
            f"{path}: wants {', '.join(map(str, other))} imported; give --trust-config if you know where it is from"
        )
    with quiet():
        register_all_modules(init_default_scope=False)
    init_default_scope(config.get("default_scope", "mmdet"))
    try:
        for name in ["shvit.detection", *named]:
            import_module(name)
    except ImportError as error:
        raise InputError(f"{path}: custom_imports names what cannot be imported ({error})") from error


def _check_fields(config: Config, path: Path) -> None:
    """Raises for a field that looks like a misspelt one: mmengine ignores what it does not know."""
    for field in config:
        if field not in FIELDS and (close := difflib.get_close_matches(field, FIELDS, n=1, cutoff=0.85)):
            raise InputError(f"{path}: unknown field {field!r}; did you mean {close[0]!r}?")
    if "model" not in config:
        raise InputError(f"{path}: has no model; inherit from a bundled config, such as {bundled()[0]}")


def _check_types(config: Config, path: Path) -> None:
    """Raises for a type that is not registered: mmengine would import it, whatever it is, and call it."""
    known = registered() | OPERATORS
    for where, kind in _types(config.to_dict()):
        name = str(kind).rpartition(".")[2]
        scope = str(kind).rpartition(".")[0]
        if name in known and scope in ("", "mmdet", "mmengine", "mmcv"):
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "correct it, or give --trust-config"
        raise InputError(f"{path}: unknown type {kind!r} of {where}; {hint}")


def registered() -> set[str]:
    """The names of everything that a config can have built."""
    import mmdet.registry
    import mmengine.registry

    registries = (each for module in (mmengine.registry, mmdet.registry) for each in vars(module).values())
    return {name for each in registries if isinstance(each, Registry) for name in each.module_dict}


def _types(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted place, value) of every `type` below."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "type" and not isinstance(each, dict):
                yield where or "the config", each
            else:
                yield from _types(each, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _types(each, f"{where}[{index}]")


def _reason(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
