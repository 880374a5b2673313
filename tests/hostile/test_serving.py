"""Hosts, folders, records and requests that `shvit bench phone` and `shvit site` are given."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

from shvit.cli import run
from shvit.errors import InputError
from shvit.export.browser import phone
from shvit.export.browser.phone import ServerConfig, bind_server
from shvit.export.browser.phone_record import read_record, read_record_file
from shvit.export.browser.site import OWN_NAMES, check_site_folder, write_site
from shvit.export.browser.tls import check_host, self_signed
from shvit.export.web import Content
from tests.export.bench.test_explorer import MEASUREMENTS
from tests.export.browser.serving import RECORD, TOKEN, Serving

# --- hosts and ports --------------------------------------------------------------------------------------------------

NO_HOSTS = (
    "", " ", "a b", "x" * 300, "x" * 64, "-x", "x-", "a..b", ".", ".x", "é" * 100, "\x1b[2J", "x\n", "x\x00", "0.0.0.0",
    "::", "224.0.0.1", "255.255.255.255", "256.1.1.1", "1.2.3", "2130706433", "fe80::1%eth0", "[::1", "[]", "[x]", "http://x",
    "x:8080", "[::1]:80", "x/y", "user@x", "x?y", "*.org", "xn--zzzz-é",
    "bücher", "BÜCHER.de", "straße.de",
)  # fmt: skip
HOSTS = {
    "xn--bcher-kva.de.": "xn--bcher-kva.de",
    "laptop.local": "laptop.local",
    "Laptop": "laptop",
    "my_host": "my_host",
    "192.168.0.5": "192.168.0.5",
    "[2001:DB8::5]": "2001:db8::5",
    "::1": "::1",
}


@pytest.fixture
def unprepared(monkeypatch, tmp_path):
    """A folder in which nothing long may begin."""

    def begin(*args, **kwargs):
        raise AssertionError("began, though an option was wrong")

    monkeypatch.setattr("shvit.export.browser.main._BrowserOptions._prepare", begin)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(*argv) -> str:
    with pytest.raises(InputError) as failed:
        run(list(map(str, argv)))
    assert "\n" not in str(failed.value)
    return str(failed.value)


@pytest.mark.parametrize("host", NO_HOSTS, ids=lambda host: repr(host[:20]))
def test_a_host_that_is_none_is_refused_before_anything_long(host, unprepared):
    assert fails("bench", "phone", "--lan", "--tls", f"--host={host}").startswith("--host ")
    assert list(unprepared.iterdir()) == []


@pytest.mark.parametrize("host", HOSTS)
def test_sound_hosts_are_in_the_address_and_in_the_certificate(host):
    assert check_host(host) == HOSTS[host]
    self_signed([check_host(host)])


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1"), (None, "127.0.0.1")])
def test_the_address_leads_to_the_sockets(host, shown):
    opened = bind_server(ServerConfig(lan=False, host=host, tls=False, port=0, time_limit_s=1))
    try:
        port = opened.sockets[0].getsockname()[1]
        assert opened.url("token") == f"http://{shown}:{port}/token/"
        with socket.create_connection((shown.strip("[]"), port), timeout=5):
            pass
    finally:
        for each in opened.sockets:
            each.close()


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "-1"],
        ["--port", "65536"],
        ["--port", "9" * 5000],
        ["--minutes", "nan"],
        ["--minutes", "inf"],
        ["--minutes", "-1"],
        ["--records", "33"],
        ["--rounds", "0"],
        ["--sustained", "3601"],
        ["--threads", "1", "100000"],
        ["--threads", "0", "1"],
        ["--threads"],
    ],
    ids=lambda options: " ".join(options)[:20],
)
def test_numbers_out_of_range_are_refused_before_anything_long(options, unprepared):
    assert len(fails("bench", "phone", *options)) < 400


def test_a_port_that_is_taken_is_refused_before_anything_long(unprepared):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot listen" in fails("bench", "phone", "--port", port)


def test_no_network_is_refused_before_anything_long(unprepared, monkeypatch):
    monkeypatch.setattr("shvit.export.browser.tls.lan_address", lambda: None)
    assert "this machine has no network" in fails("bench", "phone", "--lan")
    assert phone.LOOPBACK == "127.0.0.1"


# --- folders ----------------------------------------------------------------------------------------------------------

SERVED = {"": Content.of(b"<p>", ".html"), "files/" + "0" * 64 + ".bin": Content.of(b"x")}


@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_site_replaces_nothing_of_the_users(name, kind, unprepared):
    mine = unprepared / "out" / name
    mine.parent.mkdir()
    if kind == "file":
        mine.write_text("<!doctype html><title>my diary</title>")
    elif kind == "folder":
        mine.mkdir()
    else:
        mine.symlink_to(unprepared / "elsewhere")
    before = sorted(unprepared.rglob("*"))
    message = fails("site", "--output", unprepared / "out")
    assert f"out/{name}: is " in message
    assert sorted(unprepared.rglob("*")) == before
    assert kind != "file" or "diary" in mine.read_text()


def test_a_site_replaces_its_own_and_leaves_the_rest(tmp_path):
    folder = tmp_path / "site"
    write_site(folder, SERVED, [], MEASUREMENTS, hosted=True)
    (folder / "notes.txt").write_text("mine")
    old = folder / "files" / ("1" * 64 + ".onnx")
    old.write_bytes(b"of an earlier one")
    check_site_folder(folder)
    write_site(folder, SERVED, [], MEASUREMENTS, hosted=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not old.exists()


def test_a_site_that_was_killed_while_it_was_written_is_completed(tmp_path, monkeypatch):
    def kill(path, measured):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shvit.export.browser.site.write_explorer", kill)
        with pytest.raises(KeyboardInterrupt):
            write_site(tmp_path / "site", SERVED, [], MEASUREMENTS, hosted=True)
    write_site(tmp_path / "site", SERVED, [], MEASUREMENTS, hosted=True)
    assert (tmp_path / "site" / "explorer.html").exists()


def test_files_of_a_site_are_not_reached_through_a_link(tmp_path):
    write_site(tmp_path / "site", SERVED, [], MEASUREMENTS, hosted=True)
    precious = tmp_path / "mine" / ("2" * 64 + ".onnx")
    precious.parent.mkdir()
    precious.write_bytes(b"mine")
    for file in (tmp_path / "site" / "files").iterdir():
        file.unlink()
    (tmp_path / "site" / "files").rmdir()
    (tmp_path / "site" / "files").symlink_to(precious.parent)
    with pytest.raises(InputError, match="files: is a symbolic link"):
        write_site(tmp_path / "site", SERVED, [], MEASUREMENTS, hosted=True)
    assert precious.read_bytes() == b"mine"


@pytest.mark.parametrize("command", [["bench", "phone"], ["site"]], ids=" ".join)
def test_an_output_that_is_a_file_is_one_line(command, unprepared):
    Path("out").write_text("mine")
    assert "out: is a file" in fails(*command, "--output", "out")
    assert "out: is a file" in fails(*command, "--output", "out/below")


@pytest.mark.parametrize("kind", ["file", "fifo", "folder of folders"])
def test_a_runtime_folder_that_is_none_is_one_line(kind, tmp_path, monkeypatch):
    from shvit.export.browser.ort_web import FILES, runtime_files

    monkeypatch.setattr("shvit.export.browser.ort_web._fetch", lambda folder, names: None)
    if kind == "file":
        (tmp_path / "ort").write_text("mine")
    elif kind == "fifo":
        os.mkfifo(tmp_path / "ort")
    else:
        for name in FILES:
            (tmp_path / "ort" / name).mkdir(parents=True)
    with pytest.raises(InputError):
        runtime_files(tmp_path / "ort")


# --- records and requests ---------------------------------------------------------------------------------------------

TEXT = json.dumps(RECORD)


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace('"format"', '"runtime": "x", "format"'),
        TEXT.replace('"cores": 8', '"cores": 8, "cores": 8'),
        TEXT.replace('"gmacs": 0.1', '"gmacs": NaN'),
        TEXT.replace('"gmacs": 0.1', '"gmacs": -Infinity'),
        TEXT.replace('"gmacs": 0.1', '"gmacs": 1e999'),
        TEXT.replace('"cores": 8', '"cores": ' + "9" * 5000),
        TEXT.replace('"cores": 8', '"cores": 8.0'),
        TEXT.replace('"cores": 8', '"cores": true'),
        TEXT.replace("Fairphone", "\\ud800"),
        TEXT.replace("Fairphone", "a\\u2028b"),
        TEXT.replace("Fairphone", "\\u202eevil"),
        TEXT.replace('"Fairphone"', "[" * 200 + "]" * 200),
        '{"a":' * 100_000,
        TEXT + TEXT,
        TEXT[:-1],
        "\ufeff",
    ],
    ids=lambda text: text[:12] + text[-12:],
)
def test_a_record_that_is_none_is_one_line(text, tmp_path):
    (tmp_path / "r.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match=r"r\.json: not a record of") as failed:
        read_record_file(tmp_path / "r.json")
    assert len(str(failed.value)) < 400
    assert str(failed.value).isprintable()


def test_a_sound_record_is_taken():
    assert read_record(TEXT.encode()).device.name == "Fairphone"


@pytest.mark.parametrize("kind", ["folder", "fifo", "none"])
def test_a_record_file_that_is_none_is_one_line(kind, tmp_path):
    path = tmp_path / "r.json"
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "none": lambda: None}[kind]()
    with pytest.raises(InputError, match=r"r\.json: "):
        read_record_file(path)


@pytest.fixture(scope="module")
def serving():
    with Serving() as opened:
        yield opened


@pytest.mark.parametrize(
    "path",
    [
        "/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        f"/{TOKEN}/%252e%252e/etc/passwd",
        f"/{TOKEN}/..%c0%af..%c0%afetc/passwd",
        f"/{TOKEN}/files/..%2f..%2fetc%2fpasswd",
        f"/{TOKEN}/files/a.bin/..",
        f"/{TOKEN}/files/a.bin;x",
        f"/{TOKEN}/FILES/A.BIN",
        f"/{TOKEN.upper()}/",
        f"http://evil.test/{TOKEN[:-1]}/",
        f"/?token={TOKEN}",
        "/" + "a" * 9000,
    ],
)
def test_other_addresses_are_refused(serving, path):
    answer = serving.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))
    assert b"root:" not in answer


def test_other_origins_and_websockets_get_nothing(serving):
    asked = {
        "Origin": "http://evil.test",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec_WebSocket_Version": "13",
    }
    status, _, headers = serving.ask("GET", f"/{TOKEN}/", **asked)
    assert status == 200  # as a plain request
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert serving.ask("GET", "/", Host="evil.test")[0] == 404
    assert serving.ask("OPTIONS", f"/{TOKEN}/records", Origin="http://evil.test")[0] == 405


def test_a_request_with_two_lengths_is_not_read_as_two_requests(serving):
    before = len(serving.records)
    body = json.dumps(RECORD)
    inner = (f"POST /{TOKEN}/records HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
             f"Content-Length: {len(body)}\r\n\r\n{body}")  # fmt: skip
    outer = (f"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: {len(inner)}\r\nTransfer-Encoding: chunked\r\n\r\n"
             f"0\r\n\r\n{inner}")  # fmt: skip
    serving.raw(outer.encode(), timeout=1)
    time.sleep(0.1)
    assert len(serving.records) == before
    assert serving.ask("GET", f"/{TOKEN}/")[0] == 200
