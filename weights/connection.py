"""Requests over http(s) that end: whatever a server sends is bounded in time, in pace and in bytes."""

import http.client
import io
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

__all__ = ["Response", "TooMuch", "TooSlow", "bounded_waits", "request"]

TIMEOUT_S = 30.0  # to connect, and between two blocks
WINDOW_S = 30.0
MIN_RATE = 1000  # bytes per second, averaged over each window
MAX_HEADER_BYTES = 256 << 10  # everything before the body, interim answers included; also the body of a redirection


class TooMuch(OSError):
    """A server sent more bytes than were to be read."""


class TooSlow(TimeoutError):
    """A server sends, but too slowly."""


class _Paced(io.RawIOBase):
    """A socket's bytes, as long as they come fast enough and are not too many; raises OSError then."""

    def __init__(self, raw: io.RawIOBase):
        self.raw = raw
        self.begin(MAX_HEADER_BYTES)

    def begin(self, limit: int) -> None:
        """Take up to `limit` bytes from now on, in windows that begin now."""
        self.left, self.received, self.since = limit, 0, time.monotonic()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count = self.raw.readinto(buffer)
        self.left -= count or 0
        self.received += count or 0
        seconds = time.monotonic() - self.since
        if self.left < 0:
            raise TooMuch("more bytes than are taken")
        if count and seconds > WINDOW_S:
            if self.received < MIN_RATE * seconds:
                raise TooSlow(f"{self.received / seconds:.0f} bytes per second, where {MIN_RATE} are awaited")
            self.received, self.since = 0, time.monotonic()
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class Response(http.client.HTTPResponse):
    """An answer of any status, whose status line and headers were read."""

    def __init__(self, sock: Any, *args: Any, **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Paced(cast(Any, self.fp).detach()))

    def begin_body(self, limit: int) -> None:
        """Allow a body of `limit` bytes, with an eighth more for the frames of chunks."""
        if not self.isclosed():
            cast(Any, self.fp).raw.begin(limit + limit // 8 + MAX_HEADER_BYTES)


class _Http(http.client.HTTPConnection):
    response_class = Response


class _Https(http.client.HTTPSConnection):
    response_class = Response


class _Handler(urllib.request.AbstractHTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Http, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Https, request)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def request(url: str, headers: dict[str, str]) -> Response:
    """Return the answer to a GET request, through the proxies of the environment; redirections are not followed.

    Args:
        url: as in `check_address`: https or http.

    Raises:
        OSError, http.client.HTTPException, ValueError: there is none.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), _Handler()):
        opener.add_handler(handler)
    response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    if response is None:
        raise ValueError("the environment names a proxy that is neither http nor https")
    return cast(Response, response)


@contextmanager
def bounded_waits() -> Iterator[None]:
    """Give up after `TIMEOUT_S` of silence in libraries that download and set no timeout of their own, as torch.hub."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
