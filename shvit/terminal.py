"""The console that commands print to, which removes from text what could steer a terminal."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Column
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


def right_aligned(*names: str) -> list[Column]:
    """Return columns of a table for numbers."""
    return [Column(name, justify="right") for name in names]


def is_terminal() -> bool:
    """Return whether a person reads stdout on a terminal; there may be no stdout at all."""
    return sys.stdout is not None and sys.stdout.isatty()


def report(message: str) -> None:
    """Print a line on stderr: a warning, or what became of a file."""
    print(printable(message), file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' progress and deprecation warnings, which a user can do nothing about, off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Keep all that libraries print, also from outside of Python, off the terminal, besides what `quiet` does."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()), open(os.devnull, "w") as nothing:  # noqa: PTH123
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(nothing.fileno(), number)
            yield
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
