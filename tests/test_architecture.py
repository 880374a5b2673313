"""The folders are the architecture: imports point one way, and the package list is the folders'."""

import ast

import pytest

from tests.conftest import ROOT, kept_files

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
MAY_IMPORT = {  # besides itself
    "shvit": set(),
    "weights": {"shvit"},
    "train": {"shvit", "weights"},
    "export": {"shvit", "weights", "train.data", "train.evaluate"},
    "detection": {"shvit", "weights", "train.data", "train.evaluate"},
}


def imported(source: str, depth: int = 1) -> list[str]:
    """Every module that a source imports, as it names it: `shvit.train.data`, `.recipe`."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.ImportFrom) and node.level <= depth:
            names += [f".{name}" for name in ([node.module] if node.module else [alias.name for alias in node.names])]
        elif isinstance(node, ast.ImportFrom):
            names.append("..")  # out of the folder
    return names


def violations(folder: str, source: str, depth: int = 1) -> list[str]:
    """The imports of a module in `folder` that point the wrong way."""
    wrong = []
    for name in imported(source, depth):
        first, _, rest = name.partition(".")
        if name == ".." or (first != "shvit" and first in MAY_IMPORT):
            wrong.append(name)  # `import train` finds the source folder, not the package
        elif first == "shvit" and rest.partition(".")[0] in MAY_IMPORT and rest != "shvit":
            below = rest.partition(".")[0]
            if below not in (folder, "shvit") and not any(
                rest == allowed or rest.startswith(allowed + ".") or allowed.startswith(rest)
                for allowed in MAY_IMPORT[folder]
            ):
                wrong.append(name)
        if name.endswith(".main") and first in ("shvit", ""):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    for path in (ROOT / folder).rglob("*.py"):
        depth = len(path.relative_to(ROOT / folder).parts)
        assert violations(folder, path.read_text(), depth) == [], path.name


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("shvit", "from shvit.train.data import x"),
        ("shvit", "def f():\n    import shvit.export"),
        ("weights", "from shvit.train import recipe"),
        ("train", "from shvit.export.verify import certify"),
        ("export", "from shvit.train.loop import train"),
        ("export", "from shvit.train import loop"),
        ("export", "import train"),
        ("detection", "from shvit.export.verify import certify"),
        ("export", "from shvit.detection.detector import Detections"),
        ("train", "from ..shvit import SHViT"),
        ("export", "from shvit.weights.main import List"),
        ("export", "from shvit.weights import main"),
        ("train", "from .main import Train"),
        ("train", "from . import main"),
    ],
)
def test_a_wrong_arrow_is_found(folder, source):
    assert violations(folder, source)


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("export", "from shvit.train.data.images import open_image"),
        ("export", "from shvit.deployment import deploy"),
        ("train", "from .recipe import Recipe"),
        ("detection", "from shvit.weights.cache import obtain"),
        ("weights", "import shvit.shvit"),
    ],
)
def test_a_right_arrow_is_not(folder, source):
    assert violations(folder, source) == []


def test_package_list_is_the_folders():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed = {folder: "shvit" if folder == "shvit" else f"shvit.{folder}" for folder in FOLDERS}
    rooms = [path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).glob("*/__init__.py")]
    packages = [*installed.values(), *(".".join((installed[room.parts[0]], *room.parts[1:])) for room in rooms)]
    assert sorted(tool["packages"]) == sorted(packages)
    assert tool["package-dir"] == {name: folder for folder, name in installed.items()}


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "shvit"])
def test_each_package_says_what_it_is_installed_as(folder):
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert f"`shvit.{folder}`" in docstring


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_each_folder_has_a_readme_and_no_file_is_long(folder):
    assert (ROOT / folder / "README.md").stat().st_size > 200
    for path in (ROOT / folder).rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 600, path.name


def test_no_file_above_200_kb_is_kept():
    sizes = {name: (ROOT / name).stat().st_size for name in kept_files()}
    assert {name: size for name, size in sizes.items() if size > 200_000} == {}
