"""Which images a folder or a tar holds, and reading them; hidden files, and what systems leave behind, are left out."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
"""Suffixes of what is surely an image; a .tif may be anything."""
SUFFIXES = {*COMMON, ".ppm", ".pgm", ".pbm", ".tif", ".tiff"}
RARE_SUFFIXES = {".jfif", ".jpe", ".gif", ".avif", ".heic", ".heif", ".jp2"}
"""Listed if the file's header can be read here: HEIC needs a package, and phones name other things so too."""
HEIC_SUFFIXES = {".heic", ".heif"}
LEFT_BY_SYSTEMS = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
LEFT_BY_SYSTEMS |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}

MAX_LINKS = 1000
"""Ways to one folder: of thirty folders with two links each to the next one there are a thousand million."""

Sample = tuple[Path, int]


def is_hidden(name: str) -> bool:
    """Whether a file or folder was left by a system or a tool, such as `.ipynb_checkpoints`, `._x.jpg`, `__MACOSX`."""
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


# --- listing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The images of a folder or a tar, hidden ones left out, by their names relative to it."""

    root: Path
    label: str
    """What messages call it."""
    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Other files, by suffix."""
    members: dict[str, tuple[int, int]] | None = None
    """Of a tar: where each image begins, and its size in bytes."""

    def below(self, folder: str) -> "Listing":
        """The listing of a folder in it; what was skipped is not known for it alone."""
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
        """The names of the folders right in it, in one order however their accents are written."""
        return sorted((name for name in self.folders if "/" not in name), key=same_name)

    @property
    def loose(self) -> int:
        """Images that lie beside the class folders."""
        return sum("/" not in name for name in self.names)


def list_images(path: Path) -> Listing:
    """Every image in a folder and below it, or in a tar.

    Linked folders are followed, but for those that lead back to where they are.

    Raises:
        InputError: no such folder, or it cannot be read.
    """
    if is_file(path) and path.suffix.lower() == ".tar":
        return _list_tar(path)
    if not is_folder(path):
        raise InputError(f"{path}: no such folder" + (" (of files, a .tar is taken)" if is_file(path) else ""))
    try:
        return _list_folder(path)
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def _list_folder(root: Path) -> Listing:
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
                if _leads_nowhere(entry):
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
                elif _is_image(entry.name, partial(Path, entry.path)):
                    listing.names.append(name)
                else:
                    listing.skipped[_suffix(entry.name) or "without a suffix"] += 1
    listing.names.sort(key=_in_parts)
    listing.folders.sort(key=_in_parts)
    return listing


def _leads_nowhere(entry: os.DirEntry) -> bool:
    """Whether it is a link to what is not there, or to a link that leads back to it."""
    try:
        return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110  (ten times faster)
    except OSError:
        return True


SPECIAL_FILES = "special files"
"""FIFOs, sockets and devices: opening one may wait for ever."""


def _list_tar(path: Path) -> Listing:
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
                elif _is_image(name, partial(_member, path, member.offset_data, member.size)):
                    members[name] = member.offset_data, member.size
                else:
                    listing.skipped[_suffix(name) or "without a suffix"] += 1
    except InputError:
        raise
    except Exception as error:  # of a damaged header tarfile raises what its bytes bring about
        raise InputError(f"{path}: not a readable tar of class folders with images ({first_line(error)})") from error
    for name in members:
        parts = name.split("/")
        folders |= {"/".join(parts[:depth]) for depth in range(1, len(parts))}
    listing.names.extend(sorted(members, key=_in_parts))
    listing.folders.extend(sorted(folders - {""}, key=_in_parts))
    while len(listing.classes) == 1 and not listing.loose:  # tar -cf train.tar train
        below = listing.below(listing.classes[0])
        if below.loose or not below.names:
            break
        listing = Listing(path, str(path), below.names, below.folders, listing.skipped, below.members)
    return listing


def _inode(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116  (not of the link)
    return status.st_dev, status.st_ino


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122  (ten times faster, for a million names)


def _is_image(name: str, file: Callable[[], Path | io.BytesIO]) -> bool:
    suffix = _suffix(name)
    return suffix in SUFFIXES or (suffix in RARE_SUFFIXES and is_readable(file()))


def _in_parts(name: str) -> list[str]:
    """Sorts names as paths are sorted, by folder, then within it; alike however their accents are written."""
    return same_name(name).split("/")


def _member(path: Path, offset: int, size: int) -> io.BytesIO:
    if size > MAX_MEMBER:
        raise InputError(f"{path}: an image of {size / 1e9:.0f} GB is more than an image has; remove or replace it")
    with open_file(path) as file:  # not kept open: processes would share the position
        file.seek(offset)
        return io.BytesIO(file.read(size))


def describe_skipped(skipped: Counter[str]) -> str:
    """What was left out, by suffix, and what would read it."""
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items(), key=lambda each: -each[1])[:10])
    missing = HEIC_SUFFIXES & skipped.keys() and find_spec("pillow_heif") is None
    hint = "; to read .heic: pip install 'shvit[heic]'" if missing else ""
    return f"files left out: {counts}{hint}"


def image_files(folder: Path | None) -> list[Path]:
    """The images in a folder and below, sorted; those that scikit-image brings where None.

    Raises:
        InputError: the folder is not there or holds none.
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
    """Images by path, as one of timm's readers.

    Args:
        samples: (path, class index) of each.
        names: relative to its class's folder, each; its file's name by default.
    """

    def __init__(self, samples: Sequence[Sample], names: Sequence[str] | None = None):
        super().__init__()
        self.samples = list(samples)
        self.names = [path.name for path, _ in samples] if names is None else list(names)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)

    def size(self, index: int) -> int:
        """Bytes of a file."""
        return self.samples[index][0].stat().st_size

    def read(self, index: int) -> bytes:
        return read_bytes(self.samples[index][0], MAX_MEMBER)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return path.name if basename else str(path)


class TarFiles(Reader):
    """Images of a tar, as one of timm's readers; its `samples` have names in place of paths.

    Args:
        samples: (name in the listing, class index) of each.
        names: relative to its class's folder, each.
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

    def size(self, index: int) -> int:
        """Bytes of a file."""
        return self.places[index][1]

    def read(self, index: int) -> bytes:
        return _member(self.path, *self.places[index]).getvalue()

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0]
        return name.name if basename else f"{self.label}/{name.as_posix()}"


def class_reader(listing: Listing, classes: Sequence[str]) -> "Files | TarFiles":
    """A reader of the images in the folders of `classes`, in their order; its names are those of `same_name`."""
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
