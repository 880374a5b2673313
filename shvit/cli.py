"""`shvit <command>`: a table of names and modules; nothing is imported before it is needed.

A command is a dataclass whose fields are its options (parsed by tyro) and whose `run()` returns the result, printed
as one JSON object on the last line of stdout. A group of commands is a dict of such classes; a function is given the
options and returns such a command.
Exit status: 0 done; 1 a check failed; 2 unusable input, reported in one line on stderr (`--debug`: with traceback);
70 a bug in this program, in one line too; 128 plus the number of a signal that ended it.
"""

import contextlib
import importlib
import inspect
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from . import __version__
from .documents import to_json
from .environment import advise
from .errors import CheckFailed, InputError, RunInstead, first_line, printable


class Command(Protocol):
    """A command with its options."""

    def run(self) -> dict[str, Any]:
        """Return the command's result, as plain values."""


@dataclass(frozen=True)
class Entry:
    """A command's place, as `module:attribute`, and its description."""

    target: str
    help: str


COMMANDS = {
    "list": Entry("shvit.weights.main:List", "List models: parameters, GMACs, input size, published top-1, weights."),
    "info": Entry(
        "shvit.export.analysis.main:Info",
        "Show what a model costs, per stage and layer: MACs, parameters, bytes moved.",
    ),
    "train": Entry("shvit.train.main:parse", "Train a model by a recipe, on class folders or a table of labels."),
    "eval": Entry(
        "shvit.export.evaluation.main:Eval", "Measure the accuracy of a checkpoint or an artifact on images."
    ),
    "predict": Entry(
        "shvit.export.predict.main:Predict", "Predict the classes of images, or compute their features, in any number."
    ),
    "export": Entry(
        "shvit.export.main:EXPORT",
        "Export a checkpoint, verified, to ONNX, OpenVINO, Core ML, LiteRT, ncnn or ExecuTorch.",
    ),
    "verify": Entry("shvit.export.main:Verify", "Compare an artifact with its model on images."),
    "bench": Entry("shvit.export.bench.main:Bench", "Measure latency of models in runtimes, interleaved."),
    "bench phone": Entry("shvit.export.browser.main:BenchPhone", "Measure latency and outputs in a phone's browser."),
    "bench import": Entry("shvit.export.browser.main:BenchImport", "Write a report of records that the page saved."),
    "site": Entry(
        "shvit.export.browser.main:Site", "Write the page that measures latency in a browser as a static site."
    ),
    "doctor": Entry(
        "shvit.export.analysis.doctor:Doctor", "Check this machine: hardware, versions, extras and runtimes."
    ),
    "detect": Entry(
        "shvit.detection.main:DETECT", "Train, evaluate and export Mask R-CNN and RetinaNet; draw detections."
    ),
    "weights": Entry("shvit.weights.main:WEIGHTS", "List, download, check and convert checkpoints."),
    "demo": Entry(
        "shvit.export.demo.main:Demo", "Train, export, verify, evaluate and benchmark a model on real images."
    ),
}
"""Each command, of one or two words."""
SCHEMES = {"detector": "shvit.detection.pyramid:create_pyramid"}
"""Prefixes of model names, as in `detector:CONFIG`, and what creates such a model."""
WITH_SCHEMES = {"info", "eval", "export", "verify", "bench", "bench phone", "site"}
"""The commands that take such names."""

HELP = "\n".join(
    [
        "usage: shvit COMMAND [OPTIONS]      `shvit COMMAND --help` lists the options of a command.",
        "",
        *(f"  {name.ljust(max(map(len, COMMANDS)))}  {entry.help}" for name, entry in COMMANDS.items()),
        "",
        "  --version    Show the version.",
        "  --debug      With any command: show the traceback of an error.",
        "",
        "The last line on stdout is JSON. Exit status: 0 done, 1 a check failed, 2 unusable input, 70 a bug in shvit.",
    ]
)


def run(argv: list[str]) -> dict[str, Any]:
    """Run one command and return its result.

    Raises:
        InputError, CheckFailed: as the command does; InputError also for options that do not parse.
    """
    if not argv:
        raise InputError("which command? `shvit --help` lists them")
    name, options = _split(argv)
    try:
        command = _parse(name, options)
        if name in WITH_SCHEMES:
            _register_schemes()
        return command.run()
    except RunInstead as instead:
        return run(instead.argv)
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == __package__:
            raise
        raise InputError(advise(error.name, argv)) from error


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """Return the name of a command, of two words where the table has one of these, and its options."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, argv[words:]
    raise InputError(_unknown(argv[0]))


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _register_schemes() -> None:
    """Let names with a prefix be models; what creates them is imported only when one is asked for."""
    from .create import register_scheme

    for scheme, target in SCHEMES.items():
        register_scheme(scheme, partial(_call, target))


def _call(target: str, *arguments: Any) -> Any:
    return _load(target)(*arguments)


def _parse(name: str, options: list[str]) -> Command:
    target = _load(COMMANDS[name].target)

    import tyro

    from .img_size import command_line_types

    prog = f"shvit {name}"
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), command_line_types():
            if isinstance(target, dict):
                return tyro.extras.subcommand_cli_from_dict(target, prog=prog, args=options)
            if inspect.isfunction(target):
                return target(options, prog)
            return tyro.cli(target, prog=prog, args=options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(message.getvalue())) from stop


HELP_FOLLOWS = "Argument helptext:"
"""The line of tyro's between why a value is not taken and the option's help."""


def _one_line(panel: str) -> str:
    """Return tyro's framed message as one line: what is wrong, and the option that may have been meant."""
    lines = [line.strip(" ╭╮╰╯│─\n") for line in panel.splitlines()]
    title, *rest = [line for line in lines if line.strip("-")]  # rules are dashes where stdout is not UTF-8
    lines = [line for line in rest if not line.startswith(("For full helptext", "shvit ", "in shvit "))]
    if misplaced := _misplaced(rest):
        return misplaced
    suggested = next((line for line in lines if line.startswith("--")), None)
    if HELP_FOLLOWS in lines:
        lines = [" ".join(lines[: lines.index(HELP_FOLLOWS)])]
        if ";" in lines[0]:  # a message of ours, which says what to give
            return lines[0]
    if suggested and not lines[0].endswith(":"):
        return f"{lines[0]}; did you mean {suggested}?"
    message = " ".join(lines) or title
    return message if message.startswith(title) else f"{title}: {message}"


def _misplaced(lines: Sequence[str]) -> str | None:
    """Return a message about an option that only other commands have, if tyro's lines name one."""
    matches = (re.match(r"(--\S+) \(applied to (shvit .*)\)$", line) for line in lines)
    given = next((match for match in matches if match), None)
    others = [match[1] for line in lines if (match := re.match(r"in shvit (.*) --help$", line))]
    if given is None or not any(re.match(rf"{re.escape(given[1])}\b(?! \()", line) for line in lines):
        return None
    return f"{given[1]} is not an option of `{given[2]}`, but of {_listed(others)}"


def _listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _unknown(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `shvit {close[0]}`?" if close else f"choose from {', '.join(COMMANDS)}"
    return f"unknown command {name!r}; {hint}"


def main() -> None:
    """Run the `shvit` program."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"shvit {__version__}")
        return
    try:
        with _ended_by_signals():
            result, status = run(argv), 0
    except CheckFailed as error:
        _report(argv[0], error, str(error), debug)
        result, status = error.result, 1
    except KeyboardInterrupt:
        _report(argv[0], None, "interrupted", debug)
        sys.exit(130)
    except BrokenPipeError:
        raise
    except Exception as error:
        line, status = _describe(error)
        _report(argv[0], error, line, debug)
        sys.exit(status)
    print(to_json(result), flush=True)
    sys.exit(status)


def _report(command: str, error: BaseException | None, line: str, debug: bool) -> None:
    if debug and error is not None:
        traceback.print_exception(error)
    print(f"shvit {command}: {printable(line)}", file=sys.stderr, flush=True)


INTERNAL_ERROR = 70
"""EX_SOFTWARE of BSD's sysexits.h: a bug in this program."""


def _describe(error: Exception) -> tuple[str, int]:
    """Return the message and the exit status for an error that ends a command."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, MemoryError):
        return "there is not enough memory; take smaller images or batches, or fewer processes", 2
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return f"{where}{error.strerror or first_line(error)}", 2
    return f"internal error: {type(error).__name__}: {first_line(error)}; please report it, with what --debug adds", (
        INTERNAL_ERROR
    )


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a block as an exception does, so that nothing half-written stays.

    The training loop handles them in its own way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # those that nohup ignores stay ignored
    handled = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: object) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)  # one is enough
        raise SystemExit(128 + number)

    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def program() -> None:
    """Run `main` for a shell, whose stdout may be closed, full, a pipe without a reader, or not UTF-8."""
    os.environ.setdefault("WDS_SECURE", "1")  # webdataset, if anything asks it, runs nothing
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123  (until the process ends)
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows has a code page, which knows few signs
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except OSError as error:  # the others that a command raises do not get here
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at the end
        ended = error.__context__
        reported = isinstance(ended, SystemExit) and ended.code not in (0, None)
        if not reported and not isinstance(error, BrokenPipeError):
            print(f"shvit: stdout cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    program()
