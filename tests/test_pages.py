"""The README and the pages of the documentation: their commands parse, and their Python runs."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from shvit.checkpoint import write_checkpoint
from shvit.cli import _parse, _split, run
from shvit.train import recipes
from shvit.train.main import Plot, Train, parse
from shvit.train.recipe import Recipe
from tests import task_models
from tests.conftest import LABELS, create_tiny

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
FOLDER_PAGES = [str(path.relative_to(ROOT)) for path in ROOT.glob("*/README.md")]
OTHERS = ("model", "tools")
"""Folders of the reference implementation and of MMDetection."""
FEWEST_TRAIN = {
    "README.md": 1,
    "docs/start/train.md": 2,
    "docs/how-to/train.md": 5,
    "docs/how-to/finetune.md": 1,
    "docs/how-to/gpus.md": 2,
    "docs/how-to/cluster.md": 3,
}
FEWEST = {
    "README.md": 5,
    "docs/start/export.md": 3,
    "docs/start/app.md": 3,
    "docs/how-to/predict.md": 7,
    "docs/how-to/export.md": 8,
    "docs/how-to/devices.md": 6,
    "docs/how-to/weights.md": 6,
    "docs/how-to/detection.md": 8,
    "docs/explanation/measurements.md": 4,
}
"""Commands that are found on a page at least, so that what finds them cannot go blind."""


def train_commands(page: Path) -> list[list[str]]:
    """The words after `shvit train` or `-m shvit.train` in a page's blocks of commands."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = (re.search(r"(?:^\$ shvit|^shvit|-m shvit\.)\s*train (.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


@pytest.mark.parametrize("page", NAMES)
def test_train_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    commands = train_commands(ROOT / page)
    assert len(commands) >= FEWEST_TRAIN.get(page, 0)
    for words in commands:
        if "--help" not in words:
            assert isinstance(parse(words, "shvit train"), Train | Plot), words


@pytest.mark.parametrize("page", NAMES)
def test_commands_parse(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    joined = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ").partition(" #")[0] for line in joined if re.match(r"(\$ )?shvit ", line)]
    assert len(lines) >= FEWEST.get(page, 0)
    for line in lines:
        program, *argv = shlex.split(line)
        assert program == "shvit"
        name, words = _split(argv)
        if "--help" not in words:
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
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "how-to" / "finetune.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 11
    quick = replace(recipes.FINETUNE, pretrained=False, model="test_resnet", img_size=32, batch_size=8)
    monkeypatch.setattr(recipes, "FINETUNE", quick)
    monkeypatch.chdir(tmp_path)
    said: dict = {}
    assert "epochs=20" in code
    exec(code.replace("epochs=20", "epochs=3"), said)
    assert isinstance(said["recipe"], Recipe)
    assert Path(said["result"]["checkpoint"]).is_file()


FILE = r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|toml|md|js|txt))`"


@pytest.mark.parametrize("page", [*NAMES, *(path.name for path in ROOT.glob("*.md")), *FOLDER_PAGES])
def test_files_that_a_page_names_are_there(page):
    path = ROOT / page
    missing = [name for name in re.findall(FILE, path.read_text()) if not _is_there(name, path)]
    assert missing == []


def _is_there(name: str, page: Path) -> bool:
    return (ROOT / name).is_file() or (page.parent / name).is_file() or Path(name).parts[0] in OTHERS


# --- Python -----------------------------------------------------------------------------------------------------------


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A folder with `photo.jpg`, in which the page's code runs."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")


@pytest.fixture
def random_s1(monkeypatch):
    """In place of every model, and of weights that would be downloaded."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: create("shvit_s1", **kwargs))


@pytest.mark.parametrize(("page", "blocks"), [(ROOT / "README.md", 1), (DOCS / "start" / "classify.md", 3)], ids=str)
def test_one_image_is_classified(page, blocks, photo, random_s1, capsys):
    found = python_blocks(page)
    assert len(found) == blocks
    values: dict = {}
    for code in found:
        exec(code.replace("(1, 448)", "").replace("img_size=256", "img_size=224"), values)
    assert len(capsys.readouterr().out.splitlines()) == (1 if blocks == 1 else 5)


def test_exported_file_runs_without_this_package(photo, mine, capsys):
    shutil.copyfile(mine, "pixels.onnx")
    (code,) = (code for code in python_blocks(DOCS / "start" / "app.md") if "onnxruntime" in code)
    assert "shvit." not in re.sub(r'"shvit\.\w+"', "", code)
    values: dict = {}
    exec(code, values)
    assert capsys.readouterr().out.startswith(LABELS)
    assert values["image"].size == (64, 64)


def test_labels_of_an_exported_file_are_those_of_its_thresholds(photo):
    weights = create_tiny(num_classes=4, depth=(1, 1, 1)).state_dict()
    write_checkpoint(weights, "m.safetensors", task_models.INFOS["multi_label"].metadata)
    run(["export", "onnx", "--checkpoint", "m.safetensors", "--raw-pixels", "--output", "pixels.onnx"])
    values: dict = {}
    for word in ("onnxruntime", "thresholds"):
        (code,) = (code for code in python_blocks(DOCS / "start" / "app.md") if word in code)
        exec(code, values)
    likely = dict(zip(task_models.LABELS, values["probabilities"][0], strict=True))
    assert values["thresholds"] == [*task_models.THRESHOLDS]
    assert values["found"] == [name for name, least in zip(likely, task_models.THRESHOLDS, strict=True)
                               if likely[name] >= least]  # fmt: skip
    assert values["spec"]["task"] == "multi_label"


def test_model_is_exported_verified_and_opened_in_python(photo, mine):
    """Of a small model, whose random weights leave the verdict open."""
    weights = Path("runs", "mine", "best_ema.safetensors")
    weights.parent.mkdir(parents=True)
    shutil.copyfile(mine.with_suffix(".safetensors"), weights)
    (code,) = python_blocks(DOCS / "start" / "export.md")
    values: dict = {}
    exec(code.replace('"shvit_s1"', '"tiny_vit"'), values)
    assert Path("mine.onnx").is_file()
    (code,) = (code for code in python_blocks(DOCS / "start" / "app.md") if "load_artifact" in code)
    exec(code, values)
    assert values["logits"].shape == (1, len(LABELS))
