"""SHViT for timm: importing this package registers shvit_s1 … shvit_s4 with `timm.create_model`."""

import sys
import sysconfig
from pathlib import Path

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether this process is the `shvit` program: its --help must not wait for torch, its commands import it.

    The program is where this interpreter's are installed, links followed; any other script of that name is a user's.
    """
    script = Path((getattr(sys, "argv", None) or [""])[0])
    if script.name not in {"shvit", "shvit.exe", "shvit-script.py"}:
        return False
    return script.resolve().parent == Path(sysconfig.get_path("scripts")).resolve()


if not _is_command():
    from .checkpoint import load_checkpoint
    from .deploy import deploy
    from .shvit import SHViT

    __all__ = ["SHViT", "deploy", "load_checkpoint"]
