"""SHViT for timm: importing this package registers shvit_s1 … shvit_s4 with `timm.create_model`."""

import os
import sys

__version__ = "0.1.0"


def _is_command() -> bool:
    """Whether the process is the `shvit` program, whose --help must not wait for torch; its commands import themselves."""
    program = os.path.basename((getattr(sys, "argv", None) or [""])[0])
    return program in {"shvit", "shvit.exe", "shvit-script.py"}


if not _is_command():
    from .checkpoint import load_checkpoint
    from .deploy import deploy
    from .shvit import SHViT

    __all__ = ["SHViT", "deploy", "load_checkpoint"]
