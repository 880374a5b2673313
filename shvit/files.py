"""Files that appear whole or not at all, and their hashes."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def write_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside `path`, with its suffix, to write a file or a folder to; it is renamed to `path` at the end.

    If the body raises, what it wrote is removed and `path` stays as it was.

    Raises:
        InputError: the folder cannot be made or written to, or `path` is a folder and a file was written, or a file
            and a folder was written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # permissions do not tell all: root may write anywhere, but not to a read-only file system
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        try:
            yield partial
        except OSError as error:
            if error.errno in NO_ROOM:
                raise InputError(f"{path}: cannot be written: {error.strerror}; make room and try again, what was "
                                 "there is kept") from error  # fmt: skip
            raise
        if path.is_dir():
            if not partial.is_dir():
                raise InputError(f"{path}: is a folder; choose another name")
            shutil.rmtree(path)
        elif path.exists() and partial.is_dir():
            raise InputError(f"{path}: is a file; choose another name")
        try:
            partial.replace(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        remove(partial)


def check_output_folder(path: Path | None) -> None:
    """For the beginning of a command whose work would otherwise be lost at its end.

    Raises:
        InputError: a file lies where the folder of `--output` is to be.
    """
    for each in (path, *path.parents) if path is not None else ():
        if each.exists() and not each.is_dir():
            raise InputError(f"{each}: is a file; choose another folder for --output")


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file's content; of a folder, of its files' names and digests in order.

    What file managers leave in a folder does not count: files whose names begin with a dot, Thumbs.db, desktop.ini.
    """
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        for file in sorted(each for each in path.rglob("*") if each.is_file() and not _is_left_behind(each)):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_left_behind(file: Path) -> bool:
    return file.name.startswith(".") or file.name in ("Thumbs.db", "desktop.ini")


def size(path: str | os.PathLike) -> int:
    """Bytes of a file, or of all files in a folder."""
    path = Path(path)
    return (
        sum(each.stat().st_size for each in path.rglob("*") if each.is_file()) if path.is_dir() else path.stat().st_size
    )
