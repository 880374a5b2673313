"""The documentation site's generator. `make docs` builds the site itself, strictly."""

import importlib.util
import re

import pytest

from shvit.cli import COMMANDS
from shvit.export.backends.registry import BACKENDS
from shvit.export.bench.runtimes import RUNTIMES
from shvit.train.recipes import RECIPES
from tests.conftest import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

DOCS = ROOT / "docs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generate():
    return load("generate")


@pytest.fixture(scope="module")
def command_page(generate):
    return generate.command_page()


def test_page_of_commands_has_each_command_and_its_options(command_page):
    assert re.findall(r"^## shvit (.+)$", command_page, re.MULTILINE) == list(COMMANDS)
    for title in ("export onnx", "export coreml", "weights pull", "detect train", "train s1"):
        assert f"\n### shvit {title}\n" in command_page
    for row in (r"| `--img-size INT\|HxW` |", "| `--optim.lr FLOAT` |", "| `--precision {fp32,fp16,int8}` |"):
        assert f"\n{row}" in command_page


def test_no_option_is_lost(generate, command_page):
    """Every option that `--help` prints is a row, and every row has a meaning."""
    printed = set(re.findall(r"^│ (--[\w.-]+)", generate.help_of("train", "s1"), re.MULTILINE))
    assert len(printed) > 60
    assert printed <= set(re.findall(r"^\| `(--[\w.-]+)", command_page, re.MULTILINE))
    rows = re.findall(r"^\| `.*", command_page, re.MULTILINE)
    assert [row for row in rows if not re.fullmatch(r"\| `[^`]+` \| \S.* \| .* \|", row)] == []


def test_page_of_recipes_has_each_recipe(generate):
    page = generate.recipe_page()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == list(RECIPES)
    assert "| `optim.weight_decay` | `0.03` | `0.025` |" in page


def test_page_of_runtimes_has_every_format_and_runtime(generate):
    page = generate.runtime_page()
    assert re.findall(r"^\| `([\w-]+)`", page, re.MULTILINE) == [*BACKENDS, *RUNTIMES]
    assert "| `openvino` | .xml, .bin | fp32, fp16, bf16, int8 | `openvino` |" in page


def test_public_name_without_docstring_is_found(generate, tmp_path):
    (tmp_path / "shvit").mkdir()
    (tmp_path / "shvit" / "__init__.py").write_text(
        '"""Models."""\n\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from .other import h, i\n'
        '__all__ = ["A", "f", "h"]\n\ndef f(): ...\ndef _g(): ...\n'
        'class A:\n    """A."""\n    x: int\n    def told(self):\n        """Told."""\n    def untold(self): ...\n'
    )
    (tmp_path / "shvit" / "other.py").write_text("def h(): ...\ndef i(): ...\n")
    assert generate.undocumented(tmp_path, ["shvit"]) == ["shvit.A.untold", "shvit.f", "shvit.h"]


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://unpkg.com/x"></script>',
        "<link rel=stylesheet href=//fonts.example/css>",
        '<img alt="" src="http://example.org/a.png">',
        "body { background: url(https://example.org/a.png) }",
        '@import "https://example.org/a.css";',
        '<pre class="mermaid"><code>graph LR</code></pre>',
    ],
)
def test_what_a_page_would_load_is_found(generate, text):
    assert len(generate.external(text)) == 1


def test_links_and_own_files_are_not(generate):
    text = '<a href="https://example.org">x</a> <script src="a.js"></script> <img src=../b.svg> url(data:x)'
    assert generate.external(text) == []


def test_install_page_names_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", (DOCS / "start" / "install.md").read_text(), re.MULTILINE)
    assert {name.strip("`") for cell in named for name in cell.split(", ")} == set(extras)


def test_picture_shows_every_model_of_its_table():
    results = load("results")
    table = results.rows((DOCS / "explanation" / "measurements.md").read_text())
    assert len(table) > 10
    picture = results.PICTURE.read_text()
    for name, *_ in table:
        assert picture.count(f">{name}<") == 2, "python docs/results.py draws it again"


def test_version_is_the_same_everywhere():
    version = re.search(r'__version__ = "(.*)"', (ROOT / "shvit" / "__init__.py").read_text())[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
