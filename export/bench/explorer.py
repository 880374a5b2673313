"""One page in which measurements can be explored: accuracy against latency, growth, layers, every number."""

import base64
import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from string import Template

from shvit.documents import to_json
from shvit.files import atomic_write

from ..web import WEB
from .records import Measurements

SCRIPTS = ("elements.js", "explorer_draw.js", "explorer_devices.js", "explorer.js")
"""One program in four files, of which the first is a module; the last one runs."""


def write_explorer(path: Path, measurements: Measurements) -> None:
    """Writes the page, one HTML file that needs nothing else and may reach no network; whole or not at all."""
    style, script = explorer_style(), explorer_script()
    page = Template(_read("explorer.html")).substitute(
        policy=policy(style, script), style=style, script=script, explorer=explorer_body(measurements)
    )
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")


def explorer_body(measurements: Measurements) -> str:
    """The explorer's place in a page, and its data; `explorer_script`, after it, fills it."""
    data = to_json(asdict(measurements)).replace("<", "\\u003c")  # no name ends the block
    return (
        '<main class="explorer" id="shvit-explorer"><noscript>This page needs JavaScript.</noscript></main>\n'
        f'<script type="application/json" id="shvit-measurements">{data}</script>'
    )


def explorer_style() -> str:
    """The explorer's CSS."""
    return _read("explorer.css")


def explorer_script() -> str:
    """The explorer's JavaScript, in a function of its own: its names are no page's."""
    joined = re.sub(r"^export .*$", "", "\n".join(map(_read, SCRIPTS)), flags=re.MULTILINE)
    return f'"use strict";\n(() => {{\n{joined}}})();\n'


def policy(style: str, script: str) -> str:
    """A Content-Security-Policy: this style, this script, images that are in the page, and no network."""
    return (
        f"default-src 'none'; style-src '{_source(style)}'; script-src '{_source(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")
