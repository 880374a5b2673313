"""Listing and reading the images of a folder or a tar, without hidden files and those that systems leave behind."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from timm.data.readers.reader import Reader

from shvit.errors import InputError, first_line
from shvit.files import is_file, is_folder, open_file, read_bytes
from shvit.weights.run_info import same_name

from .images import is_readable
from .tars import MAX_MEMBER, Member, check_name

COMMON = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
"""Suffixes that only images have; a .tif may be anything."""
SUFFIXES = {*COMMON, ".ppm", ".pgm", ".pbm", ".tif", ".tiff"}
RARE_SUFFIXES = {".jfif", ".jpe", ".gif", ".avif", ".heic", ".heif", ".jp2"}
"""Suffixes that are listed if the file's header is readable: HEIC needs a package, and names other things too."""
HEIC_SUFFIXES = {".heic", ".heif"}
ARRAY_SUFFIXES = {".npy", ".tif", ".tiff"}
"""Suffixes of files that may have any number of channels."""
ALPHA_SUFFIXES = {".png", ".webp"}
"""Suffixes of images that may have two channels, gray and alpha, or four, RGB and alpha."""
LEFT_BY_SYSTEMS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
LEFT_BY_SYSTEMS |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}

MAX_LINKS = 1000
"""Limit of links to one folder: thirty folders with two links each to the next make a thousand million paths."""

Sample = tuple[Path, int]


def suffixes_of(in_chans: int) -> set[str]:
    """Return the suffixes of files that may be images of a number of channels, but for the rare ones."""
    if in_chans == 3:
        return SUFFIXES
    return ARRAY_SUFFIXES | {1: SUFFIXES, 2: ALPHA_SUFFIXES, 4: ALPHA_SUFFIXES}.get(in_chans, set())


def is_hidden(name: str) -> bool:
    """Return whether a name is hidden or left by a system or a tool: `.ipynb_checkpoints`, `._x.jpg`, `__MACOSX`."""
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


# --- listing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The images of a folder or a tar, without hidden ones, by their names relative to it."""

    root: Path
    label: str
    """Name in messages."""
    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of other files, by suffix."""
    members: dict[str, tuple[int, int]] | None = None
    """Offset and size in bytes of each image, in a tar; None for a folder."""

    def below(self, folder: str) -> "Listing":
        """Return the listing of a folder in it; `skipped` is empty, since it is not known for each folder."""
        start = f"{folder}/"

        def within(names: Iterable[str]) -> list[str]:
            return [name.removeprefix(start) for name in names if name.startswith(start)]

        members = None
        if self.members is not None:
            members = {name.removeprefix(start): at for name, at in self.members.items() if name.startswith(start)}
        root = self.root / folder if self.members is None else self.root
        return Listing(root, f"{self.label}/{folder}", within(self.names), within(self.folders), Counter(), members)

    @property
    def classes(self) -> list[str]:
        """Names of the top-level folders, in one order however their accents are written."""
        return sorted((name for name in self.folders if "/" not in name), key=same_name)

    @property
    def loose(self) -> int:
        """Number of images beside the class folders."""
        return sum("/" not in name for name in self.names)


def list_images(path: Path, in_chans: int = 3) -> Listing:
    """List every image in a folder and below it, or in a tar.

    Links to folders are followed, except those that lead back to a folder above them.

    Args:
        in_chans: number of channels that images have; an .npy file is one where it is not 3.

    Raises:
        InputError: no such folder, or it cannot be read.
    """
    if is_file(path) and path.suffix.lower() == ".tar":
        return _list_tar(path, in_chans)
    if not is_folder(path):
        raise InputError(
            f"{path}: no such folder" + (" (the only file that is accepted is a .tar)" if is_file(path) else "")
        )
    try:
        return _list_folder(path, in_chans)
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def _list_folder(root: Path, in_chans: int) -> Listing:
    listing = Listing(root, str(root))
    top = root.resolve()
    seen: Counter[tuple[int, int]] = Counter()
    pending = [("", frozenset(_inode(folder) for folder in (top, *top.parents)))]
    while pending:
        prefix, above = pending.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                name = prefix + entry.name
                if _is_broken_link(entry):
                    listing.skipped["broken links"] += 1
                elif entry.is_dir():
                    inode = _inode(entry.path)
                    if inode not in above:  # else a link to a folder that it is in
                        seen[inode] += 1
                        if seen[inode] > MAX_LINKS:
                            raise InputError(f"{root}: more than {MAX_LINKS} links lead to {name[:200]}, or to folders "
                                             "around it; remove links")  # fmt: skip
                        listing.folders.append(name)
                        pending.append((name + "/", above | {inode}))
                elif not entry.is_file():
                    listing.skipped[SPECIAL_FILES] += 1
                elif _is_image(entry.name, partial(Path, entry.path), in_chans):
                    listing.names.append(name)
                else:
                    listing.skipped[_suffix(entry.name) or "without a suffix"] += 1
    listing.names.sort(key=_sort_key)
    listing.folders.sort(key=_sort_key)
    return listing


def _is_broken_link(entry: os.DirEntry) -> bool:
    """Return whether an entry is a broken link, or one of a cycle of links."""
    try:
        return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110  (ten times faster)
    except OSError:
        return True


SPECIAL_FILES = "special files"
"""FIFOs, sockets and devices: opening one may block forever."""


def _list_tar(path: Path, in_chans: int) -> Listing:
    members: dict[str, tuple[int, int]] = {}
    folders: set[str] = set()
    listing = Listing(path, str(path), members=members)
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as archive:
            for member in archive:
                check_name(member.name)
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if any(is_hidden(part) for part in parts):
                    continue
                name = "/".join(parts)
                if member.isdir():
                    folders.add(name)
                elif not member.isfile() or member.issparse():
                    listing.skipped["links and special files"] += 1
                elif _is_image(name, partial(_member, path, member.offset_data, member.size), in_chans):
                    members[name] = member.offset_data, member.size
                else:
                    listing.skipped[_suffix(name) or "without a suffix"] += 1
    except InputError:
        raise
    except Exception as error:  # for a damaged header tarfile raises many types
        raise InputError(f"{path}: not a readable tar of class folders with images ({first_line(error)})") from error
    for name in members:
        parts = name.split("/")
        folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
    listing.names.extend(sorted(members, key=_sort_key))
    listing.folders.extend(sorted(folders - {""}, key=_sort_key))
    while len(listing.classes) == 1 and not listing.loose:  # tar -cf train.tar train
        below = listing.below(listing.classes[0])
        if below.loose or not below.names:
            break
        listing = Listing(path, below.label, below.names, below.folders, listing.skipped, below.members)
    return listing


def _inode(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116  (not of the link)
    return status.st_dev, status.st_ino


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  (ten times faster, for a million names)


def _is_image(name: str, file: Callable[[], Path | io.BytesIO], in_chans: int) -> bool:
    suffix = _suffix(name)
    return suffix in suffixes_of(in_chans) or (suffix in RARE_SUFFIXES and in_chans in (1, 3) and is_readable(file()))


def _sort_key(name: str) -> list[str]:
    """Return the sort key of a name: by folder, then within it, however accents are written."""
    return same_name(name).split("/")


def _member(path: Path, offset: int, size: int) -> io.BytesIO:
    if size > MAX_MEMBER:
        raise InputError(f"{path}: an image of {size / 1e9:.0f} GB is too large; remove or replace it")
    with open_file(path) as file:  # not kept open: processes would share the position
        file.seek(offset)
        return io.BytesIO(file.read(size))


def describe_skipped(skipped: Counter[str]) -> str:
    """Describe the skipped files by suffix, and the package that would read them."""
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items(), key=lambda each: -each[1])[:10])
    missing = HEIC_SUFFIXES & skipped.keys() and find_spec("pillow_heif") is None
    hint = "; to read .heic: pip install 'shvit[heic]'" if missing else ""
    return f"files skipped: {counts}{hint}"


def image_files(folder: Path | None) -> list[Path]:
    """List the images in a folder and below it, sorted; the samples of scikit-image for None.

    Raises:
        InputError: no such folder, or no images in it.
    """
    if folder is None:
        import skimage

        folder = Path(skimage.__file__).parent / "data"
    if not is_folder(folder):
        raise InputError(f"{folder}: no such folder of images")
    names = [name for name in list_images(folder).names if _suffix(name) in COMMON]
    if not names:
        raise InputError(f"{folder}: no images in it ({', '.join(sorted(COMMON))})")
    return [folder / name for name in names]


# --- reading ----------------------------------------------------------------------------------------------------------


class Files(Reader):
    """Images by path, as a timm reader.

    Args:
        samples: (path, class index) of each.
        names: name of each, relative to its class's folder; its file name by default.
    """

    def __init__(self, samples: Sequence[Sample], names: Sequence[str] | None = None):
        super().__init__()
        self.samples = list(samples)
        self.names = [path.name for path, _ in samples] if names is None else list(names)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, start: int, stop: int) -> "Files":
        """Return a reader of some of the images, from `start` up to `stop`."""
        return Files(self.samples[start:stop], self.names[start:stop])

    def size(self, index: int) -> int:
        """Return the size of a file in bytes."""
        return self.samples[index][0].stat().st_size

    def read(self, index: int) -> bytes:
        """Return the content of a file."""
        return read_bytes(self.samples[index][0], MAX_MEMBER)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return path.name if basename else str(path)


class TarFiles(Reader):
    """Images of a tar, as a timm reader; its `samples` have names in place of paths.

    Args:
        samples: (name in the listing, class index) of each.
        names: name of each, relative to its class's folder.
    """

    def __init__(self, listing: Listing, samples: Sequence[tuple[str, int]], names: Sequence[str]):
        super().__init__()
        assert listing.members is not None
        self.path, self.label = listing.root, listing.label
        self.samples = [(Path(name), target) for name, target in samples]
        self.places = [listing.members[name] for name, _ in samples]
        self.names = list(names)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        return _member(self.path, *self.places[index]), self.samples[index][1]

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, start: int, stop: int) -> "TarFiles":
        """Return a reader of some of the images, from `start` up to `stop`."""
        taken = copy(self)
        for name in ("samples", "places", "names"):
            setattr(taken, name, getattr(self, name)[start:stop])
        return taken

    def size(self, index: int) -> int:
        """Return the size of a file in bytes."""
        return self.places[index][1]

    def read(self, index: int) -> bytes:
        """Return the content of a file."""
        return _member(self.path, *self.places[index]).getvalue()

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0]
        return name.name if basename else f"{self.label}/{name.as_posix()}"


def class_reader(listing: Listing, classes: Sequence[str]) -> Files | TarFiles:
    """Create a reader of the images in the folders of `classes`, in their order; names are those of `same_name`."""
    places = {same_name(name): index for index, name in enumerate(classes)}
    found = []
    for name in listing.names:
        folder, inside, rest = name.partition("/")
        target = places.get(same_name(folder))
        if inside and target is not None:
            found.append((target, name, same_name(rest)))
    found.sort(key=lambda each: each[0])  # stable: by class, then as listed
    names = [rest for _, _, rest in found]
    if listing.members is not None:
        return TarFiles(listing, [(name, target) for target, name, _ in found], names)
    return Files([(listing.root / name, target) for target, name, _ in found], names)
