"""The pages on training and export: their commands parse, and their Python runs."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shvit.cli import COMMANDS, _parse
from shvit.train import recipes
from shvit.train.main import Plot, Train, parse
from shvit.train.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "train").glob("*.md")]


def train_commands(page: Path) -> list[list[str]]:
    """The words after `shvit train` or `-m shvit.train` in a page's blocks of commands."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = (re.search(r"(?:^\$ shvit|^shvit|-m shvit\.)\s*train (.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    commands = train_commands(page)
    assert commands
    for words in commands:
        if "--help" not in words:
            assert isinstance(parse(words, "shvit train"), Train | Plot), words


@pytest.mark.parametrize(
    ("page", "commands"),
    [("export/README.md", 8), ("export/SPEED.md", 4), ("export/DEVICES.md", 6), ("README.md", 5)],
)
def test_commands_of_export_parse(page, commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = [line.partition(" #")[0] for line in "".join(blocks).splitlines() if line.startswith("shvit ")]
    assert len(lines) >= commands
    for line in lines:
        program, name, *words = shlex.split(line)
        assert program == "shvit"
        assert name in COMMANDS
        assert callable(_parse(name, words).run)


def test_ten_lines_of_python_fine_tune(tmp_path, monkeypatch):
    """On images of two colors, with less to do and without the network."""
    rng = np.random.default_rng(0)
    for index in range(40):
        pixels = rng.integers(0, 80, (40, 40, 3), dtype=np.uint8)
        pixels[..., index % 2] += 150
        path = tmp_path / "images" / ("red", "green")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "train" / "FINETUNE.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 11
    quick = replace(recipes.FINETUNE, pretrained=False, model="test_resnet", img_size=32, batch_size=8)
    monkeypatch.setattr(recipes, "FINETUNE", quick)
    monkeypatch.chdir(tmp_path)
    said: dict = {}
    exec(code, said)
    assert isinstance(said["recipe"], Recipe)
    assert Path(said["result"]["checkpoint"]).is_file()
