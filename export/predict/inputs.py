"""The images that a command's inputs name: files, folders, patterns, lists, tars, shards and videos, in one order."""

import glob
import hashlib
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from timm.data.readers.reader import Reader

from shvit.errors import InputError
from shvit.files import is_file, is_folder, is_there
from shvit.train.data.image_folders import SUFFIXES, Files, TarFiles, describe_skipped, is_hidden, list_images
from shvit.train.data.locations import check_path, expand_braces

from .videos import VIDEO_SUFFIXES, Video, open_video

STDIN = "-"
MAX_LIST_BYTES = 4 << 30
"""Limit of a list on stdin: of ten million long paths."""
ARCHIVES = {".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"}
UNLABELED = 0  # the class index that readers of images want
Log = Callable[[str], None]
AnyFiles = Files | TarFiles


class Joined(Reader):
    """The images of several readers, one after the other, as a timm reader."""

    def __init__(self, readers: Sequence[AnyFiles]):
        super().__init__()
        self.readers = list(readers)
        self.ends = list(accumulate(map(len, readers)))

    def _find(self, index: int) -> tuple[AnyFiles, int]:
        place = bisect_right(self.ends, index)
        return self.readers[place], index - (self.ends[place - 1] if place else 0)

    def __getitem__(self, index: int) -> tuple[Path | BinaryIO, int]:
        reader, place = self._find(index)
        return reader[place]

    def take(self, start: int, stop: int) -> "Joined":
        """Return a reader of some of the images, from `start` up to `stop`."""
        begins = [0, *self.ends]
        overlaps = ((reader, max(start - begin, 0), min(stop - begin, len(reader)))
                    for reader, begin in zip(self.readers, begins, strict=False))  # fmt: skip
        return Joined([reader.take(first, last) for reader, first, last in overlaps if first < last])

    def __len__(self) -> int:
        return self.ends[-1]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        reader, place = self._find(index)
        return reader.filename(place, basename, absolute)


Part = Joined | Video


@dataclass(frozen=True)
class Inputs:
    """All images of a job: parts in order, each of which is read by one loader."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        """Return the number of images; that of a video's frames is what the file says of itself."""
        return sum(map(len, self.parts))

    @property
    def has_frames(self) -> bool:
        return any(isinstance(part, Video) for part in self.parts)

    def digest(self) -> str:
        """Return a hash of the images' names, and for tars and videos of where they are, or of their size and date."""
        digest = hashlib.sha256()
        for part in self.parts:
            for line in part.identity() if isinstance(part, Video) else _identities(part):
                digest.update(os.fsencode(line) + b"\0")
        return digest.hexdigest()


def _identities(part: Joined) -> Iterator[str]:
    for reader in part.readers:
        for index in range(len(reader)):
            yield reader.filename(index)
            if isinstance(reader, TarFiles):
                yield str(reader.places[index])


def find_inputs(
    inputs: Sequence[str], every: int, log: Log, stdin: BinaryIO | None = None, in_chans: int = 3
) -> Inputs:
    """Return the images that inputs name.

    Args:
        inputs: image files, folders, uncompressed tars, folders of shards, videos, patterns such as `a/**/*.jpg` and
            `train-{0000..0099}.tar`, or - for a list of such paths on stdin, separated by newlines or NULs.
        every: take every n-th frame of a video.
        log: called with a line about what is left out.
        stdin: where a list is read from; the process's own by default.
        in_chans: number of channels of the model's images, by which a folder's files are chosen.

    Raises:
        InputError: an input is nothing, or holds no images.
    """
    readers: list[AnyFiles | Video] = []
    loose: list[Path] = []  # image files that no reader has yet

    def close() -> None:
        if loose:
            readers.append(_files(loose))
            loose.clear()

    for path in _paths(inputs, stdin):
        if path.suffix.lower() in SUFFIXES and not os.path.isdir(path):  # noqa: PTH112  (raises nothing, of a million)
            loose.append(path)
            continue
        for reader in _open(path, every, log, in_chans):
            if isinstance(reader, Path):
                loose.append(reader)
            else:
                close()
                readers.append(reader)
    close()
    if not readers:
        raise InputError("no images; give image files, folders, tars or videos, or - for a list of them on stdin")
    return Inputs(tuple(_join(readers)))


def _files(paths: Sequence[Path]) -> Files:
    return Files([(path, UNLABELED) for path in paths], [])


def _join(readers: Iterable[AnyFiles | Video]) -> Iterator[Part]:
    """Yield the readers with those of images that follow each other joined."""
    images: list[AnyFiles] = []
    for reader in readers:
        if not isinstance(reader, Video):
            images.append(reader)
            continue
        if images:
            yield Joined(images)
            images = []
        yield reader
    if images:
        yield Joined(images)


# --- paths ------------------------------------------------------------------------------------------------------------


def _paths(inputs: Sequence[str], stdin: BinaryIO | None) -> Iterator[Path]:
    """Yield the paths that inputs name; those of a list need not be there, and count as damaged images then."""
    for text in inputs:
        if text == STDIN:
            yield from _listed(stdin or sys.stdin.buffer)
            continue
        if not text:
            raise InputError("an input is empty; give the path of an image, a folder, a tar or a video")
        check_path(Path(text), "the input")
        yield from [Path(text)] if is_there(text) else _matching(text)


def _listed(stdin: BinaryIO) -> Iterator[Path]:
    content = stdin.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        raise InputError(f"the list on stdin has more than the {MAX_LIST_BYTES / 1e9:.0f} GB allowed; give parts of it")
    entries = content.split(b"\0") if b"\0" in content else content.splitlines()
    for entry in filter(None, entries):
        path = Path(os.fsdecode(entry))
        check_path(path, "the list on stdin")
        yield path


def _matching(text: str) -> list[Path]:
    """Return the paths that a pattern of shells or of WebDataset stands for, in order."""
    found = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []  # noqa: PTH207  (absolute ones too)
    found = [name for name in found if not any(map(is_hidden, Path(name).parts[-1:]))]
    if not found and "{" in text:
        found = expand_braces(text)
        missing = next((name for name in found if not is_there(name)), None)
        if missing is not None:
            raise InputError(f"{text}: stands for {missing}, which is not there; correct the pattern")
    if not found:
        raise InputError(f"{text}: {'nothing matches' if glob.has_magic(text) else 'no such file or folder'}; give an "
                         "image, a folder, a tar, a video, or - for a list on stdin")  # fmt: skip
    return [Path(name) for name in found]


# --- readers ----------------------------------------------------------------------------------------------------------


def _open(path: Path, every: int, log: Log, in_chans: int) -> Iterator[Path | AnyFiles | Video]:
    """Yield what reads a path's images: itself for an image, readers for a folder, a tar or a video."""
    suffix = path.suffix.lower()
    if is_folder(path):
        yield from _open_folder(path, log, in_chans)
    elif suffix == ".tar" and is_file(path):
        yield _open_tar(path, log, in_chans)
    elif suffix in VIDEO_SUFFIXES and is_file(path):
        yield open_video(path, every)
    elif suffix in ARCHIVES:
        raise InputError(f"{path}: is a compressed archive; give a folder, or a .tar that is not compressed")
    else:
        yield path


def _open_folder(folder: Path, log: Log, in_chans: int) -> Iterator[AnyFiles]:
    """Yield the images of a folder and below it; where it has none, those of the tars in it, which are shards."""
    listing = list_images(folder, in_chans)
    if listing.names:
        if listing.skipped:
            log(f"{folder}: {describe_skipped(listing.skipped)}")
        yield _files([folder / name for name in listing.names])
        return
    shards = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tar" and not is_hidden(path.name))
    if not shards:
        held = f" ({describe_skipped(listing.skipped)})" if listing.skipped else ""
        raise InputError(f"{folder}: no images in it{held}; give a folder of images or of shards")
    yield from map(partial(_open_tar, log=log, in_chans=in_chans), shards)


def _open_tar(path: Path, log: Log, in_chans: int) -> TarFiles:
    listing = list_images(path, in_chans)
    if not listing.names:
        raise InputError(f"{path}: no images in it; give a tar of images")
    others = {suffix: count for suffix, count in listing.skipped.items() if suffix not in (".cls", ".json", ".txt")}
    if others:
        log(f"{path}: {describe_skipped(type(listing.skipped)(others))}")
    return TarFiles(listing, [(name, UNLABELED) for name in listing.names], [])
