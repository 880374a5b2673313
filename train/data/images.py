"""The image decoder of training, evaluation, calibration and verification: files in RGB, as viewers show them.

| in the file | result |
| --- | --- |
| Exif (or TIFF) orientation | applied; XMP's is not, as in browsers and OpenCV |
| transparency: alpha, a transparent palette entry or color | composited on white, the ground of a page |
| 16-bit grayscale | divided by 256, as OpenCV and browsers do; 12-bit TIFF by 16 |
| 32-bit integers, floats, signed values below 0 | refused: the file does not define which value is white |
| animation, several pages | the first frame or page |
| CMYK, YCbCr, CIELAB, HSV, palettes, 1 bit | converted by Pillow; color profiles are not applied |

`export/web/pixels.js` does the same in browsers.
"""

import mmap
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from shvit import terminal
from shvit.errors import InputError, first_line
from shvit.files import check_file, open_file

MAX_PIXELS = 100_000_000  # decoding one takes 300 MB; more is a mistake or an attack
MAX_BYTES = 1 << 30  # in a file; some decoders read all of it into memory
MAX_ASPECT = 500  # longer side over shorter; a thinner image, resized for a model, would take gigabytes
MAX_SCANS = 500  # in a progressive JPEG, each over all its pixels; encoders write about ten
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
"""Pillow's names of the accepted formats; its others are rarely images, or run a program."""
MAY_HAVE_FRAMES = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
WHITE = (255, 255, 255)
ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
WHITE_IS_ZERO = 0  # TIFF's PhotometricInterpretation
SIGNED = 2  # TIFF's SampleFormat
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
ORIENTATION = 0x0112  # Exif's tag, and TIFF's
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns an image upright, by Exif orientation."""

EpsImagePlugin.gs_binary = False  # images that other libraries open must not run Ghostscript either


def open_image(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Open an image file in RGB, as viewers show it.

    Args:
        file: its path, or the file, open for reading.
        name: name in messages; the path if None.

    Raises:
        InputError: the file is not an image, damaged, larger than `MAX_PIXELS`, in a format without one way to show it,
            or in one whose package is missing.
    """
    name = name or str(file)
    with named_errors(name), opened(file) as stream, open_pillow(stream, name) as image:
        check_size(image.width, image.height, name)
        if image.info.get("progressive") and _scans(stream) > MAX_SCANS:
            raise InputError(f"{name}: a JPEG of more than {MAX_SCANS} scans; save it again, or remove it")
        if image.format in MAY_HAVE_FRAMES and getattr(image, "is_animated", False):
            report_once("pages" if image.format == "TIFF" else "frames", name)
        return _to_rgb(image, name)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image that another library has opened to RGB, as `open_image` does with a file.

    Raises:
        InputError: as `open_image`.
    """
    with named_errors(name):
        if image.format not in (None, *FORMATS):  # opened, but not decoded yet
            raise InputError(f"{name}: {image.format}, and not one of {', '.join(FORMATS)}; convert or remove it")
        check_size(image.width, image.height, name)
        return _to_rgb(image, name)


def is_readable(file: Path | BinaryIO) -> bool:
    """Return whether a file has the header of an image that can be opened."""
    try:
        with named_errors(""), opened(file) as stream, open_pillow(stream, ""):
            return True
    except InputError:
        return False


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Turn Pillow's errors into InputErrors that name the file, and hide its warnings.

    Each decoder raises its own types for malformed files, RuntimeError and RecursionError too, so any exception makes
    the image unreadable.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not a readable image (not one of {', '.join(FORMATS)}, or a TIFF whose pixels "
                         "are stored in a way that Pillow does not read); convert, replace or remove "
                         "it") from error  # fmt: skip
    except Exception as error:
        raise InputError(f"{name}: not a readable image ({first_line(error)}); remove or replace it") from error


# --- opening ----------------------------------------------------------------------------------------------------------


@cache
def _formats() -> list[str]:
    """Return the `FORMATS` that the installed Pillow can read."""
    Image.init()
    return [each for each in FORMATS if each in Image.OPEN]


@contextmanager
def opened(file: Path | BinaryIO) -> Iterator[BinaryIO]:
    """Open a path for reading: given a path, Pillow would map a TIFF into memory by its size after rotation."""
    if not isinstance(file, Path):
        yield file
        return
    try:
        opened: BinaryIO = open(file, "rb", opener=_without_waiting)  # noqa: SIM115
    except (OSError, ValueError):
        opened = open_file(file)  # raises an error with the reason
    with opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode):
            check_file(file)  # which says what it is
        if status.st_size > MAX_BYTES:
            raise InputError(f"{file}: {status.st_size / 1e9:.1f} GB is too large for an image; remove or replace it")
        yield opened


def _without_waiting(name: str, flags: int) -> int:
    """Open as `open_file` does, with one system call: a loader opens a thousand files a second."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def check_size(width: int, height: int, name: str) -> None:
    """Raise InputError for an image of no pixels, of more than are decoded here, or that is as thin as a line."""
    if not 0 < width * height <= MAX_PIXELS:
        raise InputError(f"{name}: {width}×{height} pixels, and 1 to {MAX_PIXELS:,} are allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(f"{name}: {width}×{height} pixels, more than {MAX_ASPECT} times as long as wide; "
                         "crop or remove it")  # fmt: skip


def _scans(file: BinaryIO) -> int:
    """Return an upper bound on a JPEG's scans; a marker's two bytes never occur in compressed data."""
    place = file.tell()
    file.seek(0)
    count = file.read().count(b"\xff\xda")
    file.seek(place)
    return count


def open_pillow(file: BinaryIO, name: str) -> Image.Image:
    """Open a file by Pillow, of one of the `FORMATS`, without decoding it."""
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        brand = _brand(file)
        if brand == b"avif" and "AVIF" not in Image.OPEN:
            raise InputError(f"{name}: an AVIF image, which Pillow reads from 11.3 on; update it with: "
                             "pip install -U Pillow") from None  # fmt: skip
        if brand not in HEIF_BRANDS:
            raise
    _register_heif(name)
    return Image.open(file, formats=["HEIF"])


def _brand(file: BinaryIO) -> bytes:
    """Return the brand of an ISO media file; empty for any other file."""
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    return head[8:12] if head[4:8] == b"ftyp" else b""


def _register_heif(name: str) -> None:
    try:
        import pillow_heif
    except ModuleNotFoundError as error:
        raise InputError(f"{name}: a HEIC image, which needs the package pillow-heif; install it with: "
                         "pip install 'shvit[heic]'") from error  # fmt: skip
    pillow_heif.register_heif_opener()


# --- pixels -----------------------------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    tags, key = getattr(image, "tag_v2", {}), _transparent_gray(image)
    bits, white_is_zero = _first(tags.get(BITS_PER_SAMPLE, 16)), tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    if image.mode == "F" or (image.mode == "I" and bits > 16):  # PNG, PPM and TIFF of 16 bits also have mode I
        kind = "floats" if image.mode == "F" else f"{bits}-bit integers"
        raise InputError(f"{name}: its pixels are {kind}, and nothing defines which value is white; save it with 8 or "
                         "16 bits")  # fmt: skip
    image = turn_upright(image)
    if image.mode == "L" and _first(tags.get(SAMPLE_FORMAT, 1)) == SIGNED:
        check_range(np.asarray(image).view(np.int8), bits, name)
    if image.mode.startswith("I"):
        return _from_16_bits(image, bits, white_is_zero, key, name)
    if image.mode == "LAB":
        return _from_lab(image)
    if key is not None:
        image.info["transparency"] = key
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        ground = Image.new("RGB", image.size, WHITE)
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def turn_upright(image: Image.Image) -> Image.Image:
    """Return the image, decoded, turned as its orientation says."""
    if image.format == "TIFF":
        image.info.pop("xmp", None)  # Pillow would rotate by it
    image.load()  # Pillow rotates a TIFF by itself
    transposition = UPRIGHT.get(exif_orientation(image))
    if transposition is None:
        return image
    upright = image.transpose(transposition)
    upright.info.pop("exif", None)  # so that nothing rotates it again
    return upright


def exif_orientation(image: Image.Image) -> int:
    """Return the Exif orientation, 1 to 8, or 1 without one; XMP's is ignored, as in browsers and OpenCV."""
    if image.format == "TIFF":
        value = getattr(image, "tag_v2", {}).get(ORIENTATION)
    else:
        exif = Image.Exif()
        try:
            exif.load(image.info.get("exif", b""))
            value = exif.get(ORIENTATION)
        except Exception:  # damaged metadata; viewers show such an image as stored
            value = None
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _first(value: int | tuple[int, ...]) -> int:
    return value[0] if isinstance(value, tuple) else value


def _transparent_gray(image: Image.Image) -> int | None:
    """Return a PNG's transparent gray level, scaled for 2 and 4 bits, where Pillow scales only the pixels."""
    key = image.info.get("transparency")
    if not isinstance(key, int) or image.mode not in ("L", "I;16"):
        return None
    tile = getattr(image, "tile", None)  # empty as soon as the image is loaded
    return key * {"L;2": 85, "L;4": 17}.get(tile[0][3] if tile else "", 1)


def _from_16_bits(image: Image.Image, bits: int, white_is_zero: bool, key: int | None, name: str) -> Image.Image:
    levels = np.asarray(image)  # of 2 or 4 bytes each, with and without a sign
    highest = check_range(levels, bits, name)
    if bits == 16 and 0 < highest < 4096:
        report_once("dark", f"{name}: 16 bits, and no value above {highest}")
    gray = levels >> (bits - 8)
    if white_is_zero:
        gray = 255 - gray
    if key is not None:
        gray[levels == key] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def check_range(levels: np.ndarray, bits: int, name: str) -> int:
    """Return the highest value; refuse an image with values outside of `bits` unsigned bits."""
    lowest, highest = int(levels.min()), int(levels.max())
    if lowest < 0 or highest >= 2**bits:
        raise InputError(f"{name}: values from {lowest} to {highest}, and {bits} bits hold 0 to {2**bits - 1}; save it "
                         "with 8 or 16 bits, without a sign")  # fmt: skip
    return highest


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # None only if done in place
    return converted


# --- notes ------------------------------------------------------------------------------------------------------------

NOTES = {
    "frames": "an animation; only the first frame of such files is read",
    "pages": "several pages; only the first page of such files is read",
    "missing": "values that it declares as missing; such integers are taken as any others",
    "dark": "divided by 256 as viewers do, this is nearly black; scale such images to all of their 16 bits",
}
_reported = mmap.mmap(-1, len(NOTES))  # flags of reported notes, shared with a loader's forked workers


def report_once(note: str, name: str) -> None:
    """Report a note on stderr, only the first time."""
    index = list(NOTES).index(note)
    if not _reported[index]:
        _reported[index] = 1
        terminal.report(f"{name}: {NOTES[note]}")
