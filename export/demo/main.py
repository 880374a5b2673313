"""The command demo; see shvit/cli.py for how it is called."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .run import demo


@dataclass(frozen=True)
class Demo:
    """Train, export, verify, evaluate and benchmark a model on real images, offline, and write one page with plots."""

    output: Path = Path("demo")
    """A folder for all results; report.html is the page."""
    data: Path | None = None
    """Your own images, a folder of class folders; solar cells (PyPI package elpv-dataset) by default."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Training epochs; the recipe's by default."""

    def run(self) -> dict[str, Any]:
        return demo(self.output, self.data, self.epochs)
