"""Downloads from a server on this machine that cuts, lies and moves; and `shvit weights pull` from it."""

import hashlib
import http.server
import json
import re
import threading
from contextlib import closing
from pathlib import Path
from socket import socket
from types import SimpleNamespace

import pytest
import timm
import torch
from filelock import FileLock

from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.errors import CheckFailed, InputError
from shvit.files import sha256
from shvit.weights import download as downloads
from shvit.weights.address import follow
from shvit.weights.download import download

# --- the server -------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` as `server.how` says, and notes the headers of every request."""

    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file.pth")
            self.end_headers()
            return
        content, how = self.server.content, self.server.how
        self.server.requests.append(self.headers)
        if len(self.server.requests) <= len(how.statuses):
            self.send_error(how.statuses[len(self.server.requests) - 1])
            return
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if how.ranges else None
        start = int(found[1]) if found and self.headers.get("If-Range") == how.etag else 0
        total = len(content) + how.lie
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("ETag", how.etag)
        if how.length:
            self.send_header("Content-Length", str(total - start))
        self.end_headers()
        end = how.cuts[len(self.server.requests) - 1] if len(self.server.requests) <= len(how.cuts) else None
        self.wfile.write(content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server of 100 kB; `how` bends it, `requests` is what it saw."""
    monkeypatch.setattr(downloads, "PAUSE_S", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content = torch.arange(12_500).numpy().tobytes()
        server.how = SimpleNamespace(etag='"1"', ranges=True, length=True, lie=0, cuts=[], statuses=[])
        server.requests = []
        server.url = f"http://127.0.0.1:{server.server_port}/file.pth"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def fetch(server, path: Path, expected: str | None = None) -> str:
    return download(server.url, path, expected, prove=lambda partial: None)


def ranges(server) -> list[str | None]:
    return [headers.get("Range") for headers in server.requests]


# --- download ---------------------------------------------------------------------------------------------------------


def test_cut_connections_are_continued_where_they_broke(server, tmp_path):
    server.how.cuts = [30_000, 70_000]
    digest = fetch(server, tmp_path / "file.pth")
    assert ranges(server) == [None, "bytes=30000-", "bytes=70000-"]
    assert server.requests[1]["If-Range"] == '"1"'
    assert (tmp_path / "file.pth").read_bytes() == server.content
    assert digest == sha256(tmp_path / "file.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


def test_redirections_are_continued_too(server, tmp_path):
    server.how.cuts = [30_000]
    server.url = server.url.replace("file.pth", "moved")
    fetch(server, tmp_path / "file.pth")
    assert ranges(server) == [None, "bytes=30000-"]
    assert (tmp_path / "file.pth").read_bytes() == server.content


def test_a_redirection_to_an_unencrypted_address_is_refused():
    with pytest.raises(InputError, match=r"leads to http://example.org/file.pth, which is not encrypted"):
        follow("https://example.org/moved", "http://example.org/file.pth")


def test_a_later_call_continues_an_earlier_one(server, tmp_path):
    server.how.cuts = [10_000, 20_000, 30_000, 40_000]
    with pytest.raises(InputError, match=r"ended after 40,000 bytes of 100,000.*is kept"):
        fetch(server, tmp_path / "file.pth")
    assert not (tmp_path / "file.pth").exists()
    fetch(server, tmp_path / "file.pth")
    assert ranges(server)[-1] == "bytes=40000-"
    assert (tmp_path / "file.pth").read_bytes() == server.content


def test_a_file_that_changed_meanwhile_starts_anew(server, tmp_path):
    server.how.cuts = [10_000, 20_000, 30_000, 40_000]
    with pytest.raises(InputError):
        fetch(server, tmp_path / "file.pth")
    server.how.etag, server.content = '"2"', server.content[::-1]
    fetch(server, tmp_path / "file.pth")
    assert (tmp_path / "file.pth").read_bytes() == server.content


@pytest.mark.parametrize("how", [{"ranges": False}, {"etag": 'W/"1"'}], ids=["ignores Range", "weak ETag"])
def test_what_cannot_be_continued_starts_anew(server, tmp_path, how):
    vars(server.how).update(how, cuts=[30_000])
    fetch(server, tmp_path / "file.pth")
    assert ranges(server) == [None, None if "etag" in how else "bytes=30000-"]
    assert (tmp_path / "file.pth").read_bytes() == server.content


def test_a_left_over_as_long_as_the_file_starts_anew(server, tmp_path):
    (tmp_path / "file.partial.pth").write_bytes(server.content)
    record = {"url": hashlib.sha256(server.url.encode()).hexdigest(), "validator": '"1"'}
    (tmp_path / "file.partial.pth.json").write_text(json.dumps(record))
    fetch(server, tmp_path / "file.pth")
    assert ranges(server) == ["bytes=100000-", None]
    assert (tmp_path / "file.pth").read_bytes() == server.content


@pytest.mark.parametrize("ranged", [True, False])
def test_a_length_that_lies_fails_and_leaves_nothing(server, tmp_path, ranged):
    server.how.lie, server.how.ranges = 5, ranged
    with pytest.raises(CheckFailed, match="100,000 bytes") as failed:
        fetch(server, tmp_path / "file.pth")
    assert failed.value.result["size_bytes"] == 100_000
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_hash_fails_and_leaves_nothing(server, tmp_path):
    with pytest.raises(CheckFailed, match=r"0{64} was expected"):
        fetch(server, tmp_path / "file.pth", expected="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_said_at_once(server, tmp_path):
    server.how.statuses = [404]
    with pytest.raises(InputError, match=r"HTTP 404.*--url"):
        fetch(server, tmp_path / "file.pth")
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.how.statuses = [503, 429]
    fetch(server, tmp_path / "file.pth")
    assert (tmp_path / "file.pth").read_bytes() == server.content


def test_no_connection_is_one_clear_line(server, tmp_path):
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        server.url = f"http://127.0.0.1:{free.getsockname()[1]}/file.pth"
        with pytest.raises(InputError, match=r"cannot be fetched \(.*4 attempts\); check the network") as failed:
            fetch(server, tmp_path / "file.pth")
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("length", [True, False])
def test_a_file_beyond_the_bound_is_given_up_early(server, tmp_path, monkeypatch, length):
    monkeypatch.setattr(downloads, "MAX_BYTES", 50_000)
    server.how.length, server.content = length, bytes(10_000_000)
    received = [0]
    with pytest.raises(InputError, match="GB allowed"):
        download(server.url, tmp_path / "file.pth", None, lambda partial: None, lambda done, _: received.append(done))
    assert max(received) < (1 if length else 1_000_000)
    assert list(tmp_path.iterdir()) == []


def test_only_http_is_fetched(tmp_path):
    with pytest.raises(InputError, match="begins with https"):
        download("file:///etc/hosts", tmp_path / "file.pth", None, prove=lambda partial: None)


# --- pull -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / "s1.safetensors"
    write_checkpoint(timm.create_model("shvit_s1", num_classes=10).state_dict(), path)
    return path


def pull(server, name: str = "shvit_s1.in1k", *more: str) -> dict:
    return run(["weights", "pull", name, "--url", server.url, *more])


def test_the_first_download_is_trusted_and_binds_later_ones(server, cache, checkpoint, capsys):
    server.content = checkpoint.read_bytes()
    path = cache / "shvit_s1.in1k.safetensors"
    first = pull(server)
    assert (first["fetched"], first["first_use"], first["path"]) == (True, True, str(path))
    assert json.loads((cache / "lock.json").read_text())["shvit_s1.in1k"]["sha256"] == sha256(path)
    assert "of 24.3 MB" in capsys.readouterr().out  # progress in plain lines

    again = pull(server)
    assert (again["fetched"], again["first_use"], len(server.requests)) == (False, False, 1)

    path.write_bytes(b"damaged")
    assert pull(server)["fetched"]
    assert path.read_bytes() == server.content

    path.unlink()
    other = timm.create_model("shvit_s1", num_classes=11)
    write_checkpoint(other.state_dict(), cache / "other.safetensors")
    server.content, server.how.etag = (cache / "other.safetensors").read_bytes(), '"2"'
    with pytest.raises(CheckFailed, match="was expected"):
        pull(server)
    assert not path.exists()


@pytest.mark.parametrize("wrong", ["another model", "no model"])
def test_a_wrong_file_is_neither_kept_nor_recorded(server, cache, checkpoint, wrong):
    server.content = checkpoint.read_bytes() if wrong == "another model" else b"<html>log in</html>"
    with pytest.raises(CheckFailed, match=r"should be shvit_s2.in1k, and is not .*nothing was kept"):
        pull(server, "shvit_s2.in1k")
    assert {path.name for path in cache.iterdir()} <= {".pull.lock"}


def test_output_is_a_copy_of_the_same_kind(server, cache, checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"is a \.safetensors file"):
        pull(server, "shvit_s1.in1k", "--output", str(tmp_path / "copy.pth"))
    assert not server.requests
    server.content = checkpoint.read_bytes()
    result = pull(server, "shvit_s1.in1k", "--output", str(tmp_path / "copy.safetensors"))
    assert result["path"] == str(tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == server.content


def test_one_download_at_a_time(server, cache):
    cache.mkdir()
    with FileLock(cache / ".pull.lock"), pytest.raises(InputError, match="under way"):
        pull(server)
