"""One file over http(s): resumed where it broke off, bounded, checked, and in place only when it is right.

Files of the Hugging Face hub come this way too, from their resolve address: one downloader means one cache, one lock
file, one set of errors, and mirrors and tests that work for every publisher alike.
"""

import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shvit import __version__
from shvit.errors import CheckFailed, InputError
from shvit.files import remove, sha256

__all__ = ["Report", "download"]

Report = Callable[[int, int | None], None]  # bytes so far, bytes in all (None: the server does not say)

ATTEMPTS = 4
PAUSE_S = 1.0  # before the second attempt; twice as long before each further one
TIMEOUT_S = 30.0  # to connect, and between two blocks
BLOCK = 1 << 18  # bytes
MAX_BYTES = 4 << 30  # the largest file published is far below 1 GB
RETRIED = (408, 429, 500, 502, 503, 504)  # statuses that pass


class _Broken(Exception):
    """An attempt that ended early; another one may get further."""


class _WrongLength(_Broken):
    """The body ended after `size` bytes, and more or fewer were announced."""

    def __init__(self, size: int, total: int | None):
        super().__init__(f"the file ended after {size:,} bytes{f' of {total:,}' if total is not None else ''}")
        self.size = size


def download(
    url: str, path: Path, expected: str | None, prove: Callable[[Path], None], report: Report = lambda done, total: None
) -> str:
    """Fetches `url` to `path`, continuing what an earlier call left in `<stem>.partial<suffix>` beside it.

    Args:
        url: an http or https address.
        path: appears whole, or stays as it was.
        expected: the file's sha256; None where it is not known.
        prove: is given the complete file before it gets its name, and raises if it is not the right one.
        report: called with the bytes received so far and the total.

    Returns:
        The file's sha256.

    Raises:
        InputError: the address cannot be reached, is refused or too large; what came so far is kept for the next call.
        CheckFailed: hash or length are wrong. This, and what `prove` raises, removes the partial file.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"{url}: not an address that can be fetched; give one that begins with https:// or http://")
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    _fetch(url, partial, report)
    try:
        digest = sha256(partial)
        if expected not in (None, digest):
            raise CheckFailed(
                f"{url}: its sha256 is {digest}, and {expected} was expected; nothing was kept; "
                "run it again, or name another address with --url",
                {"url": url, "sha256": digest, "expected_sha256": expected},
            )
        prove(partial)
        partial.replace(path)
    finally:
        _discard(partial)
    return digest


def _fetch(url: str, partial: Path, report: Report) -> None:
    """Completes `partial`, in several attempts if need be."""
    errors: list[_Broken] = []
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            return _attempt(url, partial, report)
        except _Broken as error:
            errors.append(error)
    previous, last = errors[-2:]
    if isinstance(last, _WrongLength) and isinstance(previous, _WrongLength) and last.size == previous.size:
        _discard(partial)  # no further byte came: the announced length is wrong, not the connection
        raise CheckFailed(f"{url}: {last}, again and again; nothing was kept; name another address with --url",
                          {"url": url, "size_bytes": last.size})  # fmt: skip
    kept = f"what came so far is kept in {partial}; " if partial.exists() else ""
    raise InputError(f"{url}: cannot be fetched ({last}; {ATTEMPTS} attempts); {kept}check the network and run it "
                     "again, or name another address with --url")  # fmt: skip


def _attempt(url: str, partial: Path, report: Report) -> None:
    start, validator = _left_over(url, partial)
    headers = {"User-Agent": f"shvit/{__version__}", "Accept-Encoding": "identity"}
    if validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    with _open(urllib.request.Request(url, headers=headers), partial, start) as response:
        start, total = _placement(response, start, partial)
        if total is not None and total > MAX_BYTES:
            raise InputError(f"{url}: {total / 1e9:.1f} GB is more than the {MAX_BYTES / 1e9:.1f} GB allowed")
        size = _receive(response, url, partial, start, lambda done: report(done, total))
    if total not in (None, size):
        raise _WrongLength(size, total)


def _open(request: urllib.request.Request, partial: Path, start: int) -> Any:
    """The server's answer to the request for what follows the first `start` bytes."""
    url = request.full_url
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # the left-over is as long as the file, or longer
                _discard(partial)
                raise _WrongLength(start, None) from error
            if error.code in RETRIED:
                raise _Broken(f"HTTP {error.code} {error.reason}") from error
            raise InputError(f"{url}: the server answers HTTP {error.code} {error.reason}; "
                             "name another address with --url") from error  # fmt: skip
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_reason(error)) from error
    except ValueError as error:  # an address such as http://:x/
        raise InputError(f"{url}: not an address that can be fetched ({error})") from error
    if urlsplit(url).scheme == "https" and urlsplit(response.url).scheme != "https":
        response.close()
        raise InputError(f"{url}: leads to {response.url}, which is not encrypted; name another address with --url")
    return response


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return str(reason) or type(reason).__name__


def _placement(response: Any, start: int, partial: Path) -> tuple[int, int | None]:
    """(the offset of the body's first byte in the file, the file's size if the server tells it)."""
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    given = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", given)
    if not found or int(found[1]) != start:
        _discard(partial)
        raise _Broken(f"asked for the file from byte {start} on, and got the range {given!r}")
    return start, None if found[2] == "*" else int(found[2])


def _receive(response: Any, url: str, partial: Path, start: int, report: Callable[[int], None]) -> int:
    """Writes the body to `partial` from byte `start` on; returns the size then."""
    size = start
    try:
        if not start:
            _note(url, partial, response.headers)
        with partial.open("ab" if start else "wb") as file:
            for block in _blocks(response):
                file.write(block)
                size += len(block)
                report(size)
                if size > MAX_BYTES:
                    break
    except OSError as error:
        raise InputError(f"{partial}: cannot be written ({error}); make room, or set SHVIT_CACHE") from error
    if size > MAX_BYTES:
        _discard(partial)
        raise InputError(f"{url}: more than the {MAX_BYTES / 1e9:.1f} GB allowed; nothing was kept")
    return size


def _blocks(response: Any) -> Iterator[bytes]:
    try:
        while block := response.read1(BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_reason(error)) from error


# --- what an interrupted download leaves: the partial file, and whose bytes they are ----------------------------------


def _record(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _note(url: str, partial: Path, headers: Any) -> None:
    """Keeps what proves later that the server still has the same file: a strong ETag, or its date."""
    etag = headers.get("ETag")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    _record(partial).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")


def _left_over(url: str, partial: Path) -> tuple[int, str | None]:
    """(bytes that came earlier, what to send as If-Range), or (0, None) where there is nothing to continue."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(_record(partial).read_text(encoding="utf-8"))
        size = partial.stat().st_size
        if record["url"] == url and record["validator"] and size:
            return size, str(record["validator"])
    return 0, None


def _discard(partial: Path) -> None:
    remove(partial)
    remove(_record(partial))
