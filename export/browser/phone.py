"""Serving the page to phones: an address with a QR code, log lines meanwhile, and the end of serving."""

import asyncio
import io
import logging
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import segno

from shvit.errors import InputError

from ..web import Content
from . import tls
from .phone_record import PhoneRecord
from .server import LOGGER, listen, serve

LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
Log = Callable[[str], None]


@dataclass(frozen=True)
class ServerConfig:
    """The address that phones connect to, and for how long it is served."""

    lan: bool
    """Accept connections from the network; only from this machine otherwise."""
    host: str | None
    """The name or address by which phones know this machine; guessed where None."""
    tls: bool
    port: int
    """Port to listen on; 0 is any free port."""
    time_limit_s: float

    def resolve_host(self) -> str:
        """Return the host in the address.

        Raises:
            InputError: there is no network, or `host` is not a name or address that a phone can open.
        """
        if self.host is not None:
            return tls.check_host(self.host)
        host = tls.lan_address() if self.lan else LOOPBACK
        if host is None:
            raise InputError("--lan: this machine has no network; join one, or give the name that phones use with "
                             "--host")  # fmt: skip
        return host


@dataclass(frozen=True)
class BoundServer:
    """A server's listening sockets and its certificate, before it accepts anyone."""

    host: str
    """Host in the address; an IPv6 address without brackets."""
    sockets: Sequence[socket.socket]
    signed: tls.SelfSigned | None
    """None without TLS."""

    def url(self, token: str) -> str:
        """Return the address that phones open."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.signed else 'http'}://{host}:{self.sockets[0].getsockname()[1]}/{token}/"


def bind_server(config: ServerConfig) -> BoundServer:
    """Bind the sockets and make the certificate, so that their errors come before anything long begins.

    Raises:
        InputError: the port is taken, there is no network, or the host is not valid.
    """
    host = config.resolve_host()
    signed = tls.self_signed([host, LOOPBACK, "localhost"]) if config.tls else None
    everywhere, here = (None, "::1") if ":" in host else (EVERYWHERE, LOOPBACK)
    return BoundServer(host, listen(everywhere if config.lan else here, config.port), signed)


def serve_phones(
    contents: Mapping[str, Content], policy: str, receive: Callable[[PhoneRecord], int], config: ServerConfig,
    server: BoundServer, log: Log,
) -> None:  # fmt: skip
    """Serve the page until no more records are awaited, the time is over or the user interrupts; see `serve`."""
    token, minutes = secrets.token_urlsafe(16), f"{config.time_limit_s / 60:g} minutes"
    _log_address(server, token, config, log)
    log(f"waiting for {minutes} at most, or until Ctrl-C")
    context = server.signed.context if server.signed else None
    serving = serve(contents, policy, token, receive, server.sockets, context, config.time_limit_s)
    with _logging(log):
        try:
            if not asyncio.run(serving):
                log(f"stopped after {minutes}")
        except KeyboardInterrupt:
            log("interrupted; the records that arrived are kept")


def _log_address(server: BoundServer, token: str, config: ServerConfig, log: Log) -> None:
    url = server.url(token)
    if "utf" in (sys.stdout.encoding or "").lower():
        for line in qr_code(url).splitlines():
            log(line)
    log(f"open {url}")
    if server.signed:
        log(f"the browser will warn, as the certificate is self-signed; its SHA-256 is {server.signed.fingerprint}")
    elif config.lan:
        log("without --tls a phone's browser has no threads, no WebGPU and no camera here, as the page explains")
    else:
        log("this machine alone can open it; add --lan for phones, best with --tls")


@contextmanager
def _logging(log: Log) -> Iterator[None]:
    """Pass what the server, Tornado and asyncio log to `log`."""
    handler = logging.StreamHandler(_Lines(log))
    loggers = (LOGGER, *map(logging.getLogger, ("tornado.general", "tornado.application", "asyncio")))
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


class _Lines(io.TextIOBase):
    """A stream of log lines, in which third-party text cannot move a terminal's cursor."""

    def __init__(self, log: Log):
        self.log = log

    def write(self, text: str) -> int:
        if line := "".join(each if each.isprintable() else "�" for each in text.rstrip("\n")):
            self.log(line[:500])
        return len(text)


def qr_code(text: str) -> str:
    """Return a QR code of half-block characters, for a terminal."""
    drawn = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(drawn, compact=True)
    return drawn.getvalue()
