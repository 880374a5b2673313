"""The process's surroundings: installed versions, and how OpenMP's threads wait for each other."""

import os
import sys
from contextlib import suppress

SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""OpenMP's own variable, which GNU's library (PyTorch's on Linux), LLVM's (on macOS) and Intel's (on Windows) read, and
what the latter two call it: milliseconds of spinning before a thread sleeps."""
WAITING = (*SLEEPING, "GOMP_SPINCOUNT", "KMP_LIBRARY")
"""All variables that say how threads wait; one that the user has set decides alone."""
_set_here: dict[str, str] = {}


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed.

    Args:
        packages: names of distributions, such as `onnxruntime`; one that is not installed is left out.
    """
    import platform
    from importlib import metadata  # this module is imported for --help, too

    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def let_threads_sleep() -> None:
    """Set `SLEEPING`, unless the user has set one of `WAITING` or PyTorch is loaded: OpenMP reads it only then.

    By default a thread that waits for others spins, so that one whose core another process has makes the rest burn
    theirs: training beside a busy process, of which a loader's worker is one, is then slower (docs/how-to/train.md).
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAITING):
        return
    os.environ.update(SLEEPING)
    _set_here.update(SLEEPING)


def users_environment() -> dict[str, str]:
    """Return this process's variables without what `let_threads_sleep` set, for processes that measure latency."""
    return {name: value for name, value in os.environ.items() if _set_here.get(name) != value}
