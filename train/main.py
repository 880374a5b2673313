"""The command `shvit train`; see shvit/cli.py for how it is called."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from shvit.errors import InputError

from .recipe import Recipe, at_home, read_recipe
from .recipes import DESCRIPTIONS, RECIPES

HELP = "\n".join(
    [
        "usage: shvit train RECIPE [--data.root DIR] [--output DIR] [any field of the recipe]",
        "       shvit train --recipe FILE.yaml [options]      train by your own recipe, or a run folder's recipe.yaml",
        "       shvit train RECIPE --benchmark N              measure the speed of N steps, the loader, and both",
        "       shvit train --plot DIR                        draw a run folder's curves.png again",
        "",
        *(f"  {name:<14}{DESCRIPTIONS[name]}" for name in RECIPES),
        "",
        "`shvit train RECIPE --help` lists every field with the recipe's value. If --output holds a run, it resumes.",
        "On several GPUs or machines: torchrun --nproc-per-node=8 -m shvit.train RECIPE …",
    ]
)


@dataclass(frozen=True)
class Train:
    """Train by a recipe, any of whose fields can be overridden."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    output: Path
    """Run folder; if it already holds a run, that run resumes."""
    benchmark: int | None = None
    """Instead of training, measure this many steps, the data loader and both.
    Images per second and peak memory are printed."""

    def run(self) -> dict[str, Any]:
        """Train, or measure the speed, and return the result."""
        if self.benchmark is not None:
            from .speed import benchmark

            return benchmark(self.recipe, self.benchmark)

        from .loop import train

        return train(self.recipe, self.output)


@dataclass(frozen=True)
class Plot:
    """Draw a run folder's curves.png from its metrics.jsonl."""

    plot: Path
    """The run folder."""

    def run(self) -> dict[str, Any]:
        """Draw the curves, and return the path of the image."""
        from .run.metrics import read_log
        from .run.plots import plot_curves

        path = self.plot / "curves.png"
        plot_curves(read_log(self.plot), path)
        return {"plot": str(path)}


def parse(options: list[str], prog: str) -> Train | Plot:
    """Parse the arguments after `shvit train` into a command.

    Raises:
        InputError: an unknown recipe, or a recipe file that cannot be read.
        SystemExit: from tyro, with its message on stderr.
    """
    first = options[0] if options else ""
    if first in ("-h", "--help"):
        print(HELP)
        raise SystemExit(0)
    if first == "--plot":
        return tyro.cli(Plot, prog=prog, args=options)
    name, recipe, rest = _choose(options)
    default = Train(recipe, Path("runs") / name)
    kind = tyro.conf.configure(tyro.conf.AvoidSubcommands)(Train)
    prog = f"{prog} {' '.join(options[: len(options) - len(rest)])}"
    given = tyro.cli(kind, default=default, prog=prog, args=rest)
    return replace(given, recipe=given.recipe.at_home(), output=at_home(given.output))


def _choose(options: list[str]) -> tuple[str, Recipe, list[str]]:
    """Return the run folder's name, the recipe, and the remaining arguments."""
    first, *rest = options or [""]
    if first == "--recipe" or first.startswith("--recipe="):
        _, joined, value = first.partition("=")
        words = [value, *rest] if joined else rest
        if not words or not words[0]:
            raise InputError("--recipe wants a YAML file; see `shvit train --help`")
        path = at_home(Path(words[0]))
        name = path.parent.name if path.name == "recipe.yaml" and path.parent.name else path.stem
        return name, read_recipe(path), words[1:]
    if first not in RECIPES:
        import difflib

        close = difflib.get_close_matches(first, RECIPES, n=1)
        wrong = f"unknown recipe {first!r}" if first and not first.startswith("-") else "which recipe? it comes first"
        hint = (
            f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(RECIPES)}, or give --recipe FILE.yaml"
        )
        raise InputError(f"{wrong}; {hint}")
    return first, RECIPES[first], rest
