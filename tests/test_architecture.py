"""The folders are the architecture: imports point one way and in no circle, and files, rooms and functions are small.

A room is a folder with an `__init__.py`, or a file that stands directly in `export`. architecture.py reads them.
"""

import ast
import statistics
from pathlib import Path

import pytest

from tests import architecture
from tests.architecture import circles, imported, read_imports, room, without
from tests.conftest import ROOT, kept_files

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

# --- what does not hold yet: the only such list, to be emptied --------------------------------------------------------

KNOWN_IMPORTS: set[tuple[str, str]] = set()  # importing, imported
KNOWN_ROOMS: set[str] = set()  # of export, and not drawn in the plan
KNOWN_FULL = {
    "shvit": "five files of the model, and ten of one subject each that all folders stand on, such as errors.py; "
    "fold.py and deployment.py in one file would be a circle, checkpoint.py and create.py too long",
}
KNOWN_LONG: set[str] = set()
KNOWN_NAMES: set[str] = set()

# --- the plan ---------------------------------------------------------------------------------------------------------

FOLDERS = [folder.name for folder in architecture.folders()]
MAY_IMPORT = {  # besides itself
    "shvit": set(),
    "weights": {"shvit"},
    "train": {"shvit", "weights"},
    "export": {"shvit", "weights", "train.data", "train.evaluate", "train.labels"},
    "detection": {"shvit", "weights", "train.data", "train.evaluate"},
}
FLOORS = (  # of export: a room may import those of its floor and of the floors before it
    {"spec", "wrappers", "images", "metadata", "guards", "labels", "web"},
    {"mil"},
    {"quantization"},
    {"formats"},
    {"backends"},
    {"verify", "verdict"},
    {"arm64"},
    {"source", "pipeline", "tables", "evaluation"},
    {"bench"},
    {"analysis", "browser", "predict"},
    {"export"},  # its __init__.py, the functions for Python
    {"demo"},
    {"main"},
)
WEB_IS_USED_BY = {"bench", "browser"}
CLI_IS_USED_BY = {"shvit.export.demo.run": "the demo runs commands, which it shows"}
STRINGS = {  # what names modules and imports nothing of them
    "shvit.cli": "the table of commands, each with the module that is imported when the command is given",
    "shvit.detection.parsing.config": "what a config of somebody else may name in custom_imports",
}
MAX_FILES, MAX_LINES, MAX_TEST_LINES, MAX_MEDIAN = 12, 450, 600, 7

MODULES = architecture.modules()
IMPORTS = without(read_imports(), KNOWN_IMPORTS)


def floor(name: str) -> int:
    """Return on which floor of `export` a room is."""
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def violations(name: str, source: str, *, is_package: bool = False) -> list[str]:
    """Return the modules that a module may not import and does, and relative imports that leave its folder."""
    depth = name.count(".") + is_package - (_folder(name) != "shvit")
    found = _outside(source, depth)
    for target in sorted(imported(name, source, MODULES.keys(), is_package=is_package)):
        if (name, target) not in KNOWN_IMPORTS and not may_import(name, target):
            found.append(target)
    return found


def _outside(source: str, depth: int) -> list[str]:
    """Return imports by the names of source folders, and those that climb above a top-level folder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in {*FOLDERS} - {"shvit"}]
        elif isinstance(node, ast.ImportFrom):
            first = (node.module or "").partition(".")[0]
            if node.level > depth or (not node.level and first in {*FOLDERS} - {"shvit"}):
                found.append("." * node.level + (node.module or ""))
    return found


def may_import(name: str, target: str) -> bool:
    """Return whether the plan lets a module import another."""
    if name in STRINGS and target in _named_alone(name):
        return True
    if target.endswith(".main"):
        return False
    if target == "shvit.cli":
        return name in CLI_IS_USED_BY or name.endswith(".__main__")
    here, there = _folder(name), _folder(target)
    if here != there:
        rest = target.removeprefix("shvit.")
        return there in MAY_IMPORT[here] or any(f"{rest}.".startswith(f"{each}.") for each in MAY_IMPORT[here])
    return here != "export" or _may_import_inside_export(_export_room(name), _export_room(target))


def _named_alone(name: str) -> set[str]:
    """Return what a module names in strings and does not import by a statement."""
    source = MODULES[name].read_text()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return imported(name, source, MODULES.keys()) - imported(name, ast.unparse(tree), MODULES.keys())


def _folder(module: str) -> str:
    return room(module).partition(".")[0]


def _export_room(module: str) -> str:
    return room(module).rpartition(".")[2]


def _may_import_inside_export(here: str, there: str) -> bool:
    if {here, there} & KNOWN_ROOMS:
        return True
    if there == "web":
        return here in WEB_IS_USED_BY | {"web"}
    return here == there or (floor(there) <= floor(here) and there != "export") or (here, there) == ("demo", "export")


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    for name, path in MODULES.items():
        if _folder(name) == folder:
            assert violations(name, path.read_text(), is_package=path.name == "__init__.py") == [], name


def test_every_room_of_export_is_in_the_plan():
    assert {_export_room(name) for name in MODULES if _folder(name) == "export"} - KNOWN_ROOMS <= set().union(*FLOORS)


def test_nothing_imports_in_a_circle():
    """Imports in functions too, and strings, but for those that only name a module."""
    names = {(name, target) for name in STRINGS for target in _named_alone(name)}
    assert circles(without(IMPORTS, names)) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("shvit.x", "from shvit.train.data import x"),
        ("shvit.x", "def f():\n    import shvit.export"),
        ("shvit.x", "f('shvit.detection.detector:Detections')"),
        ("shvit.x", "f('shvit.export.verify.certify')"),
        ("weights.x", "from shvit.train import recipe"),
        ("train.x", "from shvit.export.verify import certify"),
        ("train.x", "mock('shvit.export.verify')"),
        ("export.x", "from shvit.train.loop import train"),
        ("export.x", "from shvit.train import loop"),
        ("export.x", "import train"),
        ("export.x", "from train import loop"),
        ("detection.x", "from shvit.export.verify import certify"),
        ("detection.x", "from shvit import cli"),
        ("export.x", "from shvit.detection.detector import Detections"),
        ("train.x", "from ..shvit import SHViT"),
        ("export.bench.x", "from ...shvit import SHViT"),
        ("export.x", "from shvit.weights.main import List"),
        ("export.x", "from shvit.weights import main"),
        ("train.x", "from .main import Train"),
        ("train.x", "from . import main"),
        ("export.spec", "from .wrappers import x\nfrom . import verify"),
        ("export.spec", "from . import web"),
        ("export.mil.x", "def f():\n    from ..quantization import ranges"),
        ("export.mil.x", "import_module('..backends.onnx', __package__)"),
        ("export.quantization.x", "from ..backends import onnx"),
        ("export.backends.x", "from shvit.export.verify import certify"),
        ("export.backends.x", "from .. import pipeline"),
        ("export.verify", "from .bench import records"),
        ("export.verify", "from . import web"),
        ("export.bench.x", "from ..browser import server"),
        ("export.bench.x", "from .main import parse"),
        ("export.browser.x", "from ..demo import report"),
    ],
)
def test_a_wrong_arrow_is_found(name, source):
    assert violations(f"shvit.{name.removeprefix('shvit.')}", source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("export.x", "from shvit.train.data import open_image"),
        ("export.x", "from shvit.deployment import deploy"),
        ("train.x", "from .recipe import Recipe"),
        ("detection.x", "from shvit.weights.cache import obtain"),
        ("weights.x", "import shvit.shvit"),
        ("shvit.x", "f('shvit.spec', 'shvit', 'a shvit.export.verify in words', '..')"),
        ("export.mil.x", "from ..spec import Spec"),
        ("export.backends.x", "from ..mil import program\nfrom .. import quantization"),
        ("export.verify", "from . import verdict\nfrom .backends import onnx"),
        ("export.browser.x", "from .. import web\nfrom ..bench import records"),
        ("export.main", "from .demo import run"),
    ],
)
def test_a_right_arrow_is_not(name, source):
    name = f"shvit.{name.removeprefix('shvit.')}"
    room_of_x = {"shvit.export.x": "shvit.export.main"}  # x has no floor
    assert violations(room_of_x.get(name, name), source) == []


def test_a_circle_is_found():
    assert circles({"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": set()}) in [
        [["a", "b", "c", "a"]],
        [["b", "c", "a", "b"]],
        [["c", "a", "b", "c"]],
    ]
    assert len(circles({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}, "e": {"a"}})) == 2
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_packages_of_the_wheel_are_the_folders():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inner = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    installed = {".".join(("shvit", *path.parts[path.parts[0] == "shvit" :])) for path in inner}
    assert set(setuptools["packages"]) == installed
    assert setuptools["package-dir"] == {"shvit" if f == "shvit" else f"shvit.{f}": f for f in FOLDERS}
    read = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]["run"]["source_pkgs"]
    assert set(read) == {"shvit", *(f"shvit.{folder}" for folder in FOLDERS if folder != "shvit")}


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_each_package_says_what_it_is_installed_as(package):
    docstring = ast.get_docstring(ast.parse(MODULES[package].read_text())) or ""
    assert f"`{package}`" in docstring or (package == "shvit" and docstring)


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_no_public_name_of_a_package_is_that_of_a_module(package):
    """`from package import name` then gives the function or the module, by what was imported before."""
    nodes = [*ast.walk(ast.parse(MODULES[package].read_text()))]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    statements = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    names |= {alias.asname or alias.name for node in statements for alias in node.names}
    assert {f"{package}.{name}" for name in names} & MODULES.keys() - KNOWN_NAMES == set()


def test_no_room_is_full():
    full = {name for name, count in architecture.files_of_rooms().items() if count > MAX_FILES}
    assert full - KNOWN_FULL.keys() == set()


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_each_folder_has_a_readme_and_no_file_is_long(folder):
    assert (ROOT / folder / "README.md").stat().st_size > 200
    limit = MAX_TEST_LINES if folder == "tests" else MAX_LINES
    for path in (ROOT / folder).rglob("*.py"):
        if path.relative_to(ROOT).as_posix() not in KNOWN_LONG:
            assert len(path.read_text().splitlines()) <= limit, path.name


def test_half_of_the_functions_are_short():
    assert statistics.median(architecture.function_lengths()) <= MAX_MEDIAN


def test_folders_of_the_tests_are_those_of_the_code():
    kept = {Path(name).parent for name in kept_files() if name.startswith("tests/") and name.endswith(".py")}
    mirrored = {path.relative_to("tests") for path in kept} - {Path(), Path("hostile"), Path("apps")}
    assert {path.as_posix() for path in mirrored if not (ROOT / path / "__init__.py").exists()} == set()


def test_no_file_above_200_kb_is_kept():
    sizes = {name: (ROOT / name).stat().st_size for name in kept_files()}
    assert {name: size for name, size in sizes.items() if size > 200_000} == {}
