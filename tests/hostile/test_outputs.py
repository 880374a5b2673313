"""Outputs replace what an earlier run wrote, and nothing else; a full disk and a kill leave nothing half-written."""

import errno
import os
from pathlib import Path

import pytest
import torch

from shvit import cli
from shvit.checkpoint import write_checkpoint
from shvit.errors import InputError
from shvit.export import pipeline as formats
from shvit.files import atomic_write, needs_room, partial_name, scratch_folder
from tests.conftest import create_tiny

from .artifacts import class_folders, write_onnx


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "ck.safetensors"
    write_checkpoint(create_tiny(num_classes=3).state_dict(), path)
    return path


def export(kind: str, output: Path, checkpoint: Path, *options: object):
    words = ["export", kind, "--model", "tiny_vit", "--checkpoint", checkpoint, "--img-size", 64, "--output", output]
    return cli.run([str(word) for word in (*words, *options)])


def create_contents(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): f"→ {path.readlink()}" if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def _notes(tmp: Path) -> None:
    (tmp / "m.mlpackage").mkdir()
    (tmp / "m.mlpackage" / "thesis.txt").write_text("precious")


def _package_with_notes(tmp: Path) -> None:
    (tmp / "m.mlpackage" / "Data").mkdir(parents=True)
    (tmp / "m.mlpackage" / "Manifest.json").write_text("{}")
    (tmp / "m.mlpackage" / "Data" / "thesis.txt").write_text("precious")


def _link(name: str, target: str):
    def make(tmp: Path) -> None:
        (tmp / target).mkdir() if target.endswith("d") else (tmp / target).write_text("precious")
        (tmp / name).symlink_to(tmp / target)

    return make


def _text(name: str, text: str = "precious"):
    def make(tmp: Path) -> None:
        (tmp / name).write_text(text)

    return make


def _fifo(tmp: Path) -> None:
    os.mkfifo(tmp / "m.onnx")


EXPORTS = {
    "folder": ("coreml", "m.mlpackage", _notes),
    "package with notes": ("coreml", "m.mlpackage", _package_with_notes),
    "file for a package": ("coreml", "m.mlpackage", _text("m.mlpackage")),
    "link to a folder": ("coreml", "m.mlpackage", _link("m.mlpackage", "real.d")),
    "link to a file": ("onnx", "m.onnx", _link("m.onnx", "real.txt")),
    "dangling link": ("onnx", "m.onnx", lambda tmp: (tmp / "m.onnx").symlink_to(tmp / "nowhere")),
    "text as onnx": ("onnx", "m.onnx", _text("m.onnx")),
    "someone's bin": ("openvino", "m.xml", _text("m.bin")),
    "folder as onnx": ("onnx", "m.onnx", lambda tmp: (tmp / "m.onnx").mkdir()),
    "someone's certificate": ("onnx", "m.onnx", _text("m.onnx.certificate.json")),
    "someone's JSON": ("onnx", "m.onnx", _text("m.onnx.certificate.json", '{"mine": 1}')),
    "linked certificate": ("onnx", "m.onnx", _link("m.onnx.certificate.json", "real.txt")),
    "fifo": ("onnx", "m.onnx", _fifo),
    "too long": ("onnx", "a" * 260 + ".onnx", lambda tmp: None),
    "inside a file": ("onnx", "f/m.onnx", _text("f")),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_export_replaces_nothing_that_is_not_its_own(tmp_path, checkpoint, monkeypatch, case):
    kind, name, make = EXPORTS[case]
    make(tmp_path)
    before = create_contents(tmp_path)
    monkeypatch.setattr(formats, "certify", lambda *_, **__: pytest.fail("work was done first"))
    with pytest.raises(InputError) as error:
        export(kind, tmp_path / name, checkpoint)
    assert "\n" not in str(error.value)
    assert create_contents(tmp_path) == before


@pytest.mark.parametrize("option", ["labels", "images", "calibration"])
def test_export_writes_over_nothing_that_it_reads(tmp_path, checkpoint, option):
    images = class_folders(tmp_path / "d")
    (tmp_path / "m.onnx").write_bytes(b"\x08")
    given = tmp_path / "m.onnx" if option == "labels" else images
    output = given if option == "labels" else images / "a" / "m.onnx"
    before = create_contents(tmp_path)
    more = ("--precision", "int8") if option == "calibration" else ()
    with pytest.raises(InputError, match=r"is what --labels reads|is inside of"):
        export("onnx", output, checkpoint, f"--{option}", given, *more)
    assert create_contents(tmp_path) == before


EVALS = {
    "accuracy": ("out", _text("accuracy.json", '{"mine": 1}')),
    "list": ("out", _text("accuracy.json", "[1]")),
    "picture": ("out", _text("confusion.png")),
    "inside the data": ("d/results", lambda folder: None),
    "a class folder": ("d/a", lambda folder: None),
    "a file": ("d/a/0.png", None),
}


@pytest.mark.parametrize("case", EVALS)
def test_eval_replaces_nothing_that_is_not_its_own(tmp_path, case):
    name, make = EVALS[case]
    data, output = class_folders(tmp_path / "d"), tmp_path / name
    if make:
        output.mkdir(parents=True, exist_ok=True)
        make(output)
    path = write_onnx(tmp_path / "m.onnx")
    before = create_contents(tmp_path)
    with pytest.raises(InputError, match="--output"):
        cli.run(["eval", "--artifact", str(path), "--data", str(data), "--output", str(output)])
    assert create_contents(tmp_path) == before


@pytest.mark.parametrize("name", ["bench.json", "report.html", "bench.png"])
def test_bench_replaces_no_report_of_others(tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(InputError, match=f"holds {name}, which no earlier run"):
        cli.run(["bench", "--models", "tiny_vit", "--output", str(tmp_path)])


@pytest.mark.parametrize("name", ["index.html", "_headers", "measure.js"])
def test_site_replaces_no_page_of_others(tmp_path, name):
    (tmp_path / name).write_text("<title>my home page</title>")
    with pytest.raises(InputError, match=f"{name}: is there already, and .* is not a folder of `shvit site`"):
        cli.run(["site", "--models", "tiny_vit", "--output", str(tmp_path)])


def test_demo_replaces_no_page_of_others(tmp_path):
    (tmp_path / "report.html").write_text("<title>my home page</title>")
    with pytest.raises(InputError, match=r"report\.html"):
        cli.run(["demo", "--output", str(tmp_path)])


def test_its_own_is_replaced(tmp_path):
    data, path = class_folders(tmp_path / "d"), write_onnx(tmp_path / "m.onnx")
    for _ in range(2):
        cli.run(["eval", "--artifact", str(path), "--data", str(data), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "accuracy.json").exists()


# --- full disks, and ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 101440 vs 101328"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
    ids=str,
)
def test_a_full_disk_is_one_line_whatever_a_library_raises(tmp_path, raised):
    def write(path: Path) -> None:
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise raised

    with pytest.raises(InputError, match=r"cannot be written: .*make room"):
        write(tmp_path / "m.onnx")
    assert create_contents(tmp_path) == {}


def test_a_full_disk_is_found_out_where_no_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 0}))

    def work() -> None:
        with needs_room(tmp_path / "x"):
            raise RuntimeError

    with pytest.raises(InputError, match="No space left"):
        work()


def test_another_fault_is_none_of_the_disk(tmp_path):
    def work() -> None:
        with needs_room(tmp_path / "x"):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        work()


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot bound the size of a file")
def test_a_checkpoint_does_not_fit(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for name in ("m.pth", "m.safetensors"):
            with pytest.raises(InputError, match="cannot be written"):
                write_checkpoint({"weight": torch.zeros(100_000)}, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert create_contents(tmp_path) == {}


def test_folders_of_killed_exports_are_cleared_away(tmp_path, monkeypatch):
    output = tmp_path / "m.onnx"
    with monkeypatch.context() as killed:
        killed.setattr(os, "getpid", lambda: 2**22 + 1)  # of no process
        left = partial_name(output), partial_name(output.with_suffix(".parts"))
    left[0].write_text("half")
    (left[1] / "tmp").mkdir(parents=True)
    (left[1] / "tmp" / "m.onnx").write_text("half")
    with atomic_write(output) as partial, scratch_folder(output) as folder:
        assert len([*tmp_path.iterdir()]) == 1
        assert folder.is_dir()
        partial.write_bytes(b"\x08whole")
    assert [*create_contents(tmp_path)] == ["m.onnx"]
    assert len([*tmp_path.iterdir()]) == 1
