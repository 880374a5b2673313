"""Serving one page to a phone: an exact table of addresses below a token, bounded, logged, and gone when it is done."""

import asyncio
import hmac
import json
import logging
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from shvit.errors import InputError

from .phone_record import MAX_BYTES, PhoneRecord, read_record
from .trial import Content

RECORDS = "records"
MAX_HEADER_BYTES = 16 << 10
WAIT_S = 20.0  # for a request's head, and for its body; a record takes a phone a second
BLOCK = 1 << 18
LINGER_S = 1.0  # for the last answer to reach the phone
LOGGER = logging.getLogger("shvit.phone")
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # these two allow threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the address is a secret
}


@dataclass(frozen=True)
class Address:
    """Where it listens."""

    host: str
    """That it binds."""
    port: int
    """0: any that is free."""
    token: str
    tls: ssl.SSLContext | None = None


async def serve(
    served: Mapping[str, Content],
    policy: str,
    address: Address,
    receive: Callable[[PhoneRecord], bool],
    ready: Callable[[int], None],
    time_limit_s: float,
) -> bool:
    """Serves until `receive` says that it has enough or the time is over.

    Args:
        served: what is there, by address below the token; nothing else is.
        policy: the Content-Security-Policy of all of it.
        receive: is given each record that holds to the schema; True ends the serving.
            It may raise InputError for one that it does not want.
        ready: is told the port.

    Returns:
        Whether `receive` had enough.

    Raises:
        InputError: the address cannot be listened on.
    """
    done = asyncio.Event()

    def accept(record: PhoneRecord) -> None:
        if receive(record):
            done.set()

    application = Application(
        [(r"/(.*)", _Page, {"served": served, "policy": policy, "token": address.token, "accept": accept})],
        log_function=_log,
    )
    server = HTTPServer(
        application,
        ssl_options=address.tls,
        max_header_size=MAX_HEADER_BYTES,
        max_body_size=MAX_BYTES,
        idle_connection_timeout=WAIT_S,
        body_timeout=WAIT_S,
    )
    try:
        sockets = bind_sockets(address.port, address.host)
    except OSError as error:
        raise InputError(f"--port {address.port}: cannot listen on {address.host}: {error.strerror}; choose another, "
                         "or leave it out") from error  # fmt: skip
    server.add_sockets(sockets)
    try:
        ready(sockets[0].getsockname()[1])
        await asyncio.wait_for(done.wait(), time_limit_s)
        await asyncio.sleep(LINGER_S)
        return True
    except asyncio.TimeoutError:
        return False
    finally:
        server.stop()
        await server.close_all_connections()


class _Page(RequestHandler):
    def initialize(
        self, served: Mapping[str, Content], policy: str, token: str, accept: Callable[[PhoneRecord], None]
    ) -> None:
        self.served, self.policy, self.token, self.accept = served, policy, token, accept

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def address(self, path: str) -> str:
        """What follows the token; HTTPError 404 without it."""
        token, slash, rest = path.partition("/")
        if not (slash and hmac.compare_digest(token.encode(), self.token.encode())):
            raise HTTPError(404, "wrong token")
        return rest

    async def get(self, path: str) -> None:
        content = self.served.get(self.address(path))
        if content is None:
            raise HTTPError(404, "no such address")
        self.set_header("Content-Type", content.type)
        self.set_header("Content-Length", content.size())
        self.set_header("Content-Security-Policy", f"{self.policy}; frame-ancestors 'none'")
        kept = "private, max-age=86400, immutable" if "/files/" in path else "no-store"
        self.set_header("Cache-Control", kept)
        if self.request.method == "HEAD":
            return
        try:
            await self._send(content.source)
        except StreamClosedError:
            LOGGER.info("%s went away", self.request.remote_ip)

    head = get

    async def _send(self, source: bytes | Path) -> None:
        if isinstance(source, bytes):
            self.write(source)
            await self.flush()
            return
        with source.open("rb") as file:
            while block := file.read(BLOCK):
                self.write(block)
                await self.flush()

    def post(self, path: str) -> None:
        if self.address(path) != RECORDS:
            raise HTTPError(404, "no such address")
        if self.request.headers.get("Content-Type", "").partition(";")[0] != "application/json":
            raise HTTPError(415, "a record must be application/json")
        try:
            self.accept(read_record(self.request.body))
        except InputError as error:
            raise HTTPError(400, "%s", str(error)) from error
        self.set_status(201)
        self.finish({"received": True})

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        error = kwargs.get("exc_info", (None, None, None))[1]
        said = error.log_message % error.args if isinstance(error, HTTPError) and error.log_message else self._reason
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"error": said}))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        if isinstance(value, HTTPError):
            said = value.log_message % value.args if value.log_message else value.reason or ""
            LOGGER.warning("refused %s %s: %d %s", self.request.remote_ip, self.request.method, value.status_code, said)
        else:
            LOGGER.error("failed on %s %s", self.request.remote_ip, self.request.method, exc_info=(typ, value, tb))


def _log(handler: RequestHandler) -> None:
    """Nothing of what went well: addresses hold the token."""
