"""The server for phones against clients that mean no good; it must refuse them, say so, and live on."""

import hashlib
import json
import logging
import socket
import ssl
import time
from contextlib import suppress

import pytest

from shvit.errors import InputError
from shvit.export.browser import server
from shvit.export.browser.phone_record import MAX_BYTES, read_record
from shvit.export.browser.server import listen
from shvit.export.browser.tls import self_signed
from shvit.export.web import Content
from tests.export.browser.serving import CASE, RECORD, SERVED, TOKEN, Serving, read_to_the_end


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
        "http://x/../y",
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
    assert (status, json.loads(body)) == (201, {"awaited": 10**6 - before - 1})
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
        of_case(rounds=[[1.0] * 301]),
        of_case(rounds=[[1.0]] * 51),
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
        {**RECORD, "\x1b]0;title\x07": 1},
        of_device(missing={str(i): "y" for i in range(9)}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_malformed_records_are_refused(alive, caplog, record):
    before = len(alive.records)
    status, body, _ = alive.post(record)
    assert status == 400
    assert json.loads(body)["error"].startswith("not a record of `shvit bench phone`")
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


@pytest.fixture
def impatient(monkeypatch, caplog):
    """A server that waits for a second."""
    monkeypatch.setattr(server, "WAIT_S", 1.0)
    logging.getLogger("shvit.phone").propagate = True
    with caplog.at_level(logging.INFO), Serving({**SERVED, "files/b.bin": HUGE}) as opened:
        yield opened
        assert opened.ask("GET", f"/{TOKEN}/")[0] == 200


HUGE = Content.of(bytes(40 << 20))  # more than sockets hold


def test_slow_clients_are_dropped_and_hold_nobody_up(impatient, caplog):
    head = f"POST /{TOKEN}/records HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    starts = [b"", b"GET /", head.encode(), head.encode() + b"\r\n{"]
    clients = [socket.create_connection(("127.0.0.1", impatient.port), timeout=10) for _ in range(12)]
    try:
        for i, client in enumerate(clients):
            client.sendall(starts[i % len(starts)])
        began = time.monotonic()
        assert impatient.post(RECORD)[0] == 201  # while they wait
        assert time.monotonic() - began < 5
        for client in clients:
            read_to_the_end(client)
        assert time.monotonic() - began < 10
    finally:
        for client in clients:
            client.close()
    assert "dropped 127.0.0.1: no whole request within 1 s" in caplog.text


def test_clients_that_do_not_read_are_dropped(impatient, caplog):
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=10) as client:
        client.sendall(f"GET /{TOKEN}/files/b.bin HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        end = time.monotonic() + 10
        while "read nothing within 1 s" not in caplog.text and time.monotonic() < end:
            time.sleep(0.1)
        assert "dropped 127.0.0.1: read nothing within 1 s" in caplog.text
        assert len(read_to_the_end(client)) < HUGE.size


def test_too_many_connections_are_closed_and_the_next_is_served(impatient):
    clients = [socket.create_connection(("127.0.0.1", impatient.port), timeout=10) for _ in range(200)]
    time.sleep(0.5)
    closed = 0
    for client in clients:
        client.settimeout(0.05)
        with suppress(TimeoutError):
            closed += client.recv(1) == b""
    assert closed >= 200 - server.MAX_PER_ADDRESS
    for client in clients:
        client.close()


def test_a_body_without_the_token_is_not_read(alive):
    """Answered before it is sent."""
    head = (
        f"POST /wrong/records HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {MAX_BYTES}\r\n"
    )
    assert alive.raw(head.encode() + b"\r\n", timeout=3).startswith(b"HTTP/1.1 404")


def test_this_machines_own_failures_are_told_here_and_not_there(alive, caplog):
    status, body, _ = alive.post(of_device(name="full"))
    assert status == 500
    assert b"private" not in body
    assert "failed for 127.0.0.1 POST: OSError: /private/path: no space left" in caplog.text


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
        listen("127.0.0.1", serving.port)


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
