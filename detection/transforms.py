"""Reading photographs for detectors, each of which is named if it cannot be read."""

from mmcv.transforms import LoadImageFromFile, Pad
from mmdet.registry import TRANSFORMS
from PIL import Image, UnidentifiedImageError

from shvit.errors import InputError
from shvit.train.images import MAX_PIXELS


@TRANSFORMS.register_module()
class LoadPhotograph(LoadImageFromFile):
    """MMDetection's LoadImageFromFile (BGR, turned as EXIF says) that names a file that is no photograph.

    Raises:
        InputError: no such file, damaged, or more pixels than `shvit.train.images.MAX_PIXELS`.
    """

    def transform(self, results: dict) -> dict | None:
        path = results["img_path"]
        try:
            with Image.open(path) as image:  # the header alone
                pixels = image.width * image.height
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such photograph") from error
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise InputError(f"{path}: not a readable image ({error}); remove or replace it") from error
        if pixels > MAX_PIXELS:
            raise InputError(f"{path}: {pixels:,} pixels are more than the {MAX_PIXELS:,} allowed")
        try:
            return super().transform(results)
        except Exception as error:  # OpenCV gives None, on which the next line of theirs fails
            raise InputError(f"{path}: not a readable image (damaged); remove or replace it") from error


@TRANSFORMS.register_module()
class Border(Pad):
    """Pad that leaves `img_shape` the photograph's, inside of which boxes are kept."""

    def transform(self, results: dict) -> dict:
        shape = results["img_shape"]
        return {**super().transform(results), "img_shape": shape}
