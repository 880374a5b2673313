"""The cache of downloaded checkpoints, and the hashes recorded there.

The first download of a file is trusted; every later file of its name must be the same.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from shvit.documents import load_json, parse_model, to_json
from shvit.errors import CheckFailed, InputError, first_line
from shvit.files import atomic_write, is_file, is_folder, is_there, sha256

from .address import shown_address
from .download import Report, discard_partial, download
from .manifest import Published, Sha256

__all__ = ["Locked", "Obtained", "cache_folder", "expected_hash", "obtain", "read_lock"]

MAX_LOCK_BYTES = 1 << 20


def cache_folder() -> Path:
    """Return the folder of downloads: $SHVIT_CACHE, else $XDG_CACHE_HOME/shvit, else ~/.cache/shvit; it may not exist.

    Raises:
        InputError: there is something else than a folder, or the home folder that it is in is not known.
    """
    own = os.environ.get("SHVIT_CACHE")
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if own:
            folder = Path(own).expanduser()
        else:
            folder = (shared if shared.is_absolute() else Path.home() / ".cache") / "shvit"
    except RuntimeError as error:  # no such user, or one without a home
        given = f"SHVIT_CACHE={own}" if own else "the home folder"
        raise InputError(f"{given}: cannot be found ({first_line(error)}); set SHVIT_CACHE to a folder") from error
    if is_there(folder) and not is_folder(folder):
        raise InputError(f"{folder}: is a file, and the cache of downloads is to be there; set SHVIT_CACHE to a folder")
    return folder


# --- hashes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Locked:
    """A downloaded file as it was first seen."""

    sha256: Sha256
    size_bytes: int
    url: str
    date: str
    """ISO date (UTC) of the first download."""
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (pydantic's name for it)


def read_lock(cache: Path) -> dict[str, Locked]:
    """Return what lock.json of a cache records, by checkpoint name; raise InputError if it is damaged."""
    path = cache / "lock.json"
    advice = "restore the file, or remove it to trust anew"
    if not is_there(path):
        return {}
    try:
        content = load_json(path, MAX_LOCK_BYTES)
    except InputError as error:
        raise InputError(f"{error}; {advice}") from error
    return parse_model(dict[str, Locked], content, str(path), advice)


def _lock(cache: Path, name: str, record: Locked) -> None:
    records = {**read_lock(cache), name: record}
    with atomic_write(cache / "lock.json") as partial:
        content = {key: asdict(value) for key, value in sorted(records.items())}
        partial.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")


def expected_hash(entry: Published, cache: Path) -> str | None:
    """Return the hash that a file must have: the manifest's, or the first download's; None where neither is known."""
    record = read_lock(cache).get(entry.name)
    return entry.sha256 or (record.sha256 if record else None)


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Obtained:
    """A checkpoint in the cache whose hash is now on record."""

    path: Path
    sha256: str
    size_bytes: int
    fetched: bool
    """False where the cache held it already."""
    first_use: bool
    """Nothing was known to compare its hash with: it is trusted from now on, not verified."""


def obtain(entry: Published, url: str, report: Report) -> Obtained:
    """Return the published file from the cache or from `url`; it must load as its model before its hash is recorded.

    Raises:
        InputError: as `download`, another process is downloading, or the cache cannot be written.
        CheckFailed: the file is not what was published, or not what was downloaded first.
    """
    cache = cache_folder()
    path = cache / entry.file_name
    with _alone(cache):
        expected = expected_hash(entry, cache)
        digest = sha256(path) if is_file(path) else ""
        fetched = not digest or expected not in (None, digest)
        if fetched:
            advice = "nothing was kept; name another address with --url"
            shown = shown_address(url)
            digest = download(url, path, expected, lambda partial: _prove(entry, partial, shown, advice), report)
        else:
            discard_partial(path)  # of a download that was broken off before the file came another way
            if expected is None:
                _prove(entry, path, str(path), "remove the file and run it again")
        size = path.stat().st_size
        if expected is None:
            date = datetime.now(timezone.utc).date().isoformat()
            _lock(cache, entry.name, Locked(digest, size, shown_address(url), date))
    return Obtained(path, digest, size, fetched, expected is None)


def _prove(entry: Published, path: Path, source: str, advice: str) -> None:
    """Raise unless the file loads strictly as the entry's model; of a detector's file only the hash is checked."""
    from .layouts import identify

    if entry.task != "classification":
        return
    try:
        identity = identify(path)
    except InputError as error:
        problem = str(error).removeprefix(f"{path}: ")
    else:
        if identity.model == entry.model:
            return
        problem = f"it is a {identity.model}"
    raise CheckFailed(f"{source}: should be {entry.name}, and is not ({problem}); {advice}",
                      {"name": entry.name, "source": source, "problem": problem})  # fmt: skip


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Keep other processes from downloading into the cache."""
    from filelock import FileLock, Timeout  # comes with torch and huggingface_hub

    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".pull.lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{cache}: another download into this cache is under way; wait until it ends") from error
    except OSError as error:
        raise InputError(f"{cache}: cannot be written ({error}); set SHVIT_CACHE to a folder that can") from error
    try:
        yield
    finally:
        lock.release()
