"""The command train; see shvit/cli.py for how it is called."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .recipe import Recipe
from .recipes import DESCRIPTIONS, RECIPES


@dataclass(frozen=True)
class Train:
    """A recipe, any of whose fields can be overridden, and where its run goes."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    output: Path
    """The run folder; a run that it already holds goes on."""

    def run(self) -> dict[str, Any]:
        from .loop import train

        return train(self.recipe, self.output)


TRAIN = tyro.extras.subcommand_type_from_defaults(
    {name: Train(recipe, Path("runs") / name) for name, recipe in RECIPES.items()}, DESCRIPTIONS, prefix_names=False
)
