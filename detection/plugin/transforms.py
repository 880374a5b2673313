"""Transforms that read images for detectors, and name each one that cannot be read or prepared."""

from typing import Any

from mmcv.transforms import LoadImageFromFile, Pad
from mmdet.registry import TRANSFORMS
from mmengine.config import ConfigDict
from mmengine.dataset import Compose
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


@TRANSFORMS.register_module()
class NamedImages(Compose):
    """A pipeline that names the image that it cannot prepare, such as one of 5000×1 pixels.

    Args:
        transforms: the pipeline's transforms, or their configs.

    Raises:
        InputError: when it is called: OpenCV, Pillow or a transform failed on the image.
    """

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return super().__call__(data)
        except InputError:
            raise
        except Exception as error:  # whatever OpenCV, Pillow or a transform raises
            name, reason = data.get("img_path") or "an image", first_line(error)
            raise InputError(
                f"{name}: cannot be prepared as the pipeline says ({reason}); remove or replace it"
            ) from error


def name_images(dataset: ConfigDict) -> None:
    """Put the pipeline of a dataset's config, in place, into `NamedImages`."""
    dataset.pipeline = [{"type": "NamedImages", "transforms": dataset.pipeline}]


@TRANSFORMS.register_module()
class Border(Pad):
    """Pad that leaves `img_shape` as the image's, to which boxes are clipped."""

    def transform(self, results: dict) -> dict:
        shape = results["img_shape"]
        return {**super().transform(results), "img_shape": shape}
