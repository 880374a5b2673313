"""The metrics of each evaluation, in metrics.jsonl and in the training state, checked as they are read."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from shvit.documents import parse_json, parse_model, to_json
from shvit.errors import InputError
from shvit.files import check_file, read_text
from shvit.weights.run_info import BEST_FIGURES

MAX_BYTES = 256 << 20  # of metrics.jsonl: half a million evaluations


def _entry_type() -> Any:
    from pydantic import Field

    count = Annotated[int, Field(ge=0, le=10**15)]
    value = Annotated[float, Field(ge=-1e40, le=1e40)]  # float32 ends before; of 1e308 no axis can be drawn
    percent = Annotated[float, Field(ge=0, le=100)]

    @dataclass(frozen=True)
    class Entry:
        """The metrics of an evaluation; None for a value that was not finite, as a gradient norm in fp16 may be."""

        epoch: Annotated[int, Field(ge=1, le=10**6)]
        lr: value | None
        train_loss: value | None
        grad_norm: value | None
        val_loss: value | None
        ema_loss: value | None
        top1: percent | None = None
        ema_top1: percent | None = None
        map: percent | None = None
        ema_map: percent | None = None
        r2: value | None = None
        ema_r2: value | None = None
        step: count = 0
        n_val: count = 0

    return Entry


def check_log(log: Any, name: str) -> list[dict[str, Any]]:
    """Check a log, which has an entry for each evaluation, in order, and return it.

    Args:
        name: what messages call it.

    Raises:
        InputError: an entry lacks a field, or has one of another type or range.
    """
    try:
        plain = json.loads(to_json(log))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: its log has values other than numbers and text") from error
    kind: Any = list[_entry_type()]  # type: ignore[misc]
    parse_model(kind, plain, f"{name}: not the log of a run")
    for number, entry in enumerate(plain, 1):
        if not any(_has(entry, best) and _has(plain[0], best) for best in BEST_FIGURES.values()):
            raise InputError(f"{name}: not the log of a run: entry {number} has not the figure of the first, one of "
                             f"{', '.join(BEST_FIGURES.values())}")  # fmt: skip
    if any(after["epoch"] <= before["epoch"] for before, after in pairwise(plain)):
        raise InputError(f"{name}: not the log of a run: its epochs do not rise")
    return log


def _has(entry: dict[str, Any], best: str) -> bool:
    """Return whether an entry has a figure of the weights and of the EMA weights."""
    return entry.get(best) is not None and entry.get(f"ema_{best}") is not None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Read the entries of a run folder's metrics.jsonl.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        check_file(path)
    except InputError as error:
        raise InputError(f"{error}; give the --output of a run that finished an epoch") from error
    lines = read_text(path, MAX_BYTES).splitlines()
    log = [parse_json(line, f"{path}: line {number}") for number, line in enumerate(lines, 1)]
    if not log:
        raise InputError(f"{path}: is empty; give the --output of a run that finished an epoch")
    return check_log(log, str(path))
