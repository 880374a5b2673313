"""The run folder: states that survive crashes, damage and full disks."""

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
import yaml

from shvit.errors import InputError
from shvit.train.data.splits import check_outside
from shvit.train.recipes import DEMO
from shvit.train.run.run_folder import RunFolder, git_revision
from shvit.weights.run_info import read_recipe_file
from tests.train.forked import SERVER, start


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run", keep=3)


def fill(folder: RunFolder, steps: range) -> None:
    for step in steps:
        folder.save_state({"step": step, "model": {"w": torch.full((100,), float(step))}})


def test_newest_states_are_kept_in_order(folder):
    folder.claim(DEMO, ["a"])
    fill(folder, range(1, 6))
    assert [path.name for path in folder.states] == ["last.pt", "last-1.pt", "last-2.pt"]
    assert [torch.load(path, weights_only=True)["step"] for path in folder.states] == [5, 4, 3]
    assert {path.name for path in folder.path.iterdir()} == {"recipe.yaml", *(path.name for path in folder.states)}


def test_state_comes_back_and_a_new_run_has_none(folder):
    assert folder.load_state(pytest.fail) is None
    fill(folder, range(1, 3))
    state = folder.load_state(pytest.fail)
    assert state["step"] == 2
    assert torch.equal(state["model"]["w"], torch.full((100,), 2.0))


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "missing", "other"])
def test_damaged_state_falls_back_to_the_one_before_and_says_so(folder, damage):
    fill(folder, range(1, 4))
    path = folder.path / "last.pt"
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "missing":  # a crash between two renames
        path.unlink()
    elif damage == "other":
        torch.save({"model": {}}, path)
    else:
        noisy = (
            content[:middle] + bytes(255 - byte for byte in content[middle : middle + 200]) + content[middle + 200 :]
        )
        path.write_bytes({"cut": content[:middle], "noise": noisy, "empty": b""}[damage])
    said: list[str] = []
    assert folder.load_state(said.append)["step"] == 2
    assert bool(said) == (damage != "missing")
    assert all("last.pt is damaged" in line and "resuming from last-1.pt, step 2" in line for line in said)


def test_nothing_readable_is_an_error(folder):
    fill(folder, range(1, 4))
    for path in folder.states:
        path.write_bytes(b"x")
    with pytest.raises(InputError, match=r"last\.pt is damaged .*last-2\.pt is damaged .*choose another --output"):
        folder.load_state(pytest.fail)


def test_state_with_code_in_it_does_not_run(folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    fill(folder, range(1, 3))
    torch.save({"step": 9, "model": Payload()}, folder.path / "last.pt")
    assert folder.load_state(lambda _: None)["step"] == 1
    assert not (tmp_path / "ran").exists()


def fill_the_disk(path: Path, messages) -> None:
    """Save a state and then one that is larger than files may be; put the error's message."""
    folder = RunFolder(path)
    folder.save_state({"step": 1, "model": {}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        folder.save_state({"step": 2, "model": {"w": torch.zeros(1_000_000)}})
    except InputError as error:
        messages.put(str(error))


def test_full_disk_is_one_line_and_keeps_what_was_there(tmp_path):
    """The system itself refuses the bytes: a limit on the size of files stands for a disk that is full."""
    messages = SERVER.SimpleQueue()
    process = start(fill_the_disk, tmp_path, messages)
    process.join()
    assert process.exitcode == 0
    assert "last.pt: cannot be written: File too large; make room" in messages.get()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1


def test_recipe_is_written_with_what_made_it(folder):
    folder.claim(DEMO, ["mono", "poly"])
    stored = yaml.safe_load((folder.path / "recipe.yaml").read_text())
    assert stored["recipe"] == DEMO.as_dict()
    assert stored["classes"] == ["mono", "poly"]
    assert stored["versions"]["torch"] == str(torch.__version__)
    assert stored["versions"].keys() >= {"shvit", "timm", "python", "git"}


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_recipe_of_a_path_that_is_not_utf_8_can_be_read_again(folder):
    recipe = replace(DEMO, data=replace(DEMO.data, root=Path(os.fsdecode(b"images\xff"))))
    folder.claim(recipe, ["a", "b"])
    folder.claim(recipe, ["a", "b"])
    assert read_recipe_file(folder.path / "recipe.yaml").classes == ("a", "b")


def test_folder_of_another_run_is_refused(folder):
    folder.claim(DEMO, ["a", "b"])
    folder.claim(replace(DEMO, data=replace(DEMO.data, workers=3)), ["a", "b"])
    with pytest.raises(InputError, match=r"holds a run that differs in epochs \(8 and 3\); choose another --output"):
        folder.claim(replace(DEMO, epochs=3), ["a", "b"])
    with pytest.raises(InputError, match="holds a run on other classes"):
        folder.claim(DEMO, ["a", "c"])
    (folder.path / "recipe.yaml").write_text("recipe: [")
    with pytest.raises(InputError, match="not readable as YAML"):
        folder.claim(DEMO, ["a", "b"])


def test_classes_are_the_same_however_their_accents_are_written(folder):
    folder.claim(DEMO, ["bar", "caf\u00e9"])
    folder.claim(DEMO, ["bar", "cafe\u0301"])
    with pytest.raises(InputError, match="other classes"):
        folder.claim(DEMO, ["bar", "cafe"])


def test_states_without_their_recipe_are_refused(folder):
    fill(folder, range(1, 3))
    with pytest.raises(InputError, match=r"holds last\.pt but no recipe\.yaml .* put that recipe\.yaml back, or"):
        folder.claim(DEMO, ["a", "b"])
    assert not (folder.path / "recipe.yaml").exists()


def test_other_images_are_refused_or_continued_on_request(folder):
    before, after = {"train": {"count": 96, "names_sha256": "a"}}, {"train": {"count": 288, "names_sha256": "b"}}
    folder.claim(DEMO, ["a", "b"], before)
    folder.claim(DEMO, ["a", "b"], before)
    with pytest.raises(InputError, match=r"other images \(96 train then, 288 train now\); .* --data\.changed continue"):
        folder.claim(DEMO, ["a", "b"], after)
    with pytest.raises(InputError, match=r"as many .* but with other names"):
        folder.claim(DEMO, ["a", "b"], {"train": {"count": 96, "names_sha256": "c"}})
    on_request = replace(DEMO, data=replace(DEMO.data, changed="continue"))
    folder.claim(on_request, ["a", "b"], after)
    folder.claim(DEMO, ["a", "b"], after)
    losses = dict.fromkeys(("lr", "train_loss", "grad_norm", "val_loss", "ema_loss", "top1", "ema_top1"), 1.0)
    folder.write_log([{"epoch": DEMO.epochs, **losses}])
    with pytest.raises(
        InputError, match=r"another --output, or start from its weights, --checkpoint .*best_ema\.safetensors"
    ):
        folder.claim(on_request, ["a", "b"], before)


def hold(path: Path, locked: Event) -> None:
    """Lock a run folder for a minute, with a child as a loader's worker is."""
    with RunFolder(path).locked():
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        locked.set()
        time.sleep(60)


def test_two_runs_in_one_folder_are_kept_apart_and_a_killed_one_bars_nobody(folder):
    locked = SERVER.Event()
    holder = start(hold, folder.path, locked)
    try:
        assert locked.wait(60)
        with pytest.raises(InputError, match="another run is active in it"), folder.locked():
            pass
        holder.kill()
        holder.join()
        with folder.locked():  # though the worker lives on
            os.killpg(holder.pid, 0)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.join()


def test_revision_is_gits_own_and_unknown_elsewhere(tmp_path):
    def git(*argv: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *argv]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert git_revision(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "other.txt").write_text("x")
    git("add", ".")
    git("commit", "-qm", "x")
    assert git_revision(tmp_path) == "unknown"
    (tmp_path / "recipe.py").write_text("x")
    git("add", ".")
    git("commit", "-qm", "y")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "recipe.py").write_text("z")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "+"


@pytest.mark.parametrize(
    ("folders", "output", "refused"),
    [
        (["cat", "dog"], "runs/mine", True),
        (["cat", "dog"], "", True),
        (["cat", "dog"], "../runs", False),
        (["train/cat", "val/cat"], "runs/mine", False),
        (["train/cat", "val/cat"], "train/runs", True),
        (["train/cat", "val/cat"], "", True),
    ],
)
def test_run_folder_is_no_class_of_the_images(folders, output, refused, tmp_path):
    for name in folders:
        (tmp_path / "images" / name).mkdir(parents=True)
    root = tmp_path / "images"
    if not refused:
        check_outside(root / output, root)
        return
    with pytest.raises(InputError, match="whose folders are classes of images; choose another"):
        check_outside(root / output, root)
