"""How a command ends, whatever happens in it, and what of a file's names reaches a terminal."""

import errno
import json
import os
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.table import Table

from shvit import cli, terminal
from shvit.errors import InputError, printable
from shvit.files import scratch_folder

PROGRAM = Path(sysconfig.get_path("scripts")) / "shvit"


@dataclass(frozen=True)
class Failing:
    """A command that raises."""

    def run(self) -> dict:
        raise RuntimeError


@pytest.fixture
def ends(monkeypatch, capsys):
    """Exit status and stderr of a command that raises an error, or returns a result."""
    monkeypatch.setitem(cli.COMMANDS, "verify", cli.Entry(f"{__name__}:Failing", ""))

    def call(raised: BaseException | dict, *argv: str) -> tuple[int, str, str]:
        def run(self) -> dict:
            if isinstance(raised, dict):
                return raised
            raise raised

        monkeypatch.setattr(Failing, "run", run)
        monkeypatch.setattr(sys, "argv", ["shvit", "verify", *argv])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyError("main"), 70, "internal error: KeyError: 'main'; please report it, with what --debug adds"),
        (AssertionError(), 70, "internal error: AssertionError: AssertionError; please"),
        (RecursionError("deep"), 70, "internal error: RecursionError: deep; please"),
        (RuntimeError("\x1b[2J\nmore"), 70, "internal error: RuntimeError: �[2J; please"),
        (MemoryError(), 2, "there is not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "d/x"), 2, "d/x: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 9), 2, "aaaaaaaaa: File name too long"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (InputError("a.onnx:\n no model"), 2, "a.onnx:  no model"),
    ],
)
def test_every_error_is_one_line(ends, error, status, line):
    code, out, err = ends(error)
    assert (code, out) == (status, "")
    assert err.startswith(f"shvit verify: {line}")
    assert len(err.splitlines()) == 1
    assert "Traceback" in ends(error, "--debug")[2]


def test_result_has_no_number_that_json_lacks(ends):
    code, out, _ = ends({"loss": float("nan"), "ratio": [float("inf"), 1.5]})
    assert code == 0
    assert out == '{"loss": null, "ratio": [null, 1.5]}\n'


# --- stdout and signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["weights", "list"], ["--help"], ["--version"]])
@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        (">&-", 0, ""),
        (">/dev/full", 1, "stdout cannot be written: No space left on device"),
        ("2>&- >/dev/null", 0, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_stdout_that_is_closed_or_full_ends_quietly(argv, redirection, status, said):
    if argv == ["weights", "list"] and "full" in redirection:
        status = 2  # in the middle of a command
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", PROGRAM, *argv], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert len(done.stderr.splitlines()) == (1 if said else 0)
    assert not said or "No space left on device" in done.stderr


def test_encoding_without_a_sign_has_a_mark_in_its_place():
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([PROGRAM, "train", "--help"], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"RECIPE ?\n" in done.stdout


TERMINATED = """
import os, signal, sys, sysconfig
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # below nohup it is ignored, and the child would wait for ever
sys.argv = [sysconfig.get_path("scripts") + "/shvit", "list"]
from pathlib import Path
from shvit import cli, files

class Command:
    def run(self):
        with files.atomic_write(Path("a.txt")) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), {signal})
            signal.pause()

cli.COMMANDS["list"] = cli.Entry("shvit.cli:command", "")
cli.command = lambda options, prog: Command()
cli.program()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signal_leaves_nothing_half_written(tmp_path, name):
    number = getattr(signal, name)
    code = TERMINATED.format(signal=int(number))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")
    assert list(tmp_path.iterdir()) == []


def test_next_command_clears_away_what_a_kill_left(tmp_path):
    code = TERMINATED.format(signal=int(signal.SIGKILL))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.read_text() for path in tmp_path.iterdir()] == ["half"]
    from shvit.files import atomic_write

    with atomic_write(tmp_path / "a.txt") as partial:
        partial.write_text("whole")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_webdataset_may_run_nothing_in_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shvit", "--version"])
    monkeypatch.setenv("WDS_SECURE", "")
    monkeypatch.delenv("WDS_SECURE")
    cli.program()
    assert os.environ["WDS_SECURE"] == "1"
    assert capsys.readouterr().out.startswith("shvit ")


# --- names on a terminal ----------------------------------------------------------------------------------------------

NAMES = {
    "\x1b]0;PWNED\x07\x1b[2Jx.jpg": "�]0;PWNED��[2Jx.jpg",
    "l\nshvit train: all is well.jpg": "l shvit train: all is well.jpg",
    "a\rb\u2028c": "a b�c",
    "\u202egpj.exe": "�gpj.exe",
    "\x9b31m": "�31m",
    "half \ud800": "half �",
    "猫 の 写真　一 é ü 👩‍🔬 क्‍ष": "猫 の 写真　一 é ü 👩‍🔬 क्‍ष",
    "[red]not markup[/red]": "[red]not markup[/red]",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_reach_a_terminal_as_one_harmless_line(capsys, name):
    assert printable(name) == NAMES[name]
    console = terminal.console()
    console.print(name, soft_wrap=True)
    table = Table("name", "n")
    table.add_row(name, "1")
    console.print(table)
    terminal.report(name)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == NAMES[name]
    assert all(each.isprintable() or each in "\n　‍" for each in captured.out + captured.err)
    assert captured.err == f"{NAMES[name]}\n"
    assert json.loads(cli.to_json(name)) == name


def test_temporary_folders_of_killed_processes_are_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("shvit.files._lives", lambda pid: pid != 4_000_000)
    with scratch_folder() as living:
        dead = tmp_path / living.name.replace(str(os.getpid()), "4000000", 1)
        others = [tmp_path / "shvit.mine.partial.x", tmp_path / "shvit-photos"]
        for folder in (dead, *others):
            folder.mkdir()
            (folder / "file").write_text("x")
        with scratch_folder():
            assert living.is_dir()
            assert not dead.exists()
            assert all((each / "file").is_file() for each in others)
    assert not living.exists()
