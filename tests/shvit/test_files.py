"""Files appear whole or not at all."""

import errno
import hashlib
import os
import socket
import subprocess
import sys

import pytest

from shvit.cli import run
from shvit.errors import InputError
from shvit.files import (
    atomic_write,
    check_file,
    is_file,
    is_folder,
    open_file,
    partial_name,
    read_bytes,
    read_text,
    sha256,
)


def test_file_appears_only_at_the_end(tmp_path):
    target = tmp_path / "new" / "a.bin"
    with atomic_write(target) as partial:
        partial.write_bytes(b"half")
        assert not target.exists()
        assert partial.suffix == ".bin"
        partial.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.dat"
    target.write_bytes(b"old")

    def fail():
        with atomic_write(target) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_replaces_a_folder_whole(tmp_path):
    target = tmp_path / "a.mlpackage"
    for name in ("old", "new"):
        with atomic_write(target) as partial:
            make_package(partial, name)
    assert (target / "Data/com.apple.CoreML/weights/weight.bin").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def make_package(folder, weights="weights"):
    (folder / "Data/com.apple.CoreML/weights").mkdir(parents=True)
    (folder / "Data/com.apple.CoreML/model.mlmodel").write_text("model")
    (folder / "Data/com.apple.CoreML/weights/weight.bin").write_text(weights)
    (folder / "Manifest.json").write_text("{}")
    (folder / ".DS_Store").write_text("left by a file manager")


def test_file_never_replaces_a_folder(tmp_path):
    target = tmp_path / "images.onnx"
    target.mkdir()
    (target / "precious").write_text("")

    def overwrite():
        with atomic_write(target) as partial:
            partial.write_text("file")

    with pytest.raises(InputError, match="is a folder"):
        overwrite()
    assert (target / "precious").exists()
    assert list(tmp_path.iterdir()) == [target]


def test_folder_never_replaces_a_file(tmp_path):
    target = tmp_path / "precious.mlpackage"
    target.write_text("precious")

    def overwrite():
        with atomic_write(target) as partial:
            partial.mkdir()
            (partial / "new").write_text("new")

    with pytest.raises(InputError, match=r"precious\.mlpackage: is a file; choose another name"):
        overwrite()
    assert target.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [target]


def test_renaming_that_fails_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EACCES, "Permission denied")

    def write():
        with atomic_write(tmp_path / "a.bin") as partial:
            partial.write_text("file")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(InputError, match=r"a\.bin: cannot be written: Permission denied"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    def write():
        with atomic_write(tmp_path / "file" / "a.bin"):
            pass

    with pytest.raises(InputError, match=r"file.a\.bin: cannot be written"):
        write()


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "--checkpoint", "none.pt", "--data", "none"],
        ["export", "onnx", "--output", "{file}/a.onnx"],
        ["export", "all", "--checkpoint", "none.pt"],
        ["bench"],
        ["bench", "phone", "--output", "{file}/below"],
        ["bench", "import", "none.json"],
        ["site"],
        ["demo"],
        ["detect", "predict", "retinanet_shvit-s1_fpn_1x_coco.py", "--checkpoint", "none.pt"],
        ["train", "debug", "--data.root", "{root}"],
    ],
)
def test_a_file_in_place_of_the_output_folder_is_said_before_any_work(tmp_path, words, image_folder):
    file = tmp_path / "results"
    file.write_text("mine")
    words = [word.format(file=file, root=image_folder) for word in words]
    with pytest.raises(InputError, match=r"results: (is a file; choose another|cannot be written)"):
        run(words if "--output" in words else [*words, "--output", str(file)])
    assert file.read_text() == "mine"


def test_read_only_file_system_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"a\.bin: cannot be written: Read-only"), atomic_write(tmp_path / "a.bin"):
        pytest.fail("the body ran")


def test_hash_is_hashlibs(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    folder = tmp_path / "package"
    (folder / "Data").mkdir(parents=True)
    (folder / "Data" / "weights").write_bytes(b"1")
    before = sha256(folder)
    for left in (".DS_Store", "Data/._weights", "Data/Thumbs.db"):  # by file managers that looked into it
        (folder / left).write_bytes(b"x")
    assert sha256(folder) == before
    (folder / "Data" / "more").write_bytes(b"x")
    assert sha256(folder) != before


def test_package_of_links_has_the_hash_of_what_they_lead_to(tmp_path):
    """As in the cache of the Hugging Face hub; a changed weight is seen wherever it lies."""
    make_package(tmp_path / "a.mlpackage")
    before = sha256(tmp_path / "a.mlpackage")
    (tmp_path / "a.mlpackage/Data").rename(tmp_path / "elsewhere")
    (tmp_path / "a.mlpackage/Data").symlink_to(tmp_path / "elsewhere")
    model = tmp_path / "elsewhere/com.apple.CoreML/model.mlmodel"
    model.rename(tmp_path / "blob")
    model.symlink_to(tmp_path / "blob")
    assert sha256(tmp_path / "a.mlpackage") == before
    (tmp_path / "elsewhere/com.apple.CoreML/weights/weight.bin").write_text("changed")
    assert sha256(tmp_path / "a.mlpackage") != before


def test_links_that_lead_back_are_said(tmp_path):
    make_package(tmp_path / "a.mlpackage")
    (tmp_path / "a.mlpackage/Data/again").symlink_to(tmp_path / "a.mlpackage")
    with pytest.raises(InputError, match="a link leads back"):
        sha256(tmp_path / "a.mlpackage")


# --- what is not ours is not replaced ---------------------------------------------------------------------------------

PRECIOUS = b"a thesis"


def user_file(path):
    path.write_bytes(PRECIOUS)


def user_folder(path):
    path.mkdir()
    (path / "thesis.txt").write_bytes(PRECIOUS)


def folder_of_a_tool(path):
    (path / ".git").mkdir(parents=True)


def package_and_more(path):
    make_package(path)
    (path / "Data/com.apple.CoreML/weights/thesis.txt").write_bytes(PRECIOUS)


def link(path):
    (path.parent / "elsewhere").write_bytes(PRECIOUS)
    path.symlink_to(path.parent / "elsewhere")


def dangling_link(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("a.onnx", user_file, "is not a .onnx file"),
        ("a.json", user_file, "is not a .json file"),
        ("a.safetensors", user_file, "is not a .safetensors file"),
        ("a.pth", user_file, "is not a .pth file"),
        ("a.xml", user_file, "is not a .xml file"),
        ("a.bin", user_file, "without the .xml or .param file"),
        ("a.png", user_file, "is not a .png file"),
        ("a.html", user_file, "is not a .html file"),
        ("a.onnx", user_folder, "is a folder"),
        ("a.mlpackage", user_folder, "other things than a mlpackage"),
        ("a.mlpackage", folder_of_a_tool, "other things than a mlpackage"),
        ("a.mlpackage", package_and_more, "other things than a mlpackage"),
        ("a.onnx", link, "symbolic link"),
        ("a.mlpackage", link, "symbolic link"),
        ("a.onnx", dangling_link, "symbolic link"),
        ("a.onnx", os.mkfifo, "is a FIFO"),
    ],
)
def test_what_another_program_wrote_is_not_replaced(tmp_path, name, make, reason):
    target = tmp_path / name
    make(target)
    before = sorted(tmp_path.rglob("*"))

    def write():
        with atomic_write(target):
            pytest.fail("the body ran")

    with pytest.raises(InputError, match=f"{name}: .*{reason}"):
        write()
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_bytes() == PRECIOUS for path in before if path.name in ("thesis.txt", "elsewhere"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.onnx", b"\x08\x0a"),
        ("a.json", b'{"a": 1}'),
        ("a.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
        ("a.pth", b"PK\x03\x04"),
        ("a.png", b"\x89PNG\r\n"),
        ("a.txt", b"any"),
        ("a.onnx", b""),
    ],
)
def test_what_a_command_wrote_is_replaced(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with atomic_write(tmp_path / name) as partial:
        partial.write_bytes(b"new")
    assert (tmp_path / name).read_bytes() == b"new"


def test_what_killed_processes_left_is_cleared_away(tmp_path):
    """And nothing else: not the file of a process that lives, of another machine, or of a user."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    target = tmp_path / "a[1].onnx"
    own = partial_name(target).name
    left = [own.replace(str(os.getpid()), str(dead.pid)), own.replace(str(os.getpid()), str(2**40))]
    kept = [
        own.replace(str(os.getpid()), str(os.getppid())),  # lives
        f".a[1].{dead.pid}-00000000.partial.onnx",  # of another machine, just now
        f".a[1].{dead.pid}.onnx",
        left[0].replace(".onnx", ".xml"),
        left[0].replace("a[1]", "b"),
    ]
    for name in (*left, *kept):
        (tmp_path / name).write_bytes(b"half")
    with atomic_write(target) as partial:
        partial.write_bytes(b"\x08whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([target.name, *kept])
    aged = tmp_path / kept[1]
    os.utime(aged, (1e9, 1e9))
    with atomic_write(target) as partial:
        partial.write_bytes(b"\x08whole")
    assert not aged.exists()


# --- what is there ----------------------------------------------------------------------------------------------------


def loop(path):
    path.symlink_to(path)


def socket_file(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("a", os.mkfifo, "is a FIFO"),
        ("a", socket_file, "is a socket"),
        ("a", loop, "Too many levels of symbolic links"),
        ("a" * 300, lambda path: None, "File name too long"),
        ("a\0b", lambda path: None, "null"),
        ("/dev/null", lambda path: None, "is a device"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_is_not_waited_for(tmp_path, monkeypatch, name, make, reason):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    make(path)
    for ask in (is_file, is_folder, check_file, open_file, sha256, lambda path: read_text(path, 100)):
        with pytest.raises(InputError, match=reason):
            ask(path)


def test_folder_that_may_not_be_entered_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.stat", refuse)  # root may enter any
    with pytest.raises(InputError, match="a: cannot be read: Permission denied"):
        is_file(tmp_path / "a")


def test_what_is_there_is_told(tmp_path):
    (tmp_path / "a").write_bytes("\ufeffgrün".encode())
    assert is_file(tmp_path / "a")
    assert is_folder(tmp_path)
    assert not is_file(tmp_path / "none")
    assert not is_file(tmp_path / "a" / "below")
    assert read_text(tmp_path / "a", 100) == "grün"
    with pytest.raises(InputError, match="is larger than"):
        read_bytes(tmp_path / "a", 3)
    with pytest.raises(InputError, match="no such file"):
        check_file(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder"):
        open_file(tmp_path)
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8"):
        read_text(tmp_path / "a", 100)
