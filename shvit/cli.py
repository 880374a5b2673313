"""`shvit <command>`: a table of names and modules; nothing is imported before it is needed.

A command is a dataclass whose fields are its options (parsed by tyro) and whose `run()` returns the result, printed
as one JSON object on the last line of stdout. A group of commands is a dict of such classes; a function is given the
options and returns such a command.
Exit status: 0 done; 1 a check did not hold; 2 unusable input, said in one line on stderr (`--debug`: with traceback).
"""

import importlib
import inspect
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__
from .errors import CheckFailed, InputError


@dataclass(frozen=True)
class Entry:
    """Where a command is, as `module:attribute`, and what it does."""

    target: str
    help: str


COMMANDS = {
    "list": Entry("shvit.weights.main:List", "the models: parameters, GMACs, input size, published top-1, weights"),
    "info": Entry(
        "shvit.export.main:Info",
        "what one model costs, per stage and layer: MACs, parameters, bytes moved; its design explained",
    ),
    "train": Entry("shvit.train.main:parse", "train by a recipe, on your folder of class folders"),
    "eval": Entry("shvit.export.main:Eval", "accuracy of a checkpoint or an artefact on photographs"),
    "export": Entry("shvit.export.main:EXPORT", "a checkpoint into a verified ONNX, OpenVINO or Core ML file"),
    "verify": Entry("shvit.export.main:Verify", "compare an artefact with its model on photographs"),
    "bench": Entry(
        "shvit.export.bench_main:parse", "latency of models and runtimes, interleaved; `bench phone`: in a browser"
    ),
    "site": Entry("shvit.export.bench_main:Site", "the page that measures in browsers as a static site"),
    "detect": Entry("shvit.detection.main:DETECT", "Mask R-CNN and RetinaNet: train, evaluate, export, draw"),
    "weights": Entry("shvit.weights.main:WEIGHTS", "list, pull, check and convert checkpoints"),
    "demo": Entry("shvit.export.main:Demo", "train, export, verify, evaluate and time on real photographs"),
}

HELP = "\n".join(
    [
        "usage: shvit COMMAND [OPTIONS]      shvit COMMAND --help tells the options",
        "",
        *(f"  {name:<9}{entry.help}" for name, entry in COMMANDS.items()),
        "",
        "  --version    --debug (anywhere): show the traceback of an input error",
        "",
        "exit status: 0 done, 1 a check did not hold, 2 unusable input; the last line on stdout is a JSON object",
    ]
)


def run(argv: list[str]) -> dict[str, Any]:
    """Runs one command and returns its result.

    Raises:
        InputError, CheckFailed: as the command does; InputError also for options that do not parse.
    """
    if not argv or argv[0] not in COMMANDS:
        raise InputError(_unknown(argv[0]) if argv else "which command? `shvit --help` lists them")
    name, *options = argv
    try:
        return _parse(name, options).run()
    except ModuleNotFoundError as error:
        raise InputError(_missing_module(error)) from error


def _parse(name: str, options: list[str]) -> Any:
    module, _, attribute = COMMANDS[name].target.partition(":")
    target = getattr(importlib.import_module(module), attribute)

    import contextlib

    import tyro

    prog = f"shvit {name}"
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            if isinstance(target, dict):
                return tyro.extras.subcommand_cli_from_dict(target, prog=prog, args=options)
            if inspect.isfunction(target):
                return target(options, prog)
            return tyro.cli(target, prog=prog, args=options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(_one_line(message.getvalue())) from stop


def _one_line(panel: str) -> str:
    """tyro's framed message as one line: what was wrong, and the option that may have been meant."""
    lines = [line.strip(" ╭╮╰╯│─\n") for line in panel.splitlines()]
    title, *rest = [line for line in lines if line.strip("-")]  # rules are dashes where stdout is not UTF-8
    said = [line for line in rest if not line.startswith(("For full helptext", "shvit ", "in shvit "))]
    if misplaced := _misplaced(rest):
        return misplaced
    suggested = next((line for line in said if line.startswith("--")), None)
    if suggested and not said[0].endswith(":"):
        return f"{said[0]}; did you mean {suggested}?"
    message = " ".join(said) or title
    return message if message.startswith(title) else f"{title}: {message}"


def _misplaced(lines: Sequence[str]) -> str | None:
    """What is to be said of an option that other commands have, if tyro's lines tell of one."""
    found = (re.match(r"(--\S+) \(applied to (shvit .*)\)$", line) for line in lines)
    given = next((match for match in found if match), None)
    others = [match[1] for line in lines if (match := re.match(r"in shvit (.*) --help$", line))]
    if given is None or not any(re.match(rf"{re.escape(given[1])}\b(?! \()", line) for line in lines):
        return None
    return f"{given[1]} is no option of `{given[2]}`, but of {' and '.join(others)}"


def _unknown(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `shvit {close[0]}`?" if close else f"choose from {', '.join(COMMANDS)}"
    return f"unknown command {name!r}; {hint}"


EXTRAS = {  # top-level module: the extra that brings it
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "skimage": "export",
    "tornado": "phone",
    "segno": "phone",
    "cryptography": "phone",
    "coremltools": "coreml",
    "openvino": "openvino",
    "elpv_dataset": "demo",
    "matplotlib": "train",
    "yaml": "train",
    "pydantic": "train",
    "tensorboard": "train",
    "torchvision": "train",
    "webdataset": "data",
    "datasets": "data",
    "pillow_heif": "heic",
    "mmengine": "detection",
    "mmcv": "detection",
    "mmdet": "detection",
}


def _missing_module(error: ModuleNotFoundError) -> str:
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        raise error
    return f"this needs the package {module}; install it with: pip install 'shvit[{EXTRAS[module]}]'"


def _printable(message: str) -> str:
    """On one line, without characters by which a stranger's file could steer a terminal."""
    return "".join(each if each.isprintable() else "�" for each in " ".join(message.split()))


def main() -> None:
    """The `shvit` program."""
    for stream in (sys.stdout, sys.stderr):  # a pipe on Windows has a code page, which knows few signs
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        sys.exit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"shvit {__version__}")
        return
    try:
        result = run(argv)
        status = 0
    except (InputError, CheckFailed) as error:
        if debug:
            traceback.print_exc()
        print(f"shvit {argv[0]}: {_printable(str(error))}", file=sys.stderr)
        if isinstance(error, InputError):
            sys.exit(2)
        result, status = error.result, 1
    except KeyboardInterrupt:
        print(f"shvit {argv[0]}: interrupted", file=sys.stderr)
        sys.exit(130)
    print(json.dumps(result), flush=True)
    sys.exit(status)


def program() -> None:
    """`main` for a shell, where the reader of a pipe, `head` say, may have had enough."""
    try:
        main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    program()
