"""Processes that have PyTorch and timm already: loading these takes five seconds, and a test of ours is about the rest.

`run` asks a server, this file as a program, which has loaded them and nothing of ours. It forks for each request, and
the child goes on as a new interpreter does: a script or code, with its own arguments, folder and variables.
"""

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any


@functools.cache
def _server(python: Path | str) -> subprocess.Popen:
    """Started when the first test asks for it; it ends with the process that did."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([python, __file__], **pipes)
    atexit.register(server.communicate)
    return server


def run(
    *argv: object,
    code: str = "",
    cwd: Path | str | None = None,
    strict: bool = False,
    python: Path | str = sys.executable,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """What `python argv` or `python -c code argv` does, in a child of the server.

    Args:
        strict: every warning is an error.
        python: the interpreter, of another environment for one; each has a server.
        env: variables that are set beside those of this process.
    """
    server = _server(python)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        given = {"argv": [*map(str, argv)], "code": code, "cwd": str(cwd or Path.cwd())}
        given |= {"strict": strict, "env": {**os.environ, **env}, "out": f"{folder}/out", "err": f"{folder}/err"}
        server.stdin.write(json.dumps(given) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())
        out, err = (Path(given[name]).read_text(encoding="utf-8") for name in ("out", "err"))
    return subprocess.CompletedProcess(argv, status, out, err)


def _become(given: dict[str, Any]) -> None:
    """Runs what was asked for in this process, which ends as an interpreter does."""
    for number, path in ((1, given["out"]), (2, given["err"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(given["env"])
    os.chdir(given["cwd"])
    if given["strict"]:
        warnings.simplefilter("error")
    argv, code = given["argv"], given["code"]
    if code:
        sys.argv, sys.path[0] = ["-c", *argv], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent.resolve())
        runpy.run_path(argv[0], run_name="__main__")


def _serve() -> None:
    import gc

    import timm.data  # noqa: F401

    gc.freeze()  # what children would otherwise copy to look through
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(json.loads(line))
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
