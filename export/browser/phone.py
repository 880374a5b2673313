"""Letting phones in: an address with a QR code, what is said meanwhile, and the end of it."""

import io
import logging
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shvit.errors import InputError

from ..web import Content
from .phone_record import PhoneRecord

if TYPE_CHECKING:
    from .tls import SelfSigned

LOOPBACK = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Door:
    """Where phones come in, and for how long."""

    lan: bool
    """Reachable from the network; from this machine alone otherwise."""
    host: str | None
    """The name or address that phones know this machine by; guessed where None."""
    tls: bool
    port: int
    """0: any that is free."""
    time_limit_s: float

    def shown(self) -> str:
        """The host in the address.

        Raises:
            InputError: there is no network, or `host` is no name or address that a phone can open.
        """
        from .tls import check_host, lan_address

        if self.host is not None:
            return check_host(self.host)
        host = lan_address() if self.lan else LOOPBACK
        if host is None:
            raise InputError("--lan: this machine has no network; join one, or say how phones reach it with --host")
        return host


@dataclass(frozen=True)
class Opened:
    """A door at which phones can knock."""

    host: str
    """As in the address; an IPv6 address without brackets."""
    sockets: Sequence[socket.socket]
    signed: "SelfSigned | None"
    """None without TLS."""

    def url(self, token: str) -> str:
        """What phones open."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.signed else 'http'}://{host}:{self.sockets[0].getsockname()[1]}/{token}/"


def open_door(door: Door) -> Opened:
    """Everything that can go wrong with hosts, ports and certificates does before anything long begins.

    Raises:
        InputError: the port is taken, there is no network, or the host is none.
    """
    from .server import listen
    from .tls import self_signed

    host = door.shown()
    signed = self_signed([host, LOOPBACK, "localhost"]) if door.tls else None
    ipv6 = ":" in host
    if door.lan:
        return Opened(host, listen(None if ipv6 else EVERYWHERE, door.port), signed)
    return Opened(host, listen("::1" if ipv6 else LOOPBACK, door.port), signed)


def receive_phones(
    served: Mapping[str, Content],
    policy: str,
    receive: Callable[[PhoneRecord], int],
    door: Door,
    opened: Opened,
    say: Say,
) -> None:
    """Serves the page until no more records are awaited, the time is over or the user interrupts.

    Args:
        policy: the Content-Security-Policy.
        receive: as of `serve`.
        opened: as of `open_door`.
    """
    import asyncio

    from .server import serve

    token, signed = secrets.token_urlsafe(16), opened.signed
    url = opened.url(token)
    if "utf" in (sys.stdout.encoding or "").lower():
        for line in qr_code(url).splitlines():
            say(line)
    say(f"open {url}")
    if signed:
        say(f"the browser will warn, as nobody vouches for this certificate; its SHA-256 is {signed.fingerprint}")
    elif door.lan:
        say("without --tls a phone's browser has no threads, no WebGPU and no camera here: the page says so")
    else:
        say("this machine alone can open it; add --lan for phones, best with --tls")
    say(f"waiting for {door.time_limit_s / 60:g} minutes at most, or until Ctrl-C")
    tls = signed.context if signed else None
    serving = serve(served, policy, token, receive, opened.sockets, tls, door.time_limit_s)
    with _logging(say):
        try:
            if not asyncio.run(serving):
                say(f"stopped after {door.time_limit_s / 60:g} minutes")
        except KeyboardInterrupt:
            say("interrupted; what arrived is kept")


@contextmanager
def _logging(say: Say) -> Iterator[None]:
    """What the server, Tornado and asyncio log, to the terminal."""
    from .server import LOGGER

    handler = logging.StreamHandler(_Lines(say))
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
    """A stream of log lines, whose strangers' words cannot move a terminal's cursor."""

    def __init__(self, say: Say):
        self.say = say

    def write(self, text: str) -> int:
        if line := "".join(each if each.isprintable() else "�" for each in text.rstrip("\n")):
            self.say(line[:500])
        return len(text)


def qr_code(text: str) -> str:
    """A QR code of half-block characters, for a terminal."""
    import segno

    drawn = io.StringIO()
    segno.make(text, error="l", micro=False).terminal(drawn, compact=True)
    return drawn.getvalue()
