"""Reading images for detectors, each of which is named if it cannot be read or prepared."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from mmcv.transforms import LoadImageFromFile, Pad
from mmdet.registry import TRANSFORMS
from mmengine.dataset import base_dataset
from PIL import Image

from shvit.errors import InputError, first_line
from shvit.files import is_there, open_file
from shvit.train.data.images import MAX_PIXELS

from ..coco.headers import known_formats


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """MMDetection's LoadImageFromFile (BGR, turned as EXIF says) that names a file that is not an image.

    Raises:
        InputError: no such file, damaged, or more pixels than `shvit.train.data.images.MAX_PIXELS`.
    """

    def transform(self, results: dict) -> dict | None:
        path = results["img_path"]
        if not is_there(path):
            raise InputError(f"{path}: no such image")
        try:
            with open_file(path) as file, Image.open(file, formats=known_formats()) as image:  # the header alone
                pixels = image.width * image.height
        except InputError:
            raise
        except Exception as error:  # whatever a plug-in of Pillow's raises for a damaged file
            raise InputError(f"{path}: not a readable image ({first_line(error)}); remove or replace it") from error
        if pixels > MAX_PIXELS:
            raise InputError(f"{path}: {pixels:,} pixels are more than the {MAX_PIXELS:,} allowed")
        try:
            return super().transform(results)
        except Exception as error:  # OpenCV gives None, on which the next line of theirs fails
            raise InputError(f"{path}: not a readable image (damaged); remove or replace it") from error


@contextmanager
def named_images() -> Iterator[None]:
    """A block in which datasets name the image that their transforms cannot prepare, such as one of 5000×1 pixels."""
    prepare = base_dataset.Compose.__call__

    def prepared(self: Any, data: Any) -> Any:
        try:
            return prepare(self, data)
        except Exception as error:  # whatever OpenCV, Pillow or a transform raises
            raise not_prepared(data, error) from error

    with patch.object(base_dataset.Compose, "__call__", prepared):
        yield


def not_prepared(data: Any, error: Exception) -> InputError:
    """Return the error of an image, with its name."""
    if isinstance(error, InputError):
        return error
    name = data.get("img_path") if isinstance(data, dict) else None
    reason = first_line(error)
    return InputError(f"{name or 'an image'}: cannot be prepared as the pipeline says ({reason}); remove or replace it")


@TRANSFORMS.register_module()
class Border(Pad):
    """Pad that leaves `img_shape` the image's, inside of which boxes are kept."""

    def transform(self, results: dict) -> dict:
        shape = results["img_shape"]
        return {**super().transform(results), "img_shape": shape}
