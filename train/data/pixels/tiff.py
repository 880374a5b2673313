"""TIFF files of any number of channels and bits, which Pillow does not read, by the package tifffile.

The channels are the samples of the first page (together or in planes of their own), or as many pages of one sample.
"""

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from shvit.environment import advise
from shvit.errors import InputError

from ..images import MAX_BYTES, check_size, report_once
from .npy import check_dtype

if TYPE_CHECKING:
    from tifffile import TiffPage

HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""The first bytes of TIFF and BigTIFF files, in either byte order."""
UNCOMPRESSED = 1
COMPRESSIONS = {UNCOMPRESSED: "none", 5: "LZW", 8: "Deflate", 32946: "Deflate", 32773: "PackBits", 50000: "Zstandard"}
"""TIFF's Compression: those of bytes, whose decoders write no more than a segment's pixels."""
WHITE_IS_ZERO, RGB = 0, 2  # TIFF's PhotometricInterpretation; between them is BLACK_IS_ZERO
REDUCED_OR_MASK = 0b101  # TIFF's NewSubfileType
ORIENTATION, NODATA = 274, 42113  # TIFF's tag, and GDAL's


def read_tiff(file: BinaryIO, in_chans: int, name: str) -> np.ndarray:
    """Read (C, H, W) in the file's own type.

    Args:
        name: name in messages.

    Raises:
        InputError: the file has other channels, is stored in a way that is not read here, or a package is missing.
    """
    from tifffile import TiffFile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its notes on damaged files; errors are raised
    with TiffFile(file) as tiff:
        pages = _pages_of_channels(tiff, in_chans, name)
        for page in pages:
            _check_page(page, name)
        if sum(page.nbytes for page in pages) > MAX_BYTES:
            raise InputError(f"{name}: more than {MAX_BYTES:,} bytes of pixels; crop or remove it")
        array = np.concatenate([_read_page(page) for page in pages])
        _check_missing(array, pages[0], name)
    return _black_is_zero(array, pages[0], name)


def _pages_of_channels(tiff: Any, in_chans: int, name: str) -> "list[TiffPage]":
    """Return the first page, or as many pages as there are channels."""
    pages = _whole_pages(tiff)
    first = next(pages, None)
    if first is None:
        raise InputError(f"{name}: has no image in it; remove or replace it")
    if first.samplesperpixel == in_chans:
        if next(pages, None) is not None:
            report_once("pages", name)
        return [first]
    found = [first]
    for page in pages:
        if first.samplesperpixel > 1 or len(found) > in_chans:
            break
        found.append(page)
    if len(found) != in_chans or {page.shape for page in found} != {first.shape}:
        count = f"more than {in_chans}" if len(found) > in_chans else str(len(found))
        pages_found = f"{count} page{'s' * (count != '1')}"
        held = f"{first.samplesperpixel} channels" if first.samplesperpixel > 1 else f"{pages_found} of one channel"
        raise InputError(f"{name}: has {held}, and the model takes {in_chans}; give files of these channels")
    return found


def _whole_pages(tiff: Any) -> "Iterator[TiffPage]":
    """Yield the pages that are images of their own: no overviews and no masks; a chain of pages may be endless."""
    for index in range(MAX_PAGES):
        try:
            page = tiff.pages[index]
        except IndexError:
            return
        if not page.subfiletype & REDUCED_OR_MASK:
            yield page


MAX_PAGES = 100  # that are looked at: channels, and overviews between them


def _check_page(page: "TiffPage", name: str) -> None:
    """Check all that a page announces, before its pixels are read.

    Raises:
        InputError: it is not read here; a package is missing.
    """
    check_size(page.imagewidth, page.imagelength, name)
    if page.dtype is None or page.bitspersample != 8 * page.dtype.itemsize or page.imagedepth != 1:
        raise InputError(f"{name}: {page.bitspersample} bits for each value, or a volume; save images of 8, 16 or 32 "
                         "bits")  # fmt: skip
    check_dtype(page.dtype, name)
    if not WHITE_IS_ZERO <= page.photometric <= RGB:
        raise InputError(f"{name}: its channels are of TIFF's kind {int(page.photometric)} (a palette, inks, YCbCr or "
                         "CIELAB), and the model takes plain values; convert it")  # fmt: skip
    if page.compression not in COMPRESSIONS:
        raise InputError(f"{name}: compressed by a method that is not read here ({int(page.compression)}); save it "
                         f"with {', '.join(dict.fromkeys(COMPRESSIONS.values()))}")  # fmt: skip
    if (turned := page.tags.valueof(ORIENTATION, 1)) != 1:
        raise InputError(f"{name}: is stored turned (orientation {turned}); save it upright")
    if math.prod(page.chunks) * page.dtype.itemsize > MAX_BYTES or not _is_complete(page):
        raise InputError(f"{name}: parts of it are missing or too large; replace it")
    if page.compression != UNCOMPRESSED:
        _require_codecs(name)


def _is_complete(page: "TiffPage") -> bool:
    """Return whether a page's strips or tiles are in the file, and hold all pixels where they are not compressed."""
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    inside = all(0 < size <= page.parent.filehandle.size - begin for begin, size in parts)
    return inside and (page.compression != UNCOMPRESSED or sum(size for _, size in parts) >= page.nbytes)


def _require_codecs(name: str) -> None:
    """Check that the package of decoders is there, which never write more than they are told."""
    try:
        import imagecodecs  # noqa: F401  (which tifffile uses)
    except ModuleNotFoundError as error:
        raise InputError(f"{name}: is compressed; {advise('imagecodecs')}, or save it uncompressed") from error


def _read_page(page: "TiffPage") -> np.ndarray:
    """Return a page as (samples, H, W)."""
    pixels = page.asarray(maxworkers=1)
    if page.axes == "YXS":
        return np.moveaxis(pixels, -1, 0)
    return pixels if page.axes == "SYX" else pixels.reshape(-1, page.imagelength, page.imagewidth)


def _check_missing(array: np.ndarray, page: "TiffPage", name: str) -> None:
    """Refuse floats that the file itself declares as missing, which may be any number; integers are reported once."""
    try:
        missing = float(str(page.tags.valueof(NODATA)).strip("\0 "))
    except ValueError:
        return
    if not (count := int((array == missing).sum())):
        return
    if array.dtype.kind == "f":
        raise InputError(f"{name}: {count:,} values are {missing:g}, which it declares as missing; fill them, such as "
                         "with the channel's mean")  # fmt: skip
    report_once("missing", name)


def _black_is_zero(array: np.ndarray, page: "TiffPage", name: str) -> np.ndarray:
    if page.photometric != WHITE_IS_ZERO:
        return array
    if array.dtype.kind == "f":
        raise InputError(f"{name}: says that 0 is white, and nothing defines which value is black; save it otherwise")
    return np.iinfo(array.dtype).max - array
