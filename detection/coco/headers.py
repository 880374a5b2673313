"""Headers of image files, read many at once and without decoding an image."""

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from rich.progress import track

from shvit import terminal
from shvit.errors import InputError
from shvit.files import is_there, open_file, sha256
from shvit.train.data.images import FORMATS, exif_orientation

TURNED_BY_OPENCV = ("JPEG", "MPO", "PNG")
"""Pillow's names of the formats in which OpenCV looks for Exif's orientation; measured with 4.12."""
NAMED = ("TGA", "ICO", "PSD", "DDS")
"""Formats of which people have images, and OpenCV reads none."""
TAIL = 4096
THREADS = 8
MANY = 5000  # images from which on a bar is shown on a terminal


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one image file."""

    width: int
    """Width in pixels, as stored."""
    height: int
    orientation: int
    """Exif's orientation, 1 to 8; 1 where there is none."""
    format: str
    """Pillow's name of the format."""
    size_bytes: int
    tail: bytes
    """Digest of the last `TAIL` bytes: files of one length and tail may be copies of each other."""

    @property
    def turned(self) -> tuple[int, int]:
        """Width and height after the image is turned by its Exif orientation."""
        return (self.height, self.width) if self.orientation > 4 else (self.width, self.height)


@dataclass(frozen=True)
class Reader:
    """The options of a pipeline's LoadImageFromFile."""

    color_type: str = "color"
    backend: str = "cv2"

    def loaded(self, header: Header) -> tuple[int, int]:
        """Return the width and height of the image once it is loaded."""
        return header.turned if self.turns(header) else (header.width, header.height)

    def turns(self, header: Header) -> bool:
        """Return whether images like this one are turned by their Exif orientation when loaded."""
        if header.format == "TIFF":
            return True  # libtiff does it, whatever it is asked for
        if self.color_type not in ("color", "grayscale"):
            return False
        return self.backend == "pillow" or (self.backend == "cv2" and header.format in TURNED_BY_OPENCV)

    def opens(self, path: Path) -> bool:
        """Return whether the backend knows the format of a file."""
        import cv2

        return self.backend != "cv2" or cv2.haveImageReader(str(path))


@cache
def known_formats() -> list[str]:
    """Return the image formats that are opened here, and those that are only recognized, whatever a file's name."""
    Image.init()
    return [name for name in (*FORMATS, *NAMED) if name in Image.OPEN]


def read_headers(paths: Iterable[Path]) -> dict[Path, Header | str]:
    """Return each file's header, or, as text, why it cannot be read; a missing file is left out.

    In threads: files on another machine take longer to arrive than to be parsed.
    """
    paths = list(paths)
    known_formats()
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # of images with many pixels, which the caller counts
        shown = len(paths) >= MANY and terminal.is_terminal() and os.environ.get("RANK", "0") == "0"
        console = terminal.console(quiet=not shown)
        headers = pool.map(_read_header, paths, chunksize=16)
        following = track(headers, "headers", len(paths), console=console, transient=True) if shown else headers
        return {path: header for path, header in zip(paths, following, strict=True) if header is not None}


def _read_header(path: Path) -> Header | str | None:
    try:
        if not is_there(path):
            return None
        with open_file(path) as file, Image.open(file, formats=known_formats()) as image:
            width, height = image.size
            orientation = exif_orientation(image)
            if image.format == "TIFF" and orientation > 4:  # Pillow tells the size as shown
                width, height = height, width
            number = file.seek(0, os.SEEK_END)
            file.seek(max(0, number - TAIL))
            tail = hashlib.blake2b(file.read(TAIL), digest_size=8).digest()
            return Header(width, height, orientation, image.format or "", number, tail)
    except InputError as error:
        return str(error).removeprefix(f"{path}: ").removeprefix("is ").partition(";")[0]
    except UnidentifiedImageError:
        return "not an image, or of a format that is not read"
    except Exception as error:  # whatever a plug-in of Pillow's raises for a damaged file
        return f"not readable ({type(error).__name__})"


def copies(one: dict[Path, Header], other: dict[Path, Header]) -> list[tuple[Path, Path]]:
    """Return pairs of files, the second of `other`, that are the same file or have the same content."""
    alike = defaultdict(list)
    for path, header in one.items():
        alike[header.size_bytes, header.tail].append(path)
    digest = cache(sha256)
    pairs = []
    for path, header in other.items():
        if path in one:
            pairs.append((path, path))
            continue
        candidates = alike.get((header.size_bytes, header.tail), ())
        pairs += [(each, path) for each in candidates if digest(each) == digest(path)][:1]
    return pairs
