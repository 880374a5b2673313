"""A real browser, without a display and without a network, and a server on this machine for its pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OTHER_NAME = "phone.test"  # of this machine; over plain HTTP browsers do not trust it as they do 127.0.0.1


@contextmanager
def open_browser(profile_folder: Path, *arguments: str, **logs: str) -> Iterator[Any]:
    """Selenium's driver of a headless Chromium that reaches files and this machine alone.

    Where there is none, the test is skipped; it fails where the environment says CI.

    Args:
        profile_folder: an empty folder for what the browser keeps.
        arguments: of its command line, besides those that all tests need.
        logs: what `get_log` can give afterwards, and from which level on: browser="ALL", performance="ALL".
    """
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        missing = f"needs chromedriver and one of {', '.join(BROWSERS)} (Debian: apt-get install chromium-driver)"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        f"--host-resolver-rules=MAP {OTHER_NAME} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile_folder}",
        *arguments,
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", logs)
    with webdriver.Chrome(options=options, service=Service(driver)) as opened:
        opened.get("about:blank")  # in place of the browser's own first page, which may still be loading
        yield opened


class _Quiet(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript"}  # noqa: RUF012

    def log_message(self, *_: Any) -> None:
        pass


class _Shared(_Quiet):
    def end_headers(self) -> None:
        self.send_header("Access-Control-Allow-Origin", "*")
        super().end_headers()


@contextmanager
def serve(folder: Path, shared: bool = False) -> Iterator[str]:
    """Serves the files of a folder, to pages of other hosts too if `shared`; gives its address without a last slash."""
    handler = partial(_Shared if shared else _Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
