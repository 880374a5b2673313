"""The READMEs' generated parts are up to date, and the commands do what they say.

SHVIT_REFRESH_README=1 writes the generated parts anew.
"""

import ast
import functools
import os
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from shvit.cli import COMMANDS, run
from shvit.export.analysis.info import Description, describe, tables
from shvit.export.spec import open_model
from shvit.weights.models import describe as describe_model
from shvit.weights.models import names
from tests.conftest import SMALL

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FOLDERS = ("shvit", "weights", "train", "export", "detection")


def model_table() -> str:
    """One row for each model of ours."""
    rows = ["| model | parameters | GMACs | input | ImageNet top-1 |", "| --- | --- | --- | --- | --- |"]
    for row in map(describe_model, names("shvit*")):
        size = row.img_size[0]
        rows.append(f"| `{row.model}` | {row.params / 1e6:.1f} M | {row.gmacs:.2f} | {size} px | {row.top1:.2f} % |")
    return "\n".join(rows)


def file_tree() -> str:
    """Every module with the first line of its docstring."""
    lines = []
    for folder in FOLDERS:
        lines.append(f"{folder + '/':<20}{_first_line(ROOT / folder / '__init__.py')}")
        for room in (ROOT / folder, *sorted(path.parent for path in (ROOT / folder).glob("*/__init__.py"))):
            indent = "  " * len(room.relative_to(ROOT).parts)
            if room != ROOT / folder:
                lines.append(f"{indent[2:]}{room.name + '/':<18}{_first_line(room / '__init__.py')}")
            modules = sorted(path for path in room.glob("*.py") if path.name != "__init__.py")
            lines += [f"{indent}{path.name:<18}{_first_line(path)}" for path in modules]
    return "```\n" + "\n".join(lines) + "\n```"


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


@functools.cache
def s4() -> Description:
    return describe(*open_model("shvit_s4"))


def memory_argument() -> str:
    """S4's design beside the alternatives, and what the figures say."""
    said = s4()
    assert said.macro is not None
    designs = [
        (f"stride {d.stride}, {len(d.depth)} stages", d.tokens, d.cost) for d in (said.macro.own, said.macro.other)
    ]
    designs += [
        (
            f"{d.stage}: {'one head' if d.heads == 1 else f'{d.heads} heads'} on {d.channels} channels",
            (d.tokens,),
            d.cost,
        )
        for pair in said.micro
        for d in (pair.own, pair.other)
    ]
    lines = ["| design | tokens | MMACs | M parameters | activations MB | all MB | FLOP/byte | memory-bound % of MB |"]
    lines.append("| --- |" + " ---: |" * 7)
    for name, tokens, cost in designs:
        sizes = f"{cost.params / 1e6:.2f} | {cost.activation_bytes / 1e6:.1f} | {cost.bytes / 1e6:.1f}"
        ratios = f"{cost.flop_per_byte:.1f} | {cost.memory_bound_percent:.0f}"
        lines.append(f"| {name} | {', '.join(map(str, tokens))} | {cost.macs / 1e6:.1f} | {sizes} | {ratios} |")
    sentences = (said.summary, said.macro.summary, *(pair.summary for pair in said.micro))
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in sentences)])


EXPORT_README = ROOT / "export" / "README.md"
GENERATED = {
    "models": (README, model_table),
    "tree": (README, file_tree),
    "memory": (EXPORT_README, memory_argument),
}


@pytest.mark.parametrize("part", GENERATED)
def test_generated_part_is_up_to_date(part):
    page, write = GENERATED[part]
    text = page.read_text()
    pattern = rf"(<!-- {part}: generated -->\n)(.*?)(<!-- end -->)"
    found = re.search(pattern, text, re.DOTALL)
    assert found, f"{page} has no part {part}"
    expected = write() + "\n"
    if os.environ.get("SHVIT_REFRESH_README"):
        page.write_text(text[: found.start(2)] + expected + text[found.end(2) :])
    else:
        assert found[2] == expected, "SHVIT_REFRESH_README=1 pytest tests/test_readme.py writes it anew"


def test_info_in_the_readme_is_what_it_prints():
    """But for what is left out and the JSON."""
    (block,) = re.findall(r"\$ shvit info shvit_s4\n(.*?)```", README.read_text(), re.DOTALL)
    console = Console(width=160, highlight=False, markup=False)
    with console.capture() as capture:
        for shown in tables(s4()):
            console.print(shown)
    printed = capture.get().splitlines()
    lines = [line for line in block.splitlines() if line[0] not in "…{"]
    assert len(lines) >= 5
    assert [line for line in lines if line not in printed] == []


SHORTER = {"train": ("--epochs", "1"), "bench": ("--rounds", "2")}


def commands() -> list[list[str]]:
    """The README's `$ shvit …` lines, in order."""
    lines = README.read_text().splitlines()
    return [shlex.split(line.removeprefix("$ shvit ")) for line in lines if line.startswith("$ shvit ")]


def test_commands_of_the_readme_run_in_order(tmp_path, monkeypatch, tiny_demo):
    """From an empty folder, with a small model and few images; no time that is measured means anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shvit.export.bench.measure.ROUND_S", 0.0)
    assert len(commands()) >= 5
    for argv in commands():
        words = [word for word in argv if (argv[0], word) != ("bench", "shvit_s4")]
        words = [SMALL if (argv[0], word) == ("bench", "shvit_s1") else word for word in words]
        assert run([*words, *SHORTER.get(argv[0], ())]), argv


def test_every_command_is_in_the_readme():
    text = README.read_text()
    for name in COMMANDS:
        assert f"shvit {name}" in text, name
