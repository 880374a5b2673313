"""A server for phones in a thread of the test, and a record such as a phone sends."""

import asyncio
import http.client
import json
import socket
import threading

from shvit.errors import InputError
from shvit.export.browser.server import listen, serve
from shvit.export.web import Content

TOKEN = "unguessable"
SERVED = {"": Content(b"<p>page", "text/html"), "files/a.bin": Content(bytes(range(256)) * 4000, "application/binary")}
CASE = {
    "model": "tiny", "precision": "fp32", "sha256": "0" * 64, "img_size": 64, "gmacs": 0.1, "backend": "wasm",
    "threads": 1, "cpu_fallback": False, "error": "", "load_ms": 12.5, "first_ms": 3, "rounds": [[1.5, 2.0], [1.75]],
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
    """A server, which keeps what it received; records of a device called "stranger" are not wanted."""

    def __init__(self, served=SERVED, policy="default-src 'none'", time_limit_s=60.0, tls=None, enough=10**6):
        self.records, self.ended = [], None
        self.sockets = listen("127.0.0.1", 0)
        self.port = self.sockets[0].getsockname()[1]
        self.enough = enough
        self.loop = asyncio.new_event_loop()
        serving = serve(served, policy, TOKEN, self._receive, self.sockets, tls, time_limit_s)
        self.task = self.loop.create_task(serving)
        self.thread = threading.Thread(target=self._run)

    def _receive(self, record):
        if record.device.name == "stranger":
            raise InputError("a record of files that were not served here")
        if record.device.name == "full":
            raise OSError("/private/path: no space left")
        self.records.append(record)
        return self.enough - len(self.records)

    def _run(self):
        try:
            self.ended = self.loop.run_until_complete(self.task)
        except asyncio.CanceledError:
            self.ended = "stopped"
        finally:
            self.loop.close()

    def __enter__(self):
        self.thread.start()
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
