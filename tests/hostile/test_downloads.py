"""Downloads from servers and addresses that mean no good: each is one line, and nothing half-written stays."""

import json
import socket
import threading
import time
from contextlib import closing, suppress

import pytest

from shvit.errors import CheckFailed, InputError
from shvit.weights import connection
from shvit.weights import download as downloads
from shvit.weights.address import check_address, follow, shown_address
from shvit.weights.download import download

OK = b"HTTP/1.1 200 OK\r\n"
SECRET = "hunter2"


class Server:
    """Sends what `answer` gives, piece by piece, to whoever connects; an iterator may be endless."""

    def __init__(self, answer):
        self.answer, self.requests = answer, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/a/file.pth"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._send, args=(connection,), daemon=True).start()

    def _send(self, connection):
        with connection, suppress(OSError):
            self.requests.append(connection.recv(65536))
            for piece in self.answer(self) if callable(self.answer) else [self.answer]:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)

    def close(self):
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self.socket.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE_S", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def fetch(answer, folder, expected=None):
    """What `download` says of a server that answers so."""
    with closing(Server(answer)) as server, pytest.raises((InputError, CheckFailed)) as failed:
        download(server.url, folder / "file.pth", expected, prove=lambda partial: None)
    assert "\n" not in str(failed.value)
    return str(failed.value), server


def chunks(server):
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"10000\r\n" + bytes(1 << 16) + b"\r\n"


def tiny_chunks(server):
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
    while True:
        yield b"00000001;" + b"x" * 1000 + b"\r\n0\r\n"


def trailers(server):
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
    while True:
        yield b"A: b\r\n" * 10_000


def interim(server):
    while True:
        yield b"HTTP/1.1 100 Continue\r\n\r\n" * 1000


def headers(server):
    yield OK
    while True:
        yield b"A: " + b"b" * 60_000 + b"\r\n"


def loop(server):
    yield b"HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n"


def moved(location):
    return b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (OK + b"Content-Length: \xb2\r\n\r\nab", "its length is '²'"),
        (OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nab", "its length is '9999"),
        (OK + b"Content-Length: -5\r\n\r\nab", "its length is '-5'"),
        (OK + b"Content-Length: 0x10\r\n\r\nab", "its length is '0x10'"),
        (OK + b"Content-Length: 1_0\r\n\r\nab", "its length is '1_0'"),
        (OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nab", "it has 2 lengths"),
        (OK + b"Content-Length: 999999999999999\r\n\r\nab", "GB allowed"),
        (OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nab", "it is compressed, as 'gzip'"),
        (b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-9/" + b"9" * 5000 + b"\r\n\r\nab", "answers HTTP 206"),
        (b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-1/2\r\n\r\nab", "answers HTTP 206"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "answers HTTP 204"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "answers HTTP 304"),
        (b"HTTP/1.1 404 \x1b[2J\r\n\r\n", "answers HTTP 404"),
        (b"HTTP/1.1 999 x\r\n\r\n", "answers HTTP 999"),
        (b"HTTP/1.1 \xb2\xb2\xb2 x\r\n\r\n", "cannot be fetched"),
        (b"nonsense\r\n\r\n", "cannot be fetched"),
        (b"", "cannot be fetched"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nab", "cannot be fetched"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nab", "cannot be fetched"),
        (OK + b"Content-Length: 5\r\n\r\nab", "ended after 2 bytes"),
        (chunks, "sends more than it announces"),
        (tiny_chunks, "sends more than it announces"),
        (trailers, "sends more than it announces"),
        (interim, "its headers do not end"),
        (headers, "its headers do not end"),
        (loop, "redirects more than 10 times"),
        (moved(b"ftp://example.org/x"), r"redirects to an address that is not fetched (ftp://example.org/x)"),
        (moved(b"file:///etc/passwd"), r"redirects to an address that is not fetched (file:///etc/passwd)"),
        (moved(b"data:,x"), "redirects to an address that is not fetched"),
        (moved(b"http://user:hunter2@example.org/x"), "redirects to an address that is not fetched (http://example"),
        (moved(b"http://[x/"), "redirects to an address that is not fetched"),
        (moved(b"http://example.org:99999/"), "redirects to an address that is not fetched"),
        (moved(b""), "redirects to nowhere"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "redirects to nowhere"),
    ],
    ids=lambda value: (value.__name__ if callable(value) else repr(value[:60]))[-60:],
)  # fmt: skip
def test_an_answer_that_lies_is_one_line_and_leaves_nothing(answer, said, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_BYTES", 1 << 20)
    began = time.monotonic()
    message, server = fetch(answer, tmp_path)
    assert said in message, message
    assert SECRET not in message
    assert len(server.requests) <= 11
    assert not (tmp_path / "file.pth").exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"file.partial.pth", "file.partial.pth.json"}  # which the next call continues or overwrites
    assert not left or "is kept" in message or (tmp_path / "file.partial.pth").stat().st_size < 10
    assert time.monotonic() - began < 10


def drip_headers(server):
    yield OK
    while True:
        yield b"A"
        time.sleep(0.05)


def drip_body(server):
    yield OK + b"Content-Length: 1000\r\n\r\n"
    while True:
        yield b"A"
        time.sleep(0.05)


def silence(server):
    yield OK + b"Content-Length: 1000\r\n\r\nabc"
    time.sleep(2)


@pytest.mark.parametrize(
    ("answer", "said"),
    [(drip_headers, "too slow"), (drip_body, "too slow"), (silence, "timed out")],
    ids=["headers", "body", "silence"],
)
def test_a_server_that_drips_is_not_waited_for(answer, said, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(connection, "WINDOW_S", 0.2)
    began = time.monotonic()
    message, _ = fetch(answer, tmp_path)
    assert said in message
    assert time.monotonic() - began < 3
    assert not (tmp_path / "file.pth").exists()


def test_a_slow_but_steady_server_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "WINDOW_S", 0.1)

    def steady(server):
        yield OK + b"Content-Length: 5000\r\n\r\n"
        for _ in range(10):
            yield bytes(500)
            time.sleep(0.05)

    with closing(Server(steady)) as server:
        download(server.url, tmp_path / "file.pth", None, prove=lambda partial: None)
    assert (tmp_path / "file.pth").stat().st_size == 5000


@pytest.mark.parametrize(
    "given",
    [
        b"bytes 0-1/5",
        b"bytes 3-1/5",
        b"bytes 3-9/5",
        b"bytes 3-4/\xb2",
        b"bytes 3-4/" + b"9" * 5000,
        b"bytes 3-4/999999999999999",
        b"bytes 3-3/5",
        b"",
    ],
    ids=repr,
)
def test_a_range_that_lies_is_not_appended(given, tmp_path):
    with closing(Server(b"HTTP/1.1 206 P\r\nContent-Range: " + given + b"\r\nContent-Length: 2\r\n\r\nde")) as server:
        leave_partial(tmp_path, server.url)
        with pytest.raises((InputError, CheckFailed)):
            download(server.url, tmp_path / "file.pth", None, prove=lambda partial: None)
        assert b"Range: bytes=3-" in server.requests[0]
    assert not (tmp_path / "file.pth").exists()


def leave_partial(folder, url, validator='"1"', **more):
    """What a download of three bytes that was killed leaves."""
    (folder / "file.partial.pth").write_bytes(b"abc")
    record = {"url": downloads._digest(url), "validator": validator, **more}
    (folder / "file.partial.pth.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "record",
    [
        "[" * 40_000,
        "[]",
        "1" * 5000,
        "\ud800",
        '{"url": 1, "validator": 2}',
        {"validator": '"1"\r\nX: y'},
        {"validator": "x" * 5000},
        {"validator": ["a"]},
        {"validator": None},
        "folder",
    ],
    ids=lambda record: str(record)[:30],
)
def test_a_record_that_lies_starts_anew(record, tmp_path):
    with closing(Server(OK + b"Content-Length: 2\r\n\r\nde")) as server:
        leave_partial(tmp_path, server.url, **(record if isinstance(record, dict) else {}))
        if record == "folder":
            (tmp_path / "file.partial.pth.json").unlink()
            (tmp_path / "file.partial.pth.json").mkdir()
        elif isinstance(record, str):
            (tmp_path / "file.partial.pth.json").write_bytes(record.encode(errors="surrogatepass"))
        download(server.url, tmp_path / "file.pth", None, prove=lambda partial: None)
        assert b"Range" not in server.requests[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]
    assert (tmp_path / "file.pth").read_bytes() == b"de"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/x",
        "file:///etc/passwd",
        "data:,x",
        "/etc/passwd",
        "C:\\models\\x.pth",
        "example.org/x",
        "",
        "http://",
        "http:///x",
        "https://example.org\r\nX: y/",
        "https://example.org/\nX",
        "https://example.org/\x00",
        "https://exa mple.org/",
        "https://example.org:0/",
        "https://example.org:99999/",
        "https://example.org:²/",
        "https://[::1/",
        "https://[::g]/",
        "https://" + "a" * 300 + ".org/",
        "https://bü" + "c" * 70 + ".de/",
        "https://user@example.org/",
        f"https://user:{SECRET}@example.org/",
        f"https://user:{SECRET}/x@example.org/",
        f"https://user:{SECRET}#x@example.org/",
        f"ftp://user:{SECRET}@example.org/?k={SECRET}",
        "https://example.org\\@evil.org/",
        "<URL:http://example.org/>",
        "https://example.org/" + "a" * 9000,
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_asked(url, tmp_path):
    with pytest.raises(InputError) as failed:
        download(url, tmp_path / "file.pth", None, prove=lambda partial: None)
    assert SECRET not in str(failed.value)
    assert len(str(failed.value)) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://example.org", "https://example.org/"),
        ("HTTPS://Example.org:443/a%20b/c?x=1&y=%C3%A9#top", "https://example.org:443/a%20b/c?x=1&y=%C3%A9"),
        ("https://bücher.de/größe s.pth", "https://xn--bcher-kva.de/gr%C3%B6%C3%9Fe%20s.pth"),
        ("http://[::1]:80/x@1.0/y", "http://[::1]:80/x@1.0/y"),
        ("http://my_host/x", "http://my_host/x"),
    ],
)
def test_sound_addresses_are_taken(url, sent):
    assert check_address(url) == sent


def test_redirections_are_resolved_and_shown_without_secrets():
    assert follow("https://a.org/b/c", "../d?x=1") == "https://a.org/d?x=1"
    assert follow("https://a.org/b", "//c.org/\xe9") == "https://c.org/%E9"
    assert follow("http://a.org/b", "https://a.org/b") == "https://a.org/b"
    assert shown_address("https://u:p@a.org/npm/x@1/y?token=z#f") == "https://a.org/npm/x@1/y?…"
