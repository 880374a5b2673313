"""What is told of an error in one line, and modules that not every system has."""

import ast
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch
from timm.data import create_transform

from shvit.errors import InputError, first_line
from shvit.train.data.datasets import open_dataset
from shvit.train.data.eval_loader import Prepared, ignore_interrupt
from shvit.train.distributed import World
from shvit.train.recipe import Data, Recipe
from shvit.train.step.batch import collate
from shvit.train.step.loader import Augmented, TrainLoader
from tests import forks
from tests.conftest import ROOT

PACKAGES = ("shvit", "weights", "train", "export", "detection")
POSIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "crypt"}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n \n  two  \nthree"), "two"),
        (ValueError(""), "ValueError"),
        (AssertionError(), "AssertionError"),
        (RuntimeError("\n\n"), "RuntimeError"),
        (RuntimeError("Exception from src/core.cpp:84:\nException from src/a.cpp:8:\nno such file"), "no such file"),
        (KeyError("name"), "'name'"),
        (OSError(2, "No such file or directory"), "[Errno 2] No such file or directory"),
        (ValueError("x" * 500), "x" * 200),
    ],
)
def test_first_line_says_something_of_every_error(error, line):
    assert first_line(error) == line


def test_nobody_takes_the_first_line_by_hand():
    """`"".splitlines()[0]` is an IndexError, in the middle of telling another error."""
    by_hand = re.compile(r"str\(\w+\)(\.strip\(\))?\.splitlines\(\)(\[0\]| or )")
    assert by_hand.search("reason = str(error).splitlines()[0][:200]")
    found = [path.name for path in SOURCES if by_hand.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_a_library_that_says_nothing_is_one_line(monkeypatch, tmp_path):
    import onnxruntime

    from shvit.export.backends.onnx import onnx_session

    def refuse(*arguments, **options):
        raise RuntimeError

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(InputError, match=r"cannot open it \(RuntimeError\)"):
        onnx_session(b"")


# --- other systems ----------------------------------------------------------------------------------------------------


def test_no_module_needs_posix_to_be_imported():
    """Modules that only POSIX systems have are imported where they are used, and what they do is done without them."""
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not POSIX.intersection(name.partition(".")[0] for name in names), path


ELSEWHERE = """
import os, signal, sys
for name in {posix}:
    sys.modules[name] = None
import socket, torch, timm, torch.utils.tensorboard, torch.distributed  # what is asked is what our own code does
for name in ("SIGCHLD", "SIGUSR1", "SIGKILL", "SIGALRM"):
    delattr(signal, name)
for name in ("fork", "killpg", "setsid", "sched_setaffinity", "sched_getaffinity", "getuid", "sysconf"):
    delattr(os, name)
"""


def elsewhere(code: str, *words: object) -> str:
    """Runs code where what Windows does not have is missing; returns what it printed."""
    code = ELSEWHERE.format(posix=sorted(POSIX - {"posix"})) + code
    done = forks.run(*words, code=code)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_training_runs_without_what_windows_does_not_have(image_folder, tmp_path):
    code = """
from shvit.cli import run
print(run(["train", *sys.argv[1:]])["steps"])
"""
    words = ["debug", "--model", "test_resnet", "--img-size", "32", "--epochs", "1", "--batch-size", "16"]
    words += ["--data.workers", "0", "--data.root", image_folder, "--output", tmp_path / "run"]
    assert elsewhere(code, *words).splitlines()[-1] == "2"
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_a_folder_is_locked_without_fcntl_too(tmp_path):
    code = """
from pathlib import Path
from shvit.errors import InputError
from shvit.train.run.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
with folder.locked():
    try:
        with RunFolder(folder.path).locked():
            print("twice")
    except InputError as error:
        print(error)
with folder.locked():
    print("again")
"""
    first, second = elsewhere(code, tmp_path / "run").splitlines()
    assert "another run is active in it" in first
    assert second == "again"


def test_bench_does_without_affinity_and_getrusage():
    code = """
from shvit.export.bench.measure import pinned
from shvit.export.bench.cases import choose_cores
from shvit.export.backends import worker
from shvit.train.speed import _peak_memory_mb
with pinned(choose_cores(1), 1):
    worker.os.path.exists = lambda path: False
    print(choose_cores(1), worker.peak_memory(), _peak_memory_mb())
from shvit.cli import run
try:
    run(["bench", "--sweep"])
except ValueError as error:
    print(error)
"""
    first, second = elsewhere(code).splitlines()
    assert first == "[] None None"
    assert second == "--sweep measures the memory of processes, which this system does not report; leave it out"


def test_what_loaders_are_given_can_be_sent_to_workers(image_folder):
    """Windows and macOS start workers from nothing and send them what they need."""
    recipe = Recipe(img_size=32, batch_size=8, data=Data(root=image_folder, workers=0))
    dataset = open_dataset(image_folder, "train")
    loader = TrainLoader(recipe, dataset, World(0, 1, torch.device("cpu")), 1)
    augmented = Augmented(dataset, loader._transform_at, 0, tries=3)
    prepared = Prepared(dataset, create_transform((3, 32, 32)))
    again = pickle.loads(pickle.dumps(augmented))
    assert (again[0, 0][0] == augmented[0, 0][0]).all()
    assert torch.equal(pickle.loads(pickle.dumps(prepared))[0][0], prepared[0][0])
    pickle.dumps((collate, ignore_interrupt))


def test_signs_that_a_code_page_does_not_have_do_not_end_a_command():
    """A pipe on Windows is in cp1252, which has no →."""
    code = """
import sys, sysconfig
sys.argv = [sysconfig.get_path("scripts") + "/shvit", "list"]  # the program, which imports no torch by itself
from shvit import cli
cli.COMMANDS["list"] = cli.Entry("shvit.cli:show", "")
cli.show = lambda options, prog: print("model → file") or type("Shown", (), {"run": lambda self: {}})()
cli.program()
"""
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(b"\r\n" if os.linesep == "\r\n" else b"\n")[0] == b"model ? file"
