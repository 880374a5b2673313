"""What commands print to."""

import sys

from rich.console import Console


def console() -> Console:
    """As wide as the terminal; wide enough for every table and sentence where the output goes to a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
