"""Files: whether one is there, reading it within bounds, writing it atomically, and its hash."""

import errno
import glob
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import CheckFailed, InputError, first_line

BLOCK = 1 << 20  # bytes
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EBADF}
SPECIAL = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
"""What a path may lead to besides files and folders: opening or reading one may never end."""


# --- reading ----------------------------------------------------------------------------------------------------------


def is_file(path: str | os.PathLike) -> bool:
    """Return whether a regular file is there, links followed.

    Raises:
        InputError: a permission or the name does not allow to find out, or it is neither a file nor a folder.
    """
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | os.PathLike) -> bool:
    """Return whether a folder is there; raises as `is_file`."""
    return stat.S_ISDIR(_mode(path))


def is_there(path: str | os.PathLike) -> bool:
    """Return whether a regular file or a folder is there; raises as `is_file`."""
    return _mode(path) != 0


def check_file(path: str | os.PathLike) -> Path:
    """Return the path of a regular file; raise InputError where nothing, or something else, is there."""
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder; name a file")
    if not mode:
        raise InputError(f"{path}: no such file")
    return Path(path)


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Return a regular file, open for reading; raise InputError as `check_file`, or if it cannot be opened."""
    check_file(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was put there since
        os.close(descriptor)
        raise InputError(f"{path}: is not a file; name a file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | os.PathLike, limit: int) -> bytes:
    """Return a file's content; raise InputError as `open_file`, or if it has more than `limit` bytes."""
    content = bytearray()
    with open_file(path) as file:
        try:
            while len(content) <= limit and (block := file.read(min(BLOCK, limit + 1 - len(content)))):
                content += block  # to ask for the limit at once would take memory for it
        except OSError as error:
            raise _unreadable(path, error) from error
    if len(content) > limit:
        raise InputError(f"{path}: is larger than the {limit / 1e6:.0f} MB allowed")
    return bytes(content)


def read_text(path: str | os.PathLike, limit: int) -> str:
    """Return a file's text in UTF-8, without a mark at its beginning; raises as `read_bytes`."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text; save it as UTF-8") from error


def _mode(path: str | os.PathLike) -> int:
    """Return the mode of what a path leads to; 0 where nothing is there."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, OSError) and error.errno in ABSENT:
            return 0
        raise _unreadable(path, error) from error
    special = next((name for is_special, name in SPECIAL if is_special(mode)), None)
    if special:
        raise InputError(f"{path}: is {special}; name a file or a folder")
    return mode


def _unreadable(path: str | os.PathLike, error: Exception) -> InputError:
    name, reason = str(path), getattr(error, "strerror", None) or first_line(error)
    return InputError(f"{name if len(name) < 200 else f'{name[:100]}…'}: cannot be read: {reason}")


# --- writing ----------------------------------------------------------------------------------------------------------

PARTIAL = re.compile(r"\.(?P<pid>\d+)-(?P<host>[0-9a-f]{8})\.partial(?=\.|$)")
"""What stands in the name of a file that is being written: the process that writes it, and where that runs."""
STALE_S = 86400.0
"""Age from which another machine's partial file counts as left behind: whether its process lives cannot be known."""


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a name beside `path`, with its suffix, to write a file or a folder to; rename it to `path` at the end.

    If the body raises, what it wrote is removed and `path` stays as it was. What processes that were killed have left
    beside `path` is removed at the beginning.

    Raises:
        InputError: the folder cannot be made or written to; or what is at `path` is not what is written there: a folder
            and a file was written, or the reverse, a symbolic link, or a file or folder of another format.
    """
    path = Path(path)
    partial = partial_name(path)
    check_replaceable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # permissions are not enough: root may write anywhere, but not to a read-only file system
        _remove_left_behind(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        with needs_room(path):
            yield partial
        if path.is_dir() and not partial.is_dir():
            raise InputError(f"{path}: is a folder; choose another name")
        if path.is_file() and partial.is_dir():
            raise InputError(f"{path}: is a file; choose another name")
        check_replaceable(path)  # it may have been put there since
        try:
            _replace(partial, path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        remove(partial)


@contextmanager
def needs_room(path: Path, name: str = "", is_temporary: bool = False) -> Iterator[None]:
    """Report a full disk in one line, in a block that writes below or beside `path`, or to temporary files.

    Args:
        name: what the message calls it; the path where empty.
        is_temporary: something else is written in the block, too, and what holds that says so where that disk is full.

    Raises:
        InputError: a disk is full, whatever the library that met it raised.
    """
    try:
        yield
    except (InputError, CheckFailed):
        raise
    except Exception as error:
        elsewhere = is_temporary and shutil.disk_usage(path.parent).free > NEARLY_FULL_BYTES
        if not elsewhere and (reason := _lack_of_room(error, path)):
            raise InputError(f"{name or path}: cannot be written: {reason}; make room and try again, what was there is "
                             "kept") from error  # fmt: skip
        raise


@contextmanager
def scratch_folder(path: Path | None = None) -> Iterator[Path]:
    """Give a temporary folder, removed at the end; raise as `atomic_write` where a disk is full.

    Args:
        path: what is to be written in the end, and the folder is beside; in the system's own place where None.
    """
    place = Path(tempfile.gettempdir(), "shvit-files") if path is None else path
    name = f"temporary files in {tempfile.gettempdir()}" if path is None else ""
    try:
        with _made_folder(path) as folder, needs_room(place, name, is_temporary=path is None):
            yield folder
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(f"{name or place}: cannot be written: {error.strerror}; make room and try again") from error


@contextmanager
def _made_folder(path: Path | None) -> Iterator[Path]:
    if path is None:
        _remove_scratch()
        with tempfile.TemporaryDirectory(prefix=f"shvit.{os.getpid()}-{_host()}.partial.") as name:
            yield Path(name)
        return
    parts = path.with_suffix(".parts")
    _remove_left_behind(parts)
    folder = partial_name(parts)
    folder.mkdir()
    try:
        yield folder
    finally:
        remove(folder)


def _remove_scratch() -> None:
    """Remove this account's temporary folders of processes that were killed; what it cannot be sure of stays."""
    user = os.getuid() if hasattr(os, "getuid") else 0  # Windows has 0 for all files
    with suppress(OSError):
        for each in Path(tempfile.gettempdir()).glob("shvit.*.partial.*"):
            match, status = PARTIAL.match(each.name.removeprefix("shvit")), each.lstat()
            own = stat.S_ISDIR(status.st_mode) and status.st_uid == user
            if match and own and _was_left_behind(each, match):
                remove(each)


NO_ROOM_WORDS = re.compile(
    r"no space left|disk quota|file too large|file write failed|unexpected pos \d+ vs|iostream error", re.I
)
"""What libraries say that do not pass on the system's error: PyTorch's and OpenVINO's writers among them."""
FULL_BYTES = 1 << 16
NEARLY_FULL_BYTES = 1 << 26  # an exported model has up to about 60 MB


def _lack_of_room(error: BaseException, path: Path) -> str | None:
    """Return the system's message about a full disk, where that is why something was not written."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        seen.append(each)
        if isinstance(each, OSError) and each.errno in NO_ROOM:
            return each.strerror
        each = each.__cause__ or each.__context__
    folders = [folder for folder in (*path.parents, Path(tempfile.gettempdir())) if folder.is_dir()]
    full = any(shutil.disk_usage(folder).free < FULL_BYTES for folder in (folders[0], folders[-1]))
    mentioned = any(NO_ROOM_WORDS.search(str(each)) for each in seen)
    return os.strerror(errno.ENOSPC) if full or mentioned else None


def partial_name(path: Path) -> Path:
    """Return the hidden name beside `path`, with its suffix, that this process writes it under."""
    return path.with_name(f".{_short_stem(path)}.{os.getpid()}-{_host()}.partial{path.suffix}")


MAX_STEM = 160  # bytes; a file name has up to 255


def _short_stem(path: Path) -> str:
    """Return the beginning of a partial file's name: the name without suffix, or a hash of a long one."""
    encoded = os.fsencode(path.stem)
    return path.stem if len(encoded) <= MAX_STEM else hashlib.sha256(encoded).hexdigest()


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _replace(partial: Path, path: Path) -> None:
    """Rename; a folder that is in the way is removed once the new one is in its place."""
    if not path.is_dir():
        partial.replace(path)
        return
    old = partial.with_name(f"{partial.name}.old")
    path.replace(old)
    try:
        partial.replace(path)
    except OSError:
        old.replace(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_left_behind(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left, and put back what they replaced."""
    stem = _short_stem(path)
    for each in path.parent.glob(f".{glob.escape(stem)}.*.partial*"):
        rest = each.name.removeprefix(f".{stem}")
        match = PARTIAL.match(rest)
        if not match or not _was_left_behind(each, match):
            continue
        if rest[match.end() :] == f"{path.suffix}.old" and not path.exists():
            each.replace(path)  # killed between two renames
        elif rest[match.end() :].removesuffix(".old") == path.suffix:
            remove(each)


def _was_left_behind(each: Path, match: re.Match[str]) -> bool:
    if match["host"] == _host() and os.name == "posix":  # elsewhere asking for a process may end it
        return not _lives(int(match["pid"]))
    return time.time() - each.lstat().st_mtime > STALE_S


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # somebody else's
    return True


# --- replacing --------------------------------------------------------------------------------------------------------


def check_replaceable(path: str | os.PathLike) -> None:
    """Raise, before a command begins, where it could not write a file or a package to `path`.

    Raises:
        InputError: what is there is not what is written under such a name, so that it is not this project's to
            replace: a symbolic link, a device, a file of another format, a folder with other things than a package's.
    """
    path = Path(path)
    is_there(path)  # or raises
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link; give the path that it leads to, or remove the link")
    if is_folder(path) and not (path.suffix in PACKAGES and _is_package(path, PACKAGES[path.suffix])):
        kind = f" that holds other things than a {path.suffix[1:]}'s" if path.suffix in PACKAGES else ""
        raise InputError(f"{path}: is a folder{kind}; choose another name")
    if path.suffix == ".bin" and is_file(path) and not any(is_file(path.with_suffix(graph)) for graph in GRAPHS):
        raise InputError(f"{path}: is there already, without the {' or '.join(GRAPHS)} file that it would be the "
                         "weights of; choose another name")  # fmt: skip
    if is_file(path) and path.suffix in BEGINNINGS and path.stat().st_size:
        with open_file(path) as file:
            begins_well = BEGINNINGS[path.suffix](file.read(4096))
        if not begins_well:
            raise InputError(f"{path}: is there already and is not a {path.suffix} file; choose another name")


def _is_package(folder: Path, known: re.Pattern[str]) -> bool:
    """Return whether a folder holds nothing but a package's files, and what a file manager leaves."""
    return all(
        known.fullmatch(each.relative_to(folder).as_posix()) or (is_file(each) and LEFT_BY_SYSTEMS.fullmatch(each.name))
        for each in folder.rglob("*")
    )


GRAPHS = (".xml", ".param")  # files whose weights are in a .bin beside them
PACKAGES = {
    ".mlpackage": re.compile(r"Manifest\.json|Data(/com\.apple\.CoreML(/(\w+\.mlmodel|weights(/\w+\.bin)?))?)?")
}
"""Names of the files in a package (a folder that is one artifact), by its suffix."""
LEFT_BY_SYSTEMS = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini")
BEGINNINGS: dict[str, Callable[[bytes], bool]] = {
    ".param": lambda head: head.split(None, 1)[:1] == [b"7767517"],
    ".json": lambda head: head.lstrip()[:1] in (b"{", b"["),
    ".jsonl": lambda head: head.lstrip()[:1] == b"{",
    ".safetensors": lambda head: head[8:9] == b"{",
    ".pth": lambda head: head[:2] in (b"PK", b"\x80\x02"),
    ".pt": lambda head: head[:2] in (b"PK", b"\x80\x02"),
    ".onnx": lambda head: head[:1] == b"\x08",  # a model's first field, the version of its format
    ".xml": lambda head: head.lstrip()[:1] == b"<",
    ".png": lambda head: head[:4] == b"\x89PNG",
    ".svg": lambda head: head.lstrip()[:1] == b"<",
    ".html": lambda head: b"<title>SHViT" in head,  # pages have names that others have, too
}
"""Functions that return whether a file's first bytes fit its suffix."""


def check_output_folder(path: Path | None) -> None:
    """Raise InputError, before a command begins, where a file is in the place of its output folder `path`."""
    for each in (path, *path.parents) if path is not None else ():
        if is_there(each) and not is_folder(each):
            raise InputError(f"{each}: is a file; choose another folder for --output")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- hashes -----------------------------------------------------------------------------------------------------------


def sha256(path: str | os.PathLike) -> str:
    """Return the hex digest of a file's content, or of the names and digests of a folder's files in order.

    What file managers leave in a folder does not count: files whose names begin with a dot, Thumbs.db, desktop.ini.

    Raises:
        InputError: nothing is there, it cannot be read, or links in a folder lead back into it.
    """
    path, digest = Path(path), hashlib.sha256()
    if is_folder(path):
        for file in files_below(path):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    with open_file(path) as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Return the files of a folder that is one artifact, in order, links followed; raises as `sha256`."""
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):  # rglob does not go into links
        folders[:] = [name for name in folders if not _is_clutter(Path(name))]
        if len(Path(parent).relative_to(folder).parts) > MAX_PACKAGE_DEPTH:
            raise InputError(
                f"{folder}: its folders are nested more than {MAX_PACKAGE_DEPTH} deep, or a link leads back"
            )
        files += [Path(parent, name) for name in names if not _is_clutter(Path(name))]
    return sorted(each for each in files if is_file(each))


MAX_PACKAGE_DEPTH = 8  # a Core ML package has 3


def _is_clutter(file: Path) -> bool:
    return file.name.startswith(".") or bool(LEFT_BY_SYSTEMS.fullmatch(file.name))


def size(path: str | os.PathLike) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    path = Path(path)
    return sum(each.stat().st_size for each in (path.rglob("*") if is_folder(path) else [path]) if is_file(each))
