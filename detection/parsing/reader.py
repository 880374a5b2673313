"""Reads third-party configs in MMEngine's format as the data that they are: Python never evaluates their text."""

import ast
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import mmdet
from mmengine.config import Config, ConfigDict
from mmengine.config.utils import RemoveAssignFromAST
from mmengine.utils import check_file_exist

from shvit.errors import InputError
from shvit.files import check_file

from . import expressions

CONFIGS = Path(__file__).parent.parent / "configs"
MMDET_CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
FOLDER_VARIABLE = "SHVIT_CONFIGS"
"""The environment variable by which a config elsewhere names the folder of ours; the commands set it."""

MAX_BYTES = 1 << 20  # of one file
MAX_FILES = 64  # a config and its bases
TRUST = "give --trust-config if you know where the file is from"
BASE = expressions.BASE
VARIABLE = re.compile(r"\{\{['\"]?\s*\$(\w+)\s*:\s*([^\s{}]*)\s*['\"]?\}\}")


class DataConfig(Config):
    """MMEngine's Config with its one step that runs code replaced.

    `Config.fromfile` fills variables into a file's text, looks for its bases there, and evaluates it. `read` takes the
    same steps, for which it uses its base class's own methods, with three differences: the text that results is
    checked to be data, `expressions` computes its values, and of the environment's variables only `FOLDER_VARIABLE` is
    filled in. What is checked is the filled-in text, whatever path led to the file. Files that are installed with
    MMDetection or with this package are evaluated by Python.
    """

    @classmethod
    def read(cls, path: Path) -> Config:
        """Return a file's config, merged with its bases.

        Raises:
            InputError: the file, or one of its bases, is more than data or too large.
            Exception: what MMEngine raises for other mistakes in the files.
        """
        content, text = cls._content(str(path), [])
        return Config(content, cfg_text=text, filename=str(path))

    @classmethod
    def _content(cls, filename: str, read: list[Path]) -> tuple[dict[str, Any], str]:
        """Return a file's fields, merged with its bases', and the texts of all.

        Args:
            filename: the file, as a base names it.
            read: the files so far, to which this one is added.
        """
        path = Path(os.path.abspath(os.path.expanduser(filename)))  # noqa: PTH100, PTH111  (links are not followed)
        check_file_exist(str(path))
        _check_count_and_size(check_file(path), read)
        text, variables = cls._fill_in(path)
        tree = ast.parse(text) if _is_installed(path) else check_is_data(text, path)
        bases, texts = ConfigDict(), []
        for base in expressions.base_files(tree):
            fields, base_text, scope = cls._base(str(base), path, read)
            if twice := bases.keys() & fields.keys():
                raise KeyError(f"Duplicate key is not allowed among bases. Duplicate keys: {twice}")
            bases.update(cls._dict_to_config_dict(fields, scope))
            texts.append(base_text)
        content = cls._substitute_base_vars(_evaluate(tree, path, bases), variables, bases)
        merged = cls._merge_a_into_b(content, bases)
        texts.append(f"{path}\n{path.read_text('utf-8')}")
        return {name: value for name, value in merged.items() if not name.startswith("__")}, "\n".join(texts)

    @classmethod
    def _base(cls, base: str, path: Path, read: list[Path]) -> tuple[dict[str, Any], str, str | None]:
        """Return the fields and the text of a base, and the scope that its types are of."""
        package = "mmdet::"
        if base.startswith(f"{package}{BASE}/"):  # MMEngine would look for it among the model zoo's hundred metafiles
            filename, scope = str(MMDET_CONFIGS / base.removeprefix(package)), "mmdet"
        else:
            filename, scope = cls._get_cfg_path(base, str(path))
        return *cls._content(filename, read), scope

    @classmethod
    def _fill_in(cls, path: Path) -> tuple[str, dict[str, str]]:
        """Return a file's text with its variables filled in, and the names of those that stand for fields of bases."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            cls._substitute_predefined_vars(str(path), str(copy))
            text = VARIABLE.sub(lambda match: _folder_of_configs(match, path), copy.read_text("utf-8"))
            copy.write_text(text, "utf-8")
            variables = cls._pre_substitute_base_vars(str(copy), str(copy))
            return copy.read_text("utf-8"), variables


def _check_count_and_size(path: Path, read: list[Path]) -> None:
    """Add a file to those that were read; raise InputError where it, or their number, is too large."""
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: more than the {MAX_BYTES:,} bytes allowed of a config")
    read.append(path)
    if len(read) > MAX_FILES:
        raise InputError(f"{path}: more than {MAX_FILES} bases, or one that is its own; {TRUST}")


def _is_installed(path: Path) -> bool:
    """Return whether a file came with MMDetection or with this package."""
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in (CONFIGS, MMDET_CONFIGS))


def _folder_of_configs(match: re.Match[str], path: Path) -> str:
    """Return the folder of our configs, the one environment variable that a config may read."""
    if match[1] != FOLDER_VARIABLE:
        raise InputError(
            f"{path}: a config is not told the environment variable {match[1]}; write its value, or {TRUST}"
        )
    return os.environ[FOLDER_VARIABLE].replace("\\", "/")


def _evaluate(tree: ast.Module, path: Path, bases: ConfigDict) -> dict[str, Any]:
    """Return the values of a file's names: of an installed file by Python, of others by `expressions`."""
    names: dict[str, Any] = {BASE: bases}
    if _is_installed(path):
        exec(compile(RemoveAssignFromAST(BASE).visit(tree), str(path), "exec"), names)
    else:
        with _located(path):
            expressions.evaluate(tree, names)
    own = {name: value for name, value in names.items() if name != BASE and not name.startswith("__")}
    return {name: value for name, value in own.items() if not isinstance(value, FunctionType | ModuleType)}


def check_is_data(text: str, path: Path) -> ast.Module:
    """Return a config's syntax tree; raise InputError at the first thing in it that might run code."""
    if path.suffix != ".py":
        raise InputError(f"{path}: a config is a .py file")
    with _located(path):
        tree = expressions.parse(text)
    if problem := expressions.problem_of(tree):
        line, what = problem
        raise InputError(
            f"{path}{f', line {line}' if line else ''}: {what} is more than a config needs and might run code; "
            f"write values alone, or {TRUST}"
        )
    return tree


@contextmanager
def _located(path: Path) -> Iterator[None]:
    """Put a file's name before the messages of a block, which begin with a line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}{error}") from error
