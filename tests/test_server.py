"""The server for phones against clients that mean no good; it must refuse them, say so, and live on."""

import asyncio
import hashlib
import http.client
import json
import logging
import socket
import ssl
import threading
import time
from dataclasses import replace

import pytest

from shvit.errors import InputError
from shvit.export import server
from shvit.export.phone_record import MAX_BYTES, read_record
from shvit.export.server import Address, serve
from shvit.export.tls import self_signed
from shvit.export.trial import Content

TOKEN = "unguessable"
SERVED = {"": Content(b"<p>page", "text/html"), "files/a.bin": Content(bytes(range(256)) * 4000, "application/binary")}
CASE = {
    "model": "tiny", "precision": "fp32", "sha256": "0" * 64, "img_size": 64, "gmacs": 0.1, "backend": "wasm",
    "threads": 1, "error": "", "load_ms": 12.5, "first_ms": 3, "rounds": [[1.5, 2.0], [1.75]],
    "check": {"images": 7, "max_rel_error": 1e-6, "snr_db": 120.5, "top1_agreement": 100, "passed": True},
}  # fmt: skip
RECORD = {
    "format": "shvit-phone-1", "runtime": "onnxruntime-web 1.30.0", "cases": [CASE],
    "device": {"name": "Fairphone", "browser": "Firefox", "cores": 8, "memory_gb": None, "gpu": "", "missing": {}},
    "sustained": [{"case": 0, "seconds": [1.5, 1.5, 1.75, 2.0, 3.0]}],
}  # fmt: skip


def read_to_the_end(connection):
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except (TimeoutError, ConnectionError):
        pass
    return b"".join(parts)


class Serving:
    """A server in a thread, which keeps what it received."""

    def __init__(self, served=SERVED, policy="default-src 'none'", time_limit_s=60.0, tls=None, enough=10**6):
        self.served, self.policy = served, policy
        self.records, self.ended, self.port = [], None, 0
        self.known = threading.Event()
        self.address = Address("127.0.0.1", 0, TOKEN, tls)
        self.thread = threading.Thread(target=self._run, args=(time_limit_s, enough))

    def _run(self, time_limit_s, enough):
        def receive(record):
            if record.device.name == "stranger":
                raise InputError("a record of files that were not served here")
            self.records.append(record)
            return len(self.records) >= enough

        def ready(port):
            self.port = port
            self.known.set()

        self.loop = asyncio.new_event_loop()
        self.task = self.loop.create_task(serve(self.served, self.policy, self.address, receive, ready, time_limit_s))
        try:
            self.ended = self.loop.run_until_complete(self.task)
        except asyncio.CancelledError:
            self.ended = "stopped"
        finally:
            self.loop.close()

    def __enter__(self):
        self.thread.start()
        assert self.known.wait(10)
        return self

    def __exit__(self, *_):
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(10)
        assert not self.thread.is_alive()

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers

    def raw(self, sent, timeout=10.0):
        """What comes back for bytes as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(sent)
            return read_to_the_end(connection)

    def post(self, record, path=f"/{TOKEN}/records", content_type="application/json"):
        body = record if isinstance(record, bytes) else json.dumps(record).encode()
        return self.ask("POST", path, body, Content_Type=content_type)


@pytest.fixture(scope="module")
def serving():
    with Serving() as opened:
        yield opened


@pytest.fixture
def alive(serving, caplog):
    """The server, which must serve as ever after whatever the test did, and log what it refused."""
    logging.getLogger("shvit.phone").propagate = True
    with caplog.at_level(logging.INFO):
        yield serving
    assert serving.ask("GET", f"/{TOKEN}/")[:2] == (200, b"<p>page")


def test_page_and_files_are_served_with_the_headers_that_threads_need(serving):
    status, body, headers = serving.ask("GET", f"/{TOKEN}/")
    assert (status, body) == (200, b"<p>page")
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    status, body, headers = serving.ask("GET", f"/{TOKEN}/files/a.bin")
    assert (status, body) == (200, SERVED["files/a.bin"].source)
    assert "immutable" in headers["Cache-Control"]
    status, body, headers = serving.ask("HEAD", f"/{TOKEN}/files/a.bin")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(SERVED["files/a.bin"].source)))


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/wrong/",
        f"/{TOKEN}x/",
        f"/{TOKEN[:-1]}/",
        f"/{TOKEN}",
        f"/{TOKEN}/../../etc/passwd",
        f"/{TOKEN}/files/../../../etc/passwd",
        f"/{TOKEN}/%2e%2e/%2e%2e/etc/passwd",
        f"/{TOKEN}/..%5c..%5cetc",
        f"/{TOKEN}//etc/passwd",
        f"/{TOKEN}/files/",
        f"/{TOKEN}/files",
        f"/{TOKEN}/files/a.bin%00.html",
        "/%ff%fe/",
        "//etc/passwd",
        "/é/",
    ],
)
def test_other_addresses_are_refused(alive, caplog, path):
    status, body = alive.ask("GET", path.replace("é", "%C3%A9"))[:2]
    assert status == (400 if "%ff" in path else 404)
    assert b"root:" not in body
    assert f"refused 127.0.0.1 GET: {status}" in caplog.text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "MERGE"])
def test_other_methods_are_refused(alive, method):
    assert alive.ask(method, f"/{TOKEN}/")[0] in (405, 400)


def test_a_record_arrives(alive):
    before = len(alive.records)
    status, body, _ = alive.post(RECORD)
    assert (status, json.loads(body)) == (201, {"received": True})
    assert alive.records[before:] == [read_record(json.dumps(RECORD).encode())]


def damaged(**changes):
    return {**RECORD, **changes}


def of_case(**changes):
    return {**RECORD, "cases": [{**CASE, **changes}]}


def of_device(**changes):
    return {**RECORD, "device": {**RECORD["device"], **changes}}


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"format": "shvit-phone-1"}',
        b"\xff\xfe",
        [],
        damaged(format="other"),
        damaged(extra=1),
        damaged(cases=[]),
        damaged(cases=[CASE] * 513),
        damaged(sustained=[{"case": 1, "seconds": [1, 2]}]),
        damaged(sustained=[{"case": -1, "seconds": [1, 2]}]),
        of_case(model="x" * 81),
        of_case(model="\x1b[2J"),
        of_case(model="abc\u202edef"),
        of_case(sha256="../../etc/passwd"),
        of_case(precision="fp64"),
        of_case(backend="../x"),
        of_case(threads="2"),
        of_case(threads=10**9),
        of_case(load_ms=-1),
        of_case(load_ms=True),
        of_case(rounds=[[1e300]]),
        of_case(rounds=[[]]),
        of_case(path="/etc/passwd"),
        json.dumps(RECORD).replace("12.5", "NaN").encode(),
        json.dumps(RECORD).replace("12.5", "1e999").encode(),
        json.dumps(RECORD).replace("12.5", "1" * 5000).encode(),
        of_device(name=""),
        of_device(name="a\nb"),
        of_device(missing={"x" * 81: "y"}),
        of_device(missing={str(i): "y" for i in range(9)}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_records_are_refused(alive, caplog, record):
    before = len(alive.records)
    status, body, _ = alive.post(record)
    assert status == 400
    assert json.loads(body)["error"].startswith("not a record of `shvit bench phone` (")
    assert len(alive.records) == before
    assert "refused 127.0.0.1 POST: 400 not a record" in caplog.text
    assert "\x1b" not in caplog.text


def test_records_of_other_files_or_to_other_addresses_are_refused(alive):
    assert alive.post(of_device(name="stranger"))[0] == 400
    assert alive.post(RECORD, path="/wrong/records")[0] == 404
    assert alive.post(RECORD, path=f"/{TOKEN}/")[0] == 404
    assert alive.post(RECORD, path=f"/{TOKEN}/files/a.bin")[0] == 404
    assert alive.post(RECORD, content_type="text/plain")[0] == 415


def test_a_huge_body_is_refused_before_it_is_read(alive, caplog):
    head = f"POST /{TOKEN}/records HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    answer = alive.raw(head.encode() + str(MAX_BYTES + 1).encode() + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
    assert alive.raw(head.encode() + b"99999999999999999999\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert "Content-Length too long" in caplog.text


def test_a_huge_body_in_chunks_is_refused(alive):
    head = (f"POST /{TOKEN}/records HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n").encode()  # fmt: skip
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", alive.port), timeout=10) as connection:
        try:
            connection.sendall(head)
            for _ in range(MAX_BYTES // 0x100000 + 8):
                connection.sendall(chunk)
            connection.sendall(b"0\r\n\r\n")
            answer = connection.recv(4096)
        except ConnectionError:
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 2")


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500) + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: " + b"b" * 70_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda sent: repr(sent[:30]),
)
def test_malformed_requests_are_refused(alive, sent):
    assert not alive.raw(sent, timeout=3).startswith(b"HTTP/1.1 2")


def test_slow_clients_are_dropped_and_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(server, "WAIT_S", 1.0)
    with Serving() as slow:
        head = f"POST /{TOKEN}/records HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
        unread = f"GET /{TOKEN}/files/a.bin HTTP/1.1\r\nHost: x\r\n\r\n"
        starts = [b"", b"GET /", head.encode(), head.encode() + b"\r\n{", unread.encode()]
        clients = [socket.create_connection(("127.0.0.1", slow.port), timeout=10) for _ in range(80)]
        try:
            for i, client in enumerate(clients):
                client.sendall(starts[i % len(starts)])
            began = time.monotonic()
            assert slow.post(RECORD)[0] == 201  # while eighty of them wait
            assert time.monotonic() - began < 5
            for client in clients:
                read_to_the_end(client)
            assert time.monotonic() - began < 10
        finally:
            for client in clients:
                client.close()
        assert slow.ask("GET", f"/{TOKEN}/")[0] == 200


def test_it_stops_by_itself(monkeypatch):
    monkeypatch.setattr(server, "LINGER_S", 0.1)
    with Serving(enough=2) as serving:
        serving.post(RECORD)
        assert serving.ask("GET", f"/{TOKEN}/")[0] == 200
        serving.post(RECORD)
        serving.thread.join(5)
        assert serving.ended is True
    with Serving(time_limit_s=0.2) as serving:
        serving.thread.join(5)
        assert serving.ended is False
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", serving.port), timeout=1)


def test_a_port_that_is_taken_is_named(serving):
    with pytest.raises(InputError, match=rf"--port {serving.port}: cannot listen on 127.0.0.1: .*; choose another"):
        asyncio.run(serve(SERVED, "", replace(serving.address, port=serving.port), lambda _: True, lambda _: None, 1.0))


def test_https_with_a_certificate_of_our_own():
    signed = self_signed(["127.0.0.1", "localhost", "phone.test"])
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with Serving(tls=signed.context) as serving:
        plain = socket.create_connection(("127.0.0.1", serving.port), timeout=10)
        with context.wrap_socket(plain, server_hostname="localhost") as secure:
            der = secure.getpeercert(binary_form=True)
            secure.sendall(f"GET /{TOKEN}/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert secure.recv(4096).startswith(b"HTTP/1.1 200")
        assert signed.fingerprint.replace(":", "") == hashlib.sha256(der).hexdigest().upper()
        trusting = ssl.create_default_context(cadata=ssl.DER_cert_to_PEM_cert(der))
        for name in ("127.0.0.1", "localhost", "phone.test"):  # names and addresses are the certificate's
            with socket.create_connection(("127.0.0.1", serving.port), timeout=10) as plain:
                trusting.wrap_socket(plain, server_hostname=name).close()
        with (
            pytest.raises(ssl.SSLCertVerificationError),
            socket.create_connection(("127.0.0.1", serving.port), timeout=10) as plain,
        ):
            trusting.wrap_socket(plain, server_hostname="other.test")
        assert serving.raw(b"GET / HTTP/1.1\r\n\r\n", timeout=3)[:8] != b"HTTP/1.1"  # not without TLS
