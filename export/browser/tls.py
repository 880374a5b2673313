"""A self-signed certificate for serving phones, and the host names that it holds."""

import datetime
import ipaddress
import re
import socket
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shvit.errors import InputError

if TYPE_CHECKING:
    from cryptography import x509

DAYS = 2  # browsers refuse server certificates of more than several hundred days; a run lasts an hour


@dataclass(frozen=True)
class SelfSigned:
    """A self-signed certificate, ready for a server."""

    context: ssl.SSLContext
    fingerprint: str
    """SHA-256 of the certificate, as browsers show it in their warning."""


def self_signed(hosts: Sequence[str]) -> SelfSigned:
    """Create a key and a certificate for these names and addresses; neither stays on disk."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shvit bench phone")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # a phone's clock may be behind
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    private = key.private_bytes(pem, pkcs8, serialization.NoEncryption())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.TemporaryDirectory() as folder:  # for its owner alone; ssl reads files only
        path = Path(folder) / "server.pem"
        path.write_bytes(private + certificate.public_bytes(pem))
        context.load_cert_chain(path)
    return SelfSigned(context, certificate.fingerprint(hashes.SHA256()).hex(":").upper())


LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def check_host(host: str) -> str:
    """Return a host's name or address as it stands in certificates and URLs.

    A final dot and the brackets of an IPv6 address are removed.

    Raises:
        InputError: it is neither a name nor an address, stands for no machine, or is a name with letters outside
            ASCII, for which two encodings (IDNA 2003 and 2008) lead to different machines.
    """
    given = host if len(host) <= 80 else host[:80] + "…"
    advice = "give a name such as laptop.local, or an address such as 192.168.0.5 or 2001:db8::5"
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        pass
    else:
        if address.is_unspecified or address.is_multicast or "%" in bare or str(address) == "255.255.255.255":
            raise InputError(f"--host {given}: no phone can open that address; {advice}")
        return str(address)
    if not host.isascii() and host.isprintable():
        raise InputError(f"--host {given!r}: has letters outside ASCII; give the encoded name, which begins with "
                         "xn--, or an address")  # fmt: skip
    name = host.removesuffix(".").lower()
    labels = name.split(".")
    if len(name) > 253 or not all(map(LABEL.fullmatch, labels)) or labels[-1].isdigit():
        port = "; the port is given as --port" if re.fullmatch(r"[^:/]+:\d+", host) else ""
        raise InputError(f"--host {given!r}: is not a host name{port}; {advice}")
    return name


def _general_name(host: str) -> "x509.GeneralName":
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def lan_address() -> str | None:
    """Return this machine's address in its network; None where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # chooses a route; nothing is sent
        except OSError:
            return None
        return str(probe.getsockname()[0])
