"""The console that commands print to, which removes from text what could steer a terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from .errors import printable


class SafeConsole(Console):
    """A console that prints the names in third-party files without what steers a terminal or begins a line.

    Every text goes through `render_str`: what is printed, and the cells of a table. A text that is meant to have
    several lines is printed line by line.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console(quiet: bool = False) -> Console:
    """Return a console as wide as the terminal, or wide enough for every table where the output is a file or a pipe.

    Args:
        quiet: print nothing, as in all but one of several processes.
    """
    return SafeConsole(width=None if is_terminal() else 160, highlight=False, markup=False, quiet=quiet)


def is_terminal() -> bool:
    """Return whether a person reads stdout on a terminal; there may be no stdout at all."""
    return sys.stdout is not None and sys.stdout.isatty()


def report(message: str) -> None:
    """Print a line on stderr: a warning, or what became of a file."""
    print(printable(message), file=sys.stderr, flush=True)
