"""What tests of the export share: work that was done before in the process, or that coremltools does over and over."""

import functools
from pathlib import Path

from coremltools.converters.mil.mil import Program
from PIL import Image

from shvit.export import images
from shvit.train.data.pixels import formats

BUNDLED = frozenset(images.image_files(None))
open_image, validate = functools.cache(formats.open_image), Program.validate


def open_once(file: Path, name: str | None = None) -> Image.Image:
    """Open an image; scikit-image's, which most exports are verified with twice, are decoded once."""
    return open_image(file, name) if file in BUNDLED else open_image.__wrapped__(file, name)


def validate_with_scopes(program: Program, check_essential_scope: bool | None = False) -> None:
    """Check a program where coremltools also wants its scopes: when it is read, cleaned up and written.

    Without this it checks the whole program again after each of about 80 passes, a third of a conversion's time.
    """
    if check_essential_scope:
        validate(program, check_essential_scope)


formats.open_image, Program.validate = open_once, validate_with_scopes
