"""An HTTP server for one page: an exact table of addresses below a token, with limits and logging."""

import asyncio
import hmac
import io
import logging
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream, StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

from shvit.errors import InputError

from ..web import Content
from .phone_record import MAX_BYTES, PhoneRecord, read_record

RECORDS = "records"
MAX_CONNECTIONS = 128
MAX_PER_ADDRESS = 16  # connections from one address; a browser opens six or so
MAX_HEADER_BYTES = 16 << 10
WAIT_S = 20.0  # for a request's head, and for its body; a record takes a phone a second
BLOCK_BYTES = 1 << 18
LINGER_S = 1.0  # for the last response to reach the phone
LOGGER = logging.getLogger("shvit.phone")
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # these two allow threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the address is a secret
}


def listen(host: str | None, port: int) -> list[socket.socket]:
    """Return sockets that listen on a host, or on every address of IPv4 and IPv6 if None; port 0 is any free port.

    Raises:
        InputError: listening fails.
    """
    try:
        return bind_sockets(port, host)
    except OSError as error:
        raise InputError(f"--port {port}: cannot listen on {host or 'IPv6'}: {error.strerror}; choose another, or "
                         "leave it out") from error  # fmt: skip


async def serve(
    contents: Mapping[str, Content],
    policy: str,
    token: str,
    receive: Callable[[PhoneRecord], int],
    sockets: Sequence[socket.socket],
    tls: ssl.SSLContext | None,
    time_limit_s: float,
) -> bool:
    """Serve until no more records are awaited or the time is over.

    Args:
        contents: everything that is served, by address below the token.
        policy: the Content-Security-Policy of all of it.
        receive: is called with each valid record and returns how many more are awaited; none ends the serving. It may
            raise InputError to refuse a record.
        sockets: as from `listen`; they are closed.

    Returns:
        Whether everything awaited has arrived.
    """
    done = asyncio.Event()

    def accept(record: PhoneRecord) -> int:
        awaited = receive(record)
        if awaited < 1:
            done.set()
        return awaited

    known = {"contents": contents, "policy": policy, "token": token, "accept": accept}
    fallback: dict[str, Any] = {"default_handler_class": _Page, "default_handler_args": known}
    application = Application([(r"(.*)", _Page, known)], log_function=_log, **fallback)
    limits = {"max_header_size": MAX_HEADER_BYTES, "max_body_size": MAX_BYTES}
    server = _Server(application, ssl_options=tls, idle_connection_timeout=WAIT_S, body_timeout=WAIT_S, **limits)
    server.add_sockets(sockets)
    try:
        await asyncio.wait_for(done.wait(), time_limit_s)
        await asyncio.sleep(LINGER_S)
        return True
    except asyncio.TimeoutError:
        return False
    finally:
        server.stop()
        await server.close_all_connections()


class _Server(HTTPServer):
    """A server that limits connections, in sum and from one address, and logs those without one whole request."""

    def handle_stream(self, stream: IOStream, address: tuple) -> None:
        contexts: list[Any] = [connection.context for connection in self._connections]
        from_here = sum(context.address[0] == address[0] for context in contexts)
        if from_here >= MAX_PER_ADDRESS or len(contexts) >= MAX_CONNECTIONS:
            stream.close()
        else:
            super().handle_stream(stream, address)

    def on_close(self, server_conn: Any) -> None:
        super().on_close(server_conn)
        if not getattr(server_conn.context, "asked", False):
            LOGGER.info("dropped %s: no whole request within %g s", server_conn.context.remote_ip, WAIT_S)


@stream_request_body
class _Page(RequestHandler):
    def initialize(
        self, contents: Mapping[str, Content], policy: str, token: str, accept: Callable[[PhoneRecord], int]
    ) -> None:
        self.contents, self.policy, self.token, self.accept = contents, policy, token, accept
        self.body = bytearray()

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        """Refuse a request before its body is read."""
        self.request.connection.context.asked = True  # type: ignore[union-attr]
        token, slash, self.address = (self.path_args or [""])[0].removeprefix("/").partition("/")
        if not (slash and hmac.compare_digest(token.encode(), self.token.encode())):
            raise HTTPError(404, "wrong token")
        if self.request.method == "POST" and self.address != RECORDS:
            raise HTTPError(404, "no such address")
        content_type = self.request.headers.get("Content-Type", "").partition(";")[0]
        if self.request.method == "POST" and content_type != "application/json":
            raise HTTPError(415, "a record must be application/json")

    def data_received(self, chunk: bytes) -> None:
        if self.request.method == "POST":  # of at most MAX_BYTES
            self.body += chunk

    async def get(self, _: str = "") -> None:
        content = self.contents.get(self.address)
        if content is None:
            raise HTTPError(404, "no such address")
        self.set_header("Content-Type", content.type)
        self.set_header("Content-Length", content.size)
        self.set_header("Content-Security-Policy", f"{self.policy}; frame-ancestors 'none'")
        cache = "private, max-age=86400, immutable" if self.address.startswith("files/") else "no-store"
        self.set_header("Cache-Control", cache)
        if self.request.method == "HEAD":
            return
        try:
            await self._send(content.source)
        except StreamClosedError:
            LOGGER.info("%s disconnected", self.request.remote_ip)
        except asyncio.TimeoutError:
            LOGGER.warning("dropped %s: read nothing within %g s", self.request.remote_ip, WAIT_S)
            self.request.connection.stream.close()  # type: ignore[union-attr]

    head = get

    async def _send(self, source: bytes | Path) -> None:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                self.write(block)
                await asyncio.wait_for(self.flush(), WAIT_S)

    def post(self, _: str = "") -> None:
        try:
            awaited = self.accept(read_record(bytes(self.body)))
        except InputError as error:
            raise HTTPError(400, "%s", str(error)) from error
        self.set_status(201)
        self.finish({"awaited": awaited})

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        self.finish({"error": _message(error) or self._reason})

    def log_exception(
        self, typ: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        request = (self.request.remote_ip, self.request.method)
        if isinstance(value, HTTPError):
            LOGGER.warning("refused %s %s: %d %s", *request, value.status_code, _message(value) or value.reason or "")
        else:
            LOGGER.error("failed for %s %s: %s", *request, f"{type(value).__name__}: {value}")


def _message(error: object) -> str:
    """Return the message of an HTTPError, if it is one."""
    return error.log_message % error.args if isinstance(error, HTTPError) and error.log_message else ""


def _log(handler: RequestHandler) -> None:
    """Log nothing of successful requests: their addresses hold the token."""
