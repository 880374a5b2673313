"""What commands print to."""

import sys

from rich.console import Console


def console(quiet: bool = False) -> Console:
    """As wide as the terminal; wide enough for every table and sentence where the output goes to a file or a pipe.

    Args:
        quiet: print nothing, as in all but one of several processes.
    """
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, quiet=quiet)
