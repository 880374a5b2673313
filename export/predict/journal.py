"""What a job has predicted so far, on disk: complete batches, each image once, whatever ends the process.

A folder beside the output holds `job.json`, which identifies the job, `lines`, with a line for each image, and, for
features, `arrays`, with as many bytes for each image. Lines are written when their arrays are on the disk, and the
folder is removed when the output is in place.
"""

import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from shvit.documents import load_json, to_json
from shvit.errors import InputError
from shvit.files import atomic_write, is_file, is_folder, is_there, needs_room, open_file, remove
from shvit.locks import lock_file

from .loading import BEGINNING, Place

FORMAT = 1
COMMIT_S = 1.0
"""Seconds of work that a kill may cost: to wait for the disk after each batch would take time."""
MAX_PENDING_BYTES = 16 << 20
MAX_LINE = 1 << 24
JOB, LINES, ARRAYS, LOCK = "job.json", "lines", "arrays", ".lock"
Record = dict[str, Any]
"""A line of the output: `path`, then what is predicted, or `error`."""


def journal_path(output: Path) -> Path:
    """Return the folder of an output's journal, beside it."""
    return output.with_name(output.name + ".partial")


class Journal:
    """The predictions of a job, in order, appended batch by batch.

    Args:
        folder: its folder, which is there.
        row_bytes: bytes of an image's arrays; 0 where it has none.
        batch_size: what is resumed begins with a batch.
    """

    def __init__(self, folder: Path, row_bytes: int, batch_size: int):
        self.folder, self.row_bytes = folder, row_bytes
        self.count = self.damaged = 0
        self.place = BEGINNING
        self._pending: tuple[list[bytes], list[bytes]] = ([], [])
        self._last_commit = time.monotonic()
        kept = self._keep(batch_size)
        self._lines = _open_at(folder / LINES, kept)
        self._arrays = _open_at(folder / ARRAYS, self.count * row_bytes)

    def _keep(self, batch_size: int) -> int:
        """Read the lines; return the bytes of those that are kept: whole ones, in order, up to the end of a batch."""
        most = self._whole_arrays()
        ends: deque[tuple[int, Place, bool]] = deque([(0, BEGINNING, False)], maxlen=batch_size + 1)
        end = 0
        for line in _read_lines(self.folder / LINES):
            parsed = _parse(line)
            if parsed is None or (self.row_bytes and self.count == most) or not _follows(self.place, parsed[0]):
                break
            place, record = parsed
            end += len(line)
            self.place = Place(place.part, place.offset + 1)
            self.count += 1
            self.damaged += "error" in record
            ends.append((end, self.place, "error" in record))
        for _ in range(min(self.place.offset % batch_size, len(ends) - 1)):
            self.count -= 1
            self.damaged -= ends.pop()[2]
        end, self.place, _ = ends[-1]
        return end

    def _whole_arrays(self) -> int:
        path = self.folder / ARRAYS
        return path.stat().st_size // self.row_bytes if self.row_bytes and is_file(path) else 0

    def append(self, places: Sequence[Place], records: Sequence[Record], arrays: bytes) -> None:
        """Add a batch's images: a record for each, and the bytes of their arrays."""
        lines, pending = self._pending
        for place, record in zip(places, records, strict=True):
            lines.append(f"{place.part} {place.offset} {to_json(record)}\n".encode())
            self.count += 1
            self.damaged += "error" in record
        pending.append(arrays)
        size = sum(map(len, pending))
        if time.monotonic() - self._last_commit > COMMIT_S or size > MAX_PENDING_BYTES:
            self.commit()

    def commit(self) -> None:
        """Write what was added to the disk: the arrays first, then the lines that speak of them."""
        lines, arrays = self._pending
        self._pending = ([], [])  # where the disk is full, nothing is written twice
        for file, pending in ((self._arrays, arrays), (self._lines, lines)):
            if content := b"".join(pending):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self._last_commit = time.monotonic()

    def texts(self) -> Iterator[bytes]:
        """Yield the records that were committed as they are written, each a line of JSON."""
        for line in _read_lines(self.folder / LINES):
            yield line.split(b" ", 2)[2]

    def records(self) -> Iterator[Record]:
        """Yield the records that were committed, in order."""
        yield from map(json.loads, self.texts())

    def arrays(self, rows: int) -> Iterator[bytes]:
        """Yield the arrays that were committed, of `rows` images at a time."""
        with open_file(self.folder / ARRAYS) as file:
            while block := file.read(rows * self.row_bytes):
                yield block

    def close(self) -> None:
        self._lines.close()
        self._arrays.close()


@contextmanager
def open_journal(output: Path, job: Mapping[str, Any], row_bytes: int, batch_size: int) -> Iterator[Journal]:
    """Give the journal of an output, with what an earlier process of the same job predicted; keep it at an error.

    Args:
        job: what identifies the job, as plain values, by what messages call it.

    Raises:
        InputError: there is a journal of another job, or one that is being written, or it cannot be written.
    """
    folder = journal_path(output)
    _claim(folder)
    with lock_folder(folder):
        if not is_file(folder / JOB) and is_file(folder / LINES) and (folder / LINES).stat().st_size:
            raise InputError(f"{folder}: has no {JOB}, so that nothing tells whose it is; remove it")
        check_job(folder / JOB, {"format": FORMAT, **job})
        journal = Journal(folder, row_bytes, batch_size)
        try:
            yield journal
        finally:
            journal.commit()
            journal.close()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder that a job writes to, in a block that writes there.

    Raises:
        InputError: another process holds it, or it cannot be written.
    """
    try:
        lock = lock_file(folder / LOCK)
    except BlockingIOError as error:
        raise InputError(f"{folder}: another process is writing it; wait for that one, or choose another "
                         "--output") from error  # fmt: skip
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    with lock, needs_room(folder):
        yield


def remove_journal(output: Path) -> None:
    """Remove the journal of an output that is in place."""
    remove(journal_path(output))


def _claim(folder: Path) -> None:
    """Make the folder; raise InputError where something else is in its place."""
    if folder.is_symlink() or (is_there(folder) and not is_folder(folder)):
        raise InputError(f"{folder}: is in the way of what is written before the output; move it away")
    others = {each.name for each in folder.iterdir()} - {JOB, LINES, ARRAYS, LOCK} if is_folder(folder) else set()
    if any(not name.endswith(".partial.json") for name in others):
        raise InputError(f"{folder}: holds {sorted(others)[0]}, which no job wrote; choose another --output")
    make_folder(folder)


def make_folder(folder: Path) -> None:
    """Make the folder, if it is not there; raise InputError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error


def check_job(path: Path, job: dict[str, Any]) -> None:
    """Write what identifies the job whose predictions are in a file's folder; raise InputError where it is another."""
    job = json.loads(to_json(job))
    if not is_file(path):
        with atomic_write(path) as partial:
            partial.write_text(to_json(job) + "\n")
        return
    before = load_json(path)
    if before != job:
        names = job if isinstance(before, dict) else ()
        differing = [name for name in names if before.get(name) != job[name]]
        raise InputError(f"{path.parent}: was begun with other {', '.join(differing) or 'options'}; give another "
                         "--output, or remove it to start from the first image")  # fmt: skip


# --- lines ------------------------------------------------------------------------------------------------------------


def _open_at(path: Path, size: int) -> BinaryIO:
    """Return a file, open for appending, cut to a size."""
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link, which no job wrote; remove it")
    file = path.open("ab")
    file.truncate(size)
    return file


def _read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, with what ends them; nothing where there is no file."""
    if not is_file(path):
        return
    with open_file(path) as file:
        while line := file.readline(MAX_LINE):
            yield line


def _parse(line: bytes) -> tuple[Place, Record] | None:
    """Return the place and the record of a line; None where it is not a whole one."""
    try:
        part, offset, text = line.split(b" ", 2)
        record = json.loads(text) if line.endswith(b"\n") else None
        return (Place(int(part), int(offset)), record) if isinstance(record, dict) and "path" in record else None
    except (ValueError, RecursionError):
        return None


def _follows(place: Place, following: Place) -> bool:
    """Return whether an image may be the one at `place`: the next of its part, or the first of a later one."""
    return following == place or (following.part > place.part and following.offset == 0)
