"""What the tests of data share."""

import io
import os
import subprocess

import pytest
from PIL import Image


@pytest.fixture
def no_programs(monkeypatch, tmp_path):
    """Fail where a program is started, and have files of relative names in a folder of their own."""

    monkeypatch.setattr("shvit.train.run.run_folder.git_revision", lambda _: "unknown")

    def started(*argv: object, **options: object) -> None:
        raise AssertionError(f"started {argv}")

    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "popen"), (os, "posix_spawn")):
        monkeypatch.setattr(module, name, started)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folders(tmp_path):
    """Class folders of 24 images."""
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        for number in range(24):
            Image.new("RGB", (20, 20), (10 * number, 0, 0)).save(tmp_path / "d" / name / f"{name}{number}.jpg")
    return tmp_path / "d"


def png(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), level).save(stream, "PNG")
    return stream.getvalue()
