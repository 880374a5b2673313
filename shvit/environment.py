"""How OpenMP's threads wait in the `shvit` program: asleep, so that other processes get the cores meanwhile."""

import os
import sys

SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""OpenMP's own variable, which GNU's library (PyTorch's on Linux), LLVM's (on macOS) and Intel's (on Windows) read, and
what the latter two call it: milliseconds of spinning before a thread sleeps."""
WAITING = (*SLEEPING, "GOMP_SPINCOUNT", "KMP_LIBRARY")
"""All variables that say how threads wait; one that the user has set decides alone."""
_set_here: dict[str, str] = {}


def let_threads_sleep() -> None:
    """Sets `SLEEPING`, unless the user has set one of `WAITING` or PyTorch is loaded: OpenMP reads it only then.

    By default a thread that waits for others spins, so that one whose core another process has makes the rest burn
    theirs: training beside a busy process, of which a loader's worker is one, is then slower (docs/how-to/train.md).
    """
    if "torch" in sys.modules or any(name in os.environ for name in WAITING):
        return
    os.environ.update(SLEEPING)
    _set_here.update(SLEEPING)


def users_environment() -> dict[str, str]:
    """This process's variables without those that `let_threads_sleep` set, for processes that measure latency."""
    return {name: value for name, value in os.environ.items() if _set_here.get(name) != value}
