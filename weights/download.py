"""Download one file over http(s): resumed, bounded, checked, and renamed into place only when it is right.

huggingface_hub, through which timm's own weights come (resolve.py), is not used here. It downloads from a hub alone,
not from a release's address or a mirror given with --url. It has no bound on a file's bytes or on a server's pace: its
timeout is for one read, so that a server which sends a byte now and then is never given up. It compares the length with
what the server announced, not the content with a known SHA-256, and its cache holds the file before it can be checked.
Here a file gets its name after its hash, or its loading as the model it is named after, has been checked.
"""

import http.client
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.message import Message
from hashlib import sha256 as sha256_of
from pathlib import Path

from shvit import __version__
from shvit.documents import load_json, parse_model, to_json
from shvit.errors import CheckFailed, InputError, first_line
from shvit.files import is_file, remove, sha256

from . import connection
from .address import check_address, follow, shown_address
from .connection import Response, TooMuch, TooSlow

__all__ = ["Report", "discard_partial", "download"]

Report = Callable[[int, int | None], None]  # bytes so far, bytes in all (None: the server does not say)

ATTEMPTS = 4
PAUSE_S = 1.0  # before the second attempt; twice as long before each further one
BLOCK = 1 << 18  # bytes
MAX_BYTES = 1 << 30  # the largest file published has 0.2 GB
MAX_RECORD_BYTES = 4096
MAX_REDIRECTS = 10
RETRIED = (408, 429, 500, 502, 503, 504)  # statuses that pass
REDIRECTS = (301, 302, 303, 307, 308)
LENGTH = re.compile(r"[0-9]{1,15}")
RANGE = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15}|\*)")
VALIDATOR = re.compile(r'"[\x21\x23-\x7e]{1,200}"|[A-Za-z0-9,: +-]{10,40}')  # a strong ETag or a date


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
    """Download `url` to `path`, resuming what an earlier call left in `<stem>.partial<suffix>` beside it.

    Args:
        url: an http or https address.
        path: is written atomically.
        expected: the file's sha256; None where it is not known.
        prove: is given the complete file before it gets its name, and raises if it is not the right one.
        report: called with the bytes received so far and the total.

    Returns:
        The file's sha256.

    Raises:
        InputError: the address cannot be reached, is refused or too large; what came so far is kept for the next call.
        CheckFailed: hash or length are wrong. This, and what `prove` raises, removes the partial file.
    """
    url, shown = check_address(url), shown_address(url)
    partial = partial_path(path)
    _fetch(url, partial, report)
    try:
        digest = sha256(partial)
        if expected not in (None, digest):
            raise CheckFailed(
                f"{shown}: its sha256 is {digest}, and {expected} was expected; nothing was kept; "
                "run it again, or name another address with --url",
                {"url": shown, "sha256": digest, "expected_sha256": expected},
            )
        prove(partial)
        partial.replace(path)
    finally:
        _discard(partial)
    return digest


def partial_path(path: Path) -> Path:
    """Return the file beside `path` that an unfinished download is kept in."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def discard_partial(path: Path) -> None:
    """Remove what an unfinished download of `path` left."""
    _discard(partial_path(path))


def _fetch(url: str, partial: Path, report: Report) -> None:
    """Complete `partial`, in several attempts if need be."""
    errors: list[_Broken] = []
    shown = shown_address(url)
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
        raise CheckFailed(f"{shown}: {last}, again and again; nothing was kept; name another address with --url",
                          {"url": shown, "size_bytes": last.size})  # fmt: skip
    kept = f"what came so far is kept in {partial}; " if partial.exists() else ""
    raise InputError(f"{shown}: cannot be fetched ({last}; {ATTEMPTS} attempts); {kept}check the network and run it "
                     "again, or name another address with --url")  # fmt: skip


def _attempt(url: str, partial: Path, report: Report) -> None:
    start, validator = _left_over(url, partial)
    headers = {"User-Agent": f"shvit/{__version__}", "Accept-Encoding": "identity"}
    if validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    with _open(url, headers, partial, start) as response:
        start, total = _placement(response, url, start, partial)
        limit = MAX_BYTES if total is None else total
        if limit > MAX_BYTES:
            raise InputError(f"{shown_address(url)}: {limit / 1e9:.1f} GB is more than the {MAX_BYTES / 1e9:.1f} GB "
                             "allowed")  # fmt: skip
        response.begin_body(limit - start)
        size = _receive(response, url, partial, start, limit, lambda done: report(done, total))
    if total not in (None, size):
        raise _WrongLength(size, total)


def _open(url: str, headers: dict[str, str], partial: Path, start: int) -> Response:
    """Return the response to the request for what follows the first `start` bytes, redirections followed."""
    target = url
    for _ in range(MAX_REDIRECTS + 1):
        response = _request(target, headers)
        status = response.status
        if status not in REDIRECTS:
            break
        with response:
            target = follow(target, response.headers.get("Location"))
    else:
        raise InputError(f"{shown_address(url)}: redirects more than {MAX_REDIRECTS} times; name another address with "
                         "--url")  # fmt: skip
    if status in (200, 203) or (status == 206 and "Range" in headers):
        return response
    with response:
        if status == 416 and "Range" in headers:  # the left-over is as long as the file, or longer
            _discard(partial)
            raise _WrongLength(start, None)
        answer = f"HTTP {status} {response.reason[:100]}".strip()
        if status in RETRIED:
            raise _Broken(answer)
        raise InputError(f"{shown_address(url)}: the server answers {answer}; name another address with --url")


def _request(url: str, headers: dict[str, str]) -> Response:
    try:
        return connection.request(url, headers)
    except TooSlow as error:
        raise _too_slow(url, error) from error
    except TooMuch as error:
        raise _nonsense(url, "its headers do not end") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_reason(error)) from error
    except ValueError as error:
        raise InputError(f"{shown_address(url)}: cannot be fetched ({first_line(error)})") from error


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    return first_line(reason) if isinstance(reason, BaseException) else str(reason)[:200] or type(error).__name__


def _placement(response: Response, url: str, start: int, partial: Path) -> tuple[int, int | None]:
    """Return (the offset of the body's first byte in the file, the file's size if the server sends it).

    Raises:
        InputError: the headers contradict each other, or are not what HTTP has.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        raise _nonsense(url, f"it is compressed, as {encoding[:40]!r}, which was not asked for")
    length = _length(response, url)
    if response.status != 206:
        return 0, length
    given = ", ".join(response.headers.get_all("Content-Range") or [])
    match = RANGE.fullmatch(given)
    if not match or int(match[1]) != start:
        _discard(partial)
        raise _Broken(f"asked for the file from byte {start} on, and got the range {given[:80]!r}")
    end, total = int(match[2]) + 1, None if match[3] == "*" else int(match[3])
    if end < start or (total is not None and end > total) or length not in (None, end - start):
        _discard(partial)
        raise _nonsense(url, f"its range {given[:80]!r} and its length {length} do not go together")
    return start, total


def _length(response: Response, url: str) -> int | None:
    """Return the body's length; None where it is sent in chunks or until the end of the connection."""
    given = {each.strip() for each in response.headers.get_all("Content-Length") or []}
    if response.chunked or not given:
        return None
    length = given.pop()
    if given or not LENGTH.fullmatch(length):
        raise _nonsense(url, f"it has {len(given) + 1} lengths" if given else f"its length is {length[:40]!r}")
    return int(length)


def _nonsense(url: str, problem: str) -> InputError:
    return InputError(f"{shown_address(url)}: the server's answer cannot be used: {problem}; name another address with "
                      "--url")  # fmt: skip


def _receive(response: Response, url: str, partial: Path, start: int, limit: int, report: Callable[[int], None]) -> int:
    """Write the body to `partial` from byte `start` on, at most up to byte `limit`; return the size then."""
    size = start
    try:
        if not start:
            _discard(partial)
            _note(url, partial, response.headers)
        with partial.open("ab" if start else "wb") as file:
            for block in _blocks(response, url, partial):
                size += len(block)
                if size > limit:
                    raise _too_much(url, partial)
                file.write(block)
                report(size)
    except OSError as error:
        raise InputError(f"{partial}: cannot be written ({error.strerror}); make room, or set SHVIT_CACHE") from error
    return size


def _blocks(response: Response, url: str, partial: Path) -> Iterator[bytes]:
    try:
        while block := response.read1(BLOCK):
            yield block
    except TooSlow as error:
        raise _too_slow(url, error) from error
    except TooMuch as error:
        raise _too_much(url, partial) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_reason(error)) from error
    except ValueError as error:  # a chunk's size that is not a number
        raise _Broken(first_line(error)) from error


def _too_slow(url: str, error: TooSlow) -> InputError:
    return InputError(f"{shown_address(url)}: too slow ({error}); run it again to continue, or name another address "
                      "with --url")  # fmt: skip


def _too_much(url: str, partial: Path) -> InputError:
    _discard(partial)
    return InputError(f"{shown_address(url)}: sends more than it announces, or than the {MAX_BYTES / 1e9:.1f} GB "
                      "allowed; nothing was kept; name another address with --url")  # fmt: skip


# --- what an interrupted download leaves: the partial file, and whose bytes they are ----------------------------------


def _record(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


@dataclass(frozen=True)
class _Record:
    """Whose bytes a partial file holds."""

    url: str
    """Digest of the address."""
    validator: str | None
    """A strong ETag, or a date: proof that the server still has the same file."""


def _note(url: str, partial: Path, headers: Message) -> None:
    etag = headers.get("ETag")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    _record(partial).write_text(to_json(asdict(_Record(_digest(url), validator))), encoding="utf-8")


def _digest(url: str) -> str:
    """Return what an address is recorded as, since it may hold a key."""
    return sha256_of(url.encode()).hexdigest()


def _left_over(url: str, partial: Path) -> tuple[int, str | None]:
    """Return (bytes that came earlier, what to send as If-Range), or (0, None) where there is nothing to resume."""
    with suppress(InputError):  # an unreadable record counts as none
        if is_file(partial) and not partial.is_symlink():
            path = _record(partial)
            record = parse_model(_Record, load_json(path, MAX_RECORD_BYTES), str(path))
            size = partial.stat().st_size
            if record.url == _digest(url) and size and VALIDATOR.fullmatch(record.validator or ""):
                return size, record.validator
    return 0, None


def _discard(partial: Path) -> None:
    remove(partial)
    remove(_record(partial))
