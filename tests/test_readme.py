"""The pages' generated parts are up to date, and the commands do what they say.

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
    """Every folder with the first line of its docstring."""
    lines = []
    for folder in FOLDERS:
        rooms = sorted(path.parent for path in (ROOT / folder).glob("*/__init__.py"))
        lines += [f"{folder + '/':<16}{_first_line(ROOT / folder / '__init__.py')}"]
        lines += [f"  {room.name + '/':<14}{_first_line(room / '__init__.py')}" for room in rooms]
    return "```\n" + "\n".join([*lines, *OTHER_FOLDERS]) + "\n```"


OTHER_FOLDERS = (
    f"{'docs/':<16}The pages of the documentation site, and what generates the others.",
    f"{'tests/':<16}`test_<file>.py` for each file, in folders that mirror the code.",
)


def file_table(folder: str) -> str:
    """Every module below a folder with the first line of its docstring."""
    paths = sorted((ROOT / folder).rglob("*.py"), key=lambda path: (path.parent, path.name))
    paths = [path for path in paths if "configs" not in path.parts and path != ROOT / folder / "__init__.py"]
    names = [str(path.relative_to(ROOT / folder)).replace("__init__.py", "") for path in paths]
    rows = [f"| `{name}` | {_first_line(path)} |" for name, path in zip(names, paths, strict=True)]
    return "\n".join(["| file | what it holds |", "| --- | --- |", *rows])


def room_table() -> str:
    """The folders and modules of export in layers from the top down, and what each imports of the others."""
    arrows: dict[str, set[str]] = {}
    for path in (ROOT / "export").rglob("*.py"):
        parts = path.relative_to(ROOT / "export").with_suffix("").parts
        arrows.setdefault(parts[0], set()).update(_rooms_imported(path, len(parts)) - {parts[0]})
    del arrows["__init__"]
    layers, rows = [], []
    while arrows:
        top = sorted(arrows.keys() - set().union(*arrows.values())) or sorted(arrows)  # all of them: a circle
        layers.append("   ".join(top))
        rows += [f"| `{name}` | {', '.join(f'`{each}`' for each in sorted(arrows.pop(name)))} |" for name in top]
    width = max(map(len, layers))
    arrow = f"\n{'↓':>{width // 2}}\n"
    picture = arrow.join(f"{layer:^{width}}".rstrip() for layer in layers)
    return "\n".join(["```", picture, "```", "", "| in `export/` | imports |", "| --- | --- |", *rows])


def _rooms_imported(path: Path, depth: int) -> set[str]:
    """What a module of export imports of export, at the first level."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (name := _below_export(node, depth)) is not None:
            found |= {name.split(".")[0]} if name else {alias.name for alias in node.names}
    return {name for name in found if list((ROOT / "export").glob(f"{name}*"))}


def _below_export(node: ast.ImportFrom, depth: int) -> str | None:
    """The module that an import names, below export; None where it is another one's."""
    module = node.module or ""
    if node.level == depth:
        return module
    if node.level == 0 and f"{module}.".startswith("shvit.export."):
        return module.removeprefix("shvit.export").removeprefix(".")
    return None


def _first_line(path: Path) -> str:
    """A module's docstring's, without where it is installed."""
    line = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
    line = re.sub(r" ?Installed as `[\w.]+`[.:] ?", "", line)
    return line[0].upper() + line[1:]


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


DESIGN = ROOT / "docs" / "explanation" / "design.md"
GENERATED = [
    ("models", README, model_table),
    ("tree", README, file_tree),
    ("memory", DESIGN, memory_argument),
    ("rooms", ROOT / "docs" / "contributing" / "architecture.md", room_table),
    *(("files", ROOT / folder / "README.md", functools.partial(file_table, folder)) for folder in FOLDERS),
]
IDS = [f"{part}-{page.parent.name}" for part, page, _ in GENERATED]


@pytest.mark.parametrize(("part", "page", "write"), GENERATED, ids=IDS)
def test_generated_part_is_up_to_date(part, page, write):
    text = page.read_text()
    pattern = rf"(<!-- {part}: generated -->\n)(.*?)(<!-- end -->)"
    found = re.search(pattern, text, re.DOTALL)
    assert found, f"{page} has no part {part}"
    expected = write() + "\n"
    if os.environ.get("SHVIT_REFRESH_README"):
        page.write_text(text[: found.start(2)] + expected + text[found.end(2) :])
    else:
        assert found[2] == expected, "SHVIT_REFRESH_README=1 pytest tests/test_readme.py writes it anew"


def test_info_on_the_page_of_the_design_is_what_it_prints():
    """But for what is left out and the JSON."""
    (block,) = re.findall(r"\$ shvit info shvit_s4\n(.*?)```", DESIGN.read_text(), re.DOTALL)
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
