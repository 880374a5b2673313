"""Image sizes: one number for a square, else height and width, from the command line, files and Python."""

import json

import numpy as np
import pytest
import timm
import torch
from pydantic import TypeAdapter, ValidationError
from timm.data import create_transform

from shvit import cli
from shvit.documents import to_json
from shvit.errors import InputError
from shvit.img_size import MAX_IMG_SIZE, ImgSize

WRONG = ("0x3", "224x", "x224", "abc", "1x2x3", 5000, "5000x3", 0, -1, "", "02x3", "2 x 3", "1_0", "１２", "2.0", 2.5,
         True, None, (), (1,), (1, 2, 3), ("a", 1), (1.0, 2), (True, 2), [[1, 2]], {},
         "9" * 10_000, "\x1b[2J")  # fmt: skip


@pytest.mark.parametrize(
    "given", ["64x96", "64X96", "64×96", (64, 96), [64, 96], torch.Size([64, 96]), np.array([64, 96]).tolist()]
)
def test_height_comes_first(given):
    size = ImgSize.of(given)
    assert (size.height, size.width, str(size), f"{size} px", size.plain) == (64, 96, "64x96", "64x96 px", [64, 96])


@pytest.mark.parametrize("given", ["64", 64, np.int64(64), (64, 64), "64x64"])
def test_square_is_one_number(given):
    size = ImgSize.of(given)
    assert (size, str(size), size.plain, size.is_square) == ((64, 64), "64", 64, True)


def test_ends_of_the_range():
    assert ImgSize.of(f"1x{MAX_IMG_SIZE}") == (1, 4096)


@pytest.mark.parametrize("given", WRONG)
def test_what_is_no_size_is_refused_in_one_line(given):
    with pytest.raises(InputError) as error:
        ImgSize.of(given, "--img-size")
    message = str(error.value)
    assert message.startswith("--img-size ")
    assert "is not an image size; give 1 to 4096 px as one number, such as 224, or as HEIGHTxWIDTH" in message
    assert "\n" not in message
    assert len(message) < 200
    with pytest.raises(ValidationError):
        TypeAdapter(ImgSize).validate_python(given)


def test_it_is_what_timm_takes_and_timms_order():
    image = timm.data.transforms.F.to_pil_image(torch.zeros(3, 50, 70))
    assert create_transform((3, *ImgSize.of("32x48")))(image).shape == (3, 32, 48)
    assert timm.create_model("test_vit", img_size=ImgSize.of("32x48"))(torch.zeros(1, 3, 32, 48)).shape == (1, 1000)


def test_json_has_one_number_for_a_square():
    content = {"a": ImgSize(64, 96), "b": [ImgSize(64, 64)], "c": (64, 96)}
    assert json.loads(to_json(content)) == {"a": [64, 96], "b": [64], "c": [64, 96]}


# --- the command line -------------------------------------------------------------------------------------------------

COMMANDS = {
    "info": ["shvit_s1"],
    "train": ["debug"],
    "eval": ["--data", "elpv"],
    "predict": ["x.png"],
    "export": ["onnx", "--output", "m.onnx"],
    "bench": [],
    "bench phone": [],
    "site": ["--output", "site"],
}


def parsed(name: str, options: list[str]):
    return cli._parse(name, options)


def size_of(command) -> ImgSize | None:
    return getattr(command, "recipe", command).img_size


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_it_as_one_word(name, capsys):
    assert size_of(parsed(name, [*COMMANDS[name], "--img-size", "64x96"])) == (64, 96)
    assert size_of(parsed(name, [*COMMANDS[name], "--img-size", "64"])) == (64, 64)
    assert size_of(parsed(name, [*COMMANDS[name], "--img-size=64×96"])) == (64, 96)
    with pytest.raises(SystemExit):
        parsed(name, [*COMMANDS[name], "--help"])
    shown = capsys.readouterr().out
    assert "INT|HxW" in shown
    assert "HEIGHTxWIDTH" in shown


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("word", ["0x3", "224x", "abc", "1x2x3", "5000"])
def test_what_is_no_size_is_refused_by_every_command(name, word, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["shvit", *name.split(), *COMMANDS[name], "--img-size", word])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"--img-size: {word} is not an image size; give 1 to 4096 px as one number, such as 224, or as HEIGHT" in line
    )


def test_sizes_in_any_number():
    words = ["coreml", "--output", "m.mlpackage", "--other-sizes"]
    assert parsed("export", [*words, "192", "64x96"]).other_sizes == ((192, 192), (64, 96))
    with pytest.raises(InputError, match=r"--other-sizes: 64x is not an image size; give 1 to 4096 px"):
        parsed("export", [*words, "192", "64x"])
