"""Files appear whole or not at all."""

import errno
import hashlib

import pytest

from shvit.cli import run
from shvit.errors import InputError
from shvit.files import sha256, write_whole


def test_file_appears_only_at_the_end(tmp_path):
    target = tmp_path / "new" / "a.bin"
    with write_whole(target) as partial:
        partial.write_bytes(b"half")
        assert not target.exists()
        assert partial.suffix == ".bin"
        partial.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail():
        with write_whole(target) as partial:
            partial.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_replaces_a_folder_whole(tmp_path):
    target = tmp_path / "a.mlpackage"
    for name in ("old", "new"):
        with write_whole(target) as partial:
            partial.mkdir()
            (partial / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_file_never_replaces_a_folder(tmp_path):
    target = tmp_path / "photographs.onnx"
    target.mkdir()
    (target / "precious").write_text("")

    def overwrite():
        with write_whole(target) as partial:
            partial.write_text("file")

    with pytest.raises(InputError, match="is a folder"):
        overwrite()
    assert (target / "precious").exists()
    assert list(tmp_path.iterdir()) == [target]


def test_folder_never_replaces_a_file(tmp_path):
    target = tmp_path / "precious.mlpackage"
    target.write_text("precious")

    def overwrite():
        with write_whole(target) as partial:
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
        with write_whole(tmp_path / "a.bin") as partial:
            partial.write_text("file")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(InputError, match=r"a\.bin: cannot be written: Permission denied"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    def write():
        with write_whole(tmp_path / "file" / "a.bin"):
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
def test_a_file_in_place_of_the_output_folder_is_said_before_any_work(tmp_path, words, photographs):
    file = tmp_path / "results"
    file.write_text("mine")
    words = [word.format(file=file, root=photographs) for word in words]
    with pytest.raises(InputError, match=r"results: (is a file; choose another|cannot be written)"):
        run(words if "--output" in words else [*words, "--output", str(file)])
    assert file.read_text() == "mine"


def test_read_only_file_system_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"a\.bin: cannot be written: Read-only"), write_whole(tmp_path / "a.bin"):
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
