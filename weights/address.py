"""Addresses of files: which may be fetched, and what of them may be shown."""

import re
import string
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

from shvit.errors import InputError

__all__ = ["check_address", "follow", "shown_address"]

SCHEMES = ("https", "http")
MAX_LENGTH = 8192  # signed addresses of object stores have about 2,000 characters
HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?\.?|\[[0-9a-f:.]+\]")
PORT = re.compile(r"([^:]*|\[[^\]]*\])(:\d{0,5})?")
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def check_address(url: str) -> str:
    """Return an address as it is sent: host names in IDNA, other characters than ASCII percent-encoded.

    Raises:
        InputError: it is not an https or http address with a host, holds a user name, a password, control characters
            or line breaks, or is too long.
    """
    shown = shown_address(url)
    if UNSEEN.search(url) or len(url) > MAX_LENGTH:
        raise InputError(f"{shown}: not an address that can be fetched; it holds control characters or more than "
                         f"{MAX_LENGTH} characters")  # fmt: skip
    try:
        parts = urlsplit(url)
        port, host = parts.port, (parts.hostname or "")
        if not host.isascii():
            host = host.encode("idna").decode("ascii")
    except ValueError as error:  # brackets without an IPv6 address, a port that is not a number, a label too long
        raise InputError(f"{shown}: not an address that can be fetched; check its host and port") from error
    if parts.scheme not in SCHEMES:
        raise InputError(f"{shown}: not an address that can be fetched; give one that begins with https:// or http://")
    if "@" in parts.netloc:
        raise InputError(f"{shown}: holds a user name or a password, which are not sent; give an address without them")
    host = f"[{host}]" if ":" in host else host
    if not HOST.fullmatch(host) or port == 0:
        raise InputError(f"{shown}: not an address that can be fetched; check its host and port")
    path, query = (quote(each, safe=string.punctuation) for each in (parts.path, parts.query))
    return urlunsplit((parts.scheme, host if port is None else f"{host}:{port}", path or "/", query, ""))


def follow(url: str, location: str | None) -> str:
    """Return the address that a server's redirection from `url` leads to.

    Args:
        url: as in `check_address`.
        location: the header, in Latin-1 as it was received.

    Raises:
        InputError: it leads nowhere, to an address that `check_address` refuses, or from https to http.
    """
    shown = shown_address(url)
    if not location:
        raise InputError(f"{shown}: redirects to nowhere; name another address with --url")
    try:
        target = urljoin(url, quote(location, safe=string.punctuation, encoding="latin-1", errors="replace"))
        target = check_address(target)
    except (InputError, ValueError) as error:
        raise InputError(f"{shown}: redirects to an address that is not fetched ({shown_address(location)}); "
                         "name another address with --url") from error  # fmt: skip
    if url.startswith("https:") and not target.startswith("https:"):
        raise InputError(f"{shown}: leads to {shown_address(target)}, which is not encrypted; name another address "
                         "with --url")  # fmt: skip
    return target


def shown_address(url: str) -> str:
    """Return an address without what may be secret: no user name, password, query or fragment; at most 200 characters.

    Any text is taken, since an address is shown when it is wrong, too.
    """
    scheme, slashes, rest = url.rpartition("//") if url.startswith("//") else url.partition("//")
    if not slashes or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:|", scheme):
        scheme, rest = "", url
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    path = re.split(r"[?#]", rest[len(host) :], maxsplit=1)[0]
    host = host.rpartition("@")[2]
    if scheme and not PORT.fullmatch(host):  # the beginning of a password with a slash in it, perhaps
        return f"{scheme}//…"
    text = f"{scheme}{'//' if scheme else ''}{host}{path}"
    text = text if len(text) <= 200 else text[:199] + "…"
    return f"{text}?…" if "?" in rest else text
