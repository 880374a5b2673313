"""The command info; see shvit/cli.py for how it is called."""

from dataclasses import asdict, dataclass
from typing import Any

import tyro

from shvit import terminal
from shvit.img_size import ImgSize

from ..spec import open_model
from .info import describe, tables


@dataclass(frozen=True)
class Info:
    """Show what a model costs, by stage, kind of layer and operator; a SHViT also compared with other designs."""

    model: tyro.conf.Positional[str]
    """Model name that timm knows."""
    img_size: ImgSize | None = None
    """Input size in pixels, as 224 or HEIGHTxWIDTH; the model's own by default."""

    def run(self) -> dict[str, Any]:
        description = describe(*open_model(self.model, None, self.img_size))
        for shown in tables(description):
            terminal.console().print(shown)
        return asdict(description)
