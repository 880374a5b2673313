"""The exceptions that end a command with a message, and other errors' messages in one line."""

import re
import unicodedata
from collections.abc import Sequence

PLACE = re.compile(r"Exception from \S+:|Traceback .*|File .*, line \d+.*")
"""A line that only tells where in a library's source an error was raised."""


class InputError(ValueError):
    """Unusable input: one line with what was given, what is allowed and what to do. Exit status 2."""


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's message that says anything, or its type's name; at most `limit` characters.

    Messages of libraries may be empty, begin with empty lines, or be a hundred lines long.
    """
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not PLACE.fullmatch(line)), type(error).__name__)[:limit]


JOINERS = "\u200c\u200d"
"""The format characters that scripts and emoji need; the others turn the direction of text, or hide."""


def some(names: Sequence[object], limit: int = 4) -> str:
    """Return the first names, for a message, and how many more there are."""
    shown = ", ".join(str(name)[:200] for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def printable(text: str) -> str:
    """Return text on one line, without the characters by which a third-party file could steer a terminal."""
    if text.isprintable():
        return text
    return "".join(map(_printable, text))


def _printable(char: str) -> str:
    if char in "\t\n\r":
        return " "
    steers = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in JOINERS
    return "�" if steers else char


class CheckFailed(Exception):
    """A check that a command makes failed; `result` is what it measured. Exit status 1."""

    def __init__(self, message: str, result: dict):
        super().__init__(message)
        self.result = result


class RunInstead(Exception):
    """Another command line, which `shvit.cli.run` runs in a command's place: of one that it must not import."""

    def __init__(self, *argv: str):
        super().__init__(*argv)
        self.argv = [*argv]


def refuse(reason: str, **given: object) -> None:
    """Raise InputError for options that were given and do not apply; None, False and empty ones were not given.

    Args:
        reason: why they do not apply.
        given: options by their names in Python.
    """
    present = (name for name, value in given.items() if value is not False and value not in (None, (), [], ""))
    names = [f"--{name.replace('_', '-')}" for name in present]
    if names:
        one = len(names) == 1
        raise InputError(
            f"{' and '.join(names)} {'does' if one else 'do'} not apply: {reason}; leave {'it' if one else 'them'} out"
        )
