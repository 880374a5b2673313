"""What tests of the export share: work that was done before in the process, or that coremltools does over and over."""

import functools
from pathlib import Path

from coremltools.converters.mil.mil import Program
from PIL import Image

from shvit.export import images

BUNDLED = frozenset(images.image_files(None))
open_image, validate = functools.cache(images.open_image), Program.validate


def open_once(file: Path) -> Image.Image:
    """Open an image; scikit-image's, which most exports are verified with twice, are decoded once."""
    return open_image(file) if file in BUNDLED else open_image.__wrapped__(file)


def validate_with_scopes(program: Program, check_essential_scope: bool | None = False) -> None:
    """Check a program where coremltools also wants its scopes: when it is read, cleaned up and written.

    Without this it checks the whole program again after each of about 80 passes, a third of a conversion's time.
    """
    if check_essential_scope:
        validate(program, check_essential_scope)


images.open_image, Program.validate = open_once, validate_with_scopes
