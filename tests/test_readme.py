"""The README's generated parts are up to date, and its commands do what it says.

SHVIT_REFRESH_README=1 writes the generated parts anew.
"""

import ast
import os
import re
import shlex
from pathlib import Path

import pytest

from shvit.cli import COMMANDS, run
from shvit.weights.models import describe, names

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FOLDERS = ("shvit", "weights", "train", "export")


def model_table() -> str:
    """One row for each model of ours."""
    rows = ["| model | parameters | GMACs | input | ImageNet top-1 |", "| --- | --- | --- | --- | --- |"]
    for row in map(describe, names("shvit*")):
        size = row.img_size[0]
        rows.append(f"| `{row.model}` | {row.params / 1e6:.1f} M | {row.gmacs:.2f} | {size} px | {row.top1:.2f} % |")
    return "\n".join(rows)


def file_tree() -> str:
    """Every module with the first line of its docstring."""
    lines = []
    for folder in FOLDERS:
        lines.append(f"{folder + '/':<20}{_first_line(ROOT / folder / '__init__.py')}")
        modules = sorted(path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")
        lines += [f"  {path.name:<18}{_first_line(path)}" for path in modules]
    return "```\n" + "\n".join(lines) + "\n```"


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


GENERATED = {"models": model_table, "tree": file_tree}


@pytest.mark.parametrize("part", GENERATED)
def test_generated_part_is_up_to_date(part):
    text = README.read_text()
    pattern = rf"(<!-- {part}: generated -->\n)(.*?)(<!-- end -->)"
    found = re.search(pattern, text, re.DOTALL)
    assert found, f"README.md has no part {part}"
    expected = GENERATED[part]() + "\n"
    if os.environ.get("SHVIT_REFRESH_README"):
        README.write_text(text[: found.start(2)] + expected + text[found.end(2) :])
    else:
        assert found[2] == expected, "SHVIT_REFRESH_README=1 pytest tests/test_readme.py writes it anew"


def commands() -> list[list[str]]:
    """The README's `$ shvit …` lines, in order."""
    lines = README.read_text().splitlines()
    return [shlex.split(line.removeprefix("$ shvit ")) for line in lines if line.startswith("$ shvit ")]


def test_commands_of_the_readme_run_in_order(tmp_path, monkeypatch):
    """From an empty folder; training is cut to one epoch."""
    monkeypatch.chdir(tmp_path)
    assert len(commands()) >= 5
    for argv in commands():
        shortened = [*argv, "--epochs", "1"] if argv[0] == "train" else argv
        shortened = [*argv, "--rounds", "2"] if argv[0] == "bench" else shortened
        assert run(shortened), argv


def test_every_command_is_in_the_readme():
    text = README.read_text()
    for name in COMMANDS:
        assert f"shvit {name}" in text, name
