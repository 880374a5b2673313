"""A model's first run, in a process of its own: runtimes trust their files, and some files end the process."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shvit.errors import InputError

MAX_SECONDS = 120  # S4 at 224 px takes 0.1


def run_trial(path: Path, script: str, words: Sequence[str], runtime: str) -> None:
    """Raise InputError where a model ends the process that runs it, or takes too long for one image.

    Args:
        script: a file beside this one, which is run with `words` and loads nothing but the runtime.
    """
    command = [sys.executable, "-I", str(Path(__file__).with_name(script)), *words]
    try:
        done = subprocess.run(command, capture_output=True, timeout=MAX_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"{path}: takes more than {MAX_SECONDS} s for one image; export the model again") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        reason = f"a signal ({-done.returncode})" if done.returncode < 0 else " ".join(said)[:200]
        raise InputError(f"{path}: does not run in {runtime} ({reason}); export the model again")
