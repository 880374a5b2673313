"""The cache of downloads where the environment names something odd, and its records as others wrote them."""

import os
from pathlib import Path

import pytest

from shvit.cli import run
from shvit.errors import InputError
from shvit.weights.cache import cache_folder
from shvit.weights.manifest import read_manifest

COMMANDS = (
    ["weights", "list"],
    ["weights", "check"],
    ["weights", "pull", "shvit_s1.in1k", "--url", "http://127.0.0.1:9/x"],
)
HASH = "0" * 64


def fails(argv) -> str:
    with pytest.raises(InputError) as failed:
        run(argv)
    assert "\n" not in str(failed.value)
    return str(failed.value)


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: argv[1])
@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("~nobody-of-this-name/x", "SHVIT_CACHE=~nobody-of-this-name/x: cannot be found"),
        ("file", "is a file, and the cache of downloads is to be there"),
        ("fifo", "is a FIFO"),
        ("loop", "cannot be read: "),
        ("a" * 5000, "File name too long"),
        ("/dev/null", "is a device"),
    ],
    ids=lambda text: text[:12],
)
def test_a_cache_that_is_no_folder_is_one_line(argv, folder, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    os.mkfifo("fifo")
    Path("loop").symlink_to("loop")
    monkeypatch.setenv("SHVIT_CACHE", folder)
    assert said in fails(argv)
    assert Path("file").read_text() == "x"


def test_a_user_without_a_home_is_told_so(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SHVIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InputError, match=r"the home folder: cannot be found .* set SHVIT_CACHE to a folder"):
        cache_folder()


@pytest.mark.parametrize("folder", [".", "new/deep", "übung"])
def test_sound_caches_are_taken(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHVIT_CACHE", folder)
    assert run(["weights", "list"])["cache"] == str(Path(folder))
    assert list(tmp_path.iterdir()) == []


RECORD = f'{{"sha256": "{HASH}", "size_bytes": 1, "url": "u", "date": "d"'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 40_000, "nested too deeply"),
        ("[" * 100 + "]" * 100, "nested more than"),
        ("", "not readable as JSON"),
        ("\x00", "not readable as JSON"),
        ("[]", "should be"),
        ("1" * 5000, "digits"),
        ("NaN", "NaN"),
        ('{"a": 1, "a": 2}', "stands twice"),
        ('{"a": {}}', "missing"),
        (f'{{"a": {RECORD}, "more": 1}}}}', "unknown field 'a.more'"),
        (f'{{"a": {RECORD}}}}}'.replace('"size_bytes": 1', '"size_bytes": "1"'), "a.size_bytes is '1'"),
        (f'{{"a": {RECORD}}}}}'.replace('"size_bytes": 1', '"size_bytes": 1e999'), "too large"),
        (f'{{"a": {RECORD}}}}}'.replace(HASH, "../x"), "is not a SHA-256"),
        ("x" * (2 << 20), "is larger than"),
    ],
    ids=lambda text: text[:20],
)
def test_a_lock_file_that_is_none_is_one_line(text, said, tmp_path, monkeypatch):
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path))
    (tmp_path / "lock.json").write_text(text)
    message = fails(["weights", "list"])
    assert said in message
    assert message.endswith("restore the file, or remove it to trust anew")


@pytest.mark.parametrize("kind", ["folder", "fifo", "loop"])
def test_a_lock_file_that_is_something_else_is_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path))
    lock = tmp_path / "lock.json"
    {"folder": lock.mkdir, "fifo": lambda: os.mkfifo(lock), "loop": lambda: lock.symlink_to(lock)}[kind]()
    assert "lock.json" in fails(["weights", "list"])


@pytest.mark.parametrize("text", ["[" * 40_000, "a = " + "[" * 40_000, "\xff", "checkpoint = 1", "[[checkpoint]]"])
def test_a_manifest_that_is_none_is_one_line(text, tmp_path):
    (tmp_path / "manifest.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"manifest\.toml"):
        read_manifest(tmp_path / "manifest.toml")


# --- convert, and pull's copy -----------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path) -> Path:
    """What no command gets as far as to read."""
    (tmp_path / "source.pth").write_bytes(b"PK")
    return tmp_path / "source.pth"


def make(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(path.with_name("other.pth"))
    elif kind == "other":
        path.write_text("dear diary")


@pytest.mark.parametrize("command", ["convert", "pull"])
@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("folder", "x.pth", "is a folder"),
        ("fifo", "x.pth", "is a FIFO"),
        ("link", "x.pth", "is a symbolic link"),
        ("other", "x.pth", "is there already and is not a .pth file"),
        ("none", "x.onnx", "x.onnx"),
        ("none", "x", "x: "),
        ("none", "a" * 300 + ".pth", "File name too long"),
    ],
)
def test_outputs_are_refused_before_anything_is_read(command, kind, name, said, source, tmp_path, monkeypatch):
    monkeypatch.setattr("shvit.weights.layouts.convert", None)
    monkeypatch.setattr("shvit.weights.main.obtain", None)
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path / "cache"))
    make(kind, tmp_path / name) if kind != "none" else None
    before = sorted(tmp_path.iterdir())
    output = str(tmp_path / name)
    if command == "convert":
        message = fails(["weights", "convert", str(source), output, "--to", "timm"])
    else:
        message = fails(["weights", "pull", "shvit_s1", "--output", output])
    assert said in message
    assert sorted(tmp_path.iterdir()) == before
    assert kind != "other" or (tmp_path / name).read_text() == "dear diary"


@pytest.mark.parametrize("name", ["source.pth", "./source.pth", "folder/../source.pth", "hard.pth", "soft.pth"])
def test_the_source_is_not_the_output(name, source, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "hard.pth").hardlink_to(source)
    (tmp_path / "soft.pth").symlink_to(source)
    message = fails(["weights", "convert", str(source), f"{tmp_path}/{name}", "--to", "timm"])
    assert "is the source too" in message
    assert source.read_bytes() == b"PK"


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "none"])
def test_a_source_that_is_none_is_one_line(kind, tmp_path):
    make(kind, tmp_path / "x.pth") if kind != "none" else None
    fails(["weights", "convert", str(tmp_path / "x.pth"), str(tmp_path / "y.pth"), "--to", "timm"])
    assert not (tmp_path / "y.pth").exists()
