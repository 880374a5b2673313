"""SHViT for timm: importing this package registers shvit_s1 … shvit_s4 with `timm.create_model`."""

import sys
import sysconfig
from pathlib import Path

from .environment import let_threads_sleep

__version__ = "0.1.0"


def _is_command() -> bool:
    """Return whether this process is the `shvit` program, whose --help must not wait for torch.

    The program is where this interpreter's are installed, links followed; any other script of that name is a user's.
    `python -m shvit.train`, and whatever else of ours, is the program too.
    """
    argv = getattr(sys, "argv", None) or [""]
    if argv[0] == "-m":  # as long as Python looks for the module
        return sys.orig_argv[-len(argv)].removeprefix("-m").startswith("shvit.")
    script = Path(argv[0])
    if script.name not in {"shvit", "shvit.exe", "shvit-script.py"}:
        return False
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))  # the latter: pip install --user
    return script.resolve().parent in {Path(sysconfig.get_path("scripts", scheme)).resolve() for scheme in schemes}


if _is_command():
    let_threads_sleep()  # before anything imports torch
else:
    from .checkpoint import load_checkpoint
    from .deployment import deploy
    from .shvit import SHViT

    __all__ = ["SHViT", "deploy", "load_checkpoint"]
