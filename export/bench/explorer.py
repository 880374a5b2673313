"""The report of measurements: bench.json, plots, and one page to explore accuracy against latency and every number."""

import base64
import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from string import Template

from shvit.documents import to_json
from shvit.files import atomic_write, check_output_folder

from ..guards import check_own, one_line
from ..web import WEB
from .records import Measurements, write_measurements

SCRIPTS = ("elements.js", "explorer_draw.js", "explorer_devices.js", "explorer_growth.js", "explorer.js")
"""One program in several files; the first is a module, and the last one starts it."""


def check_report_folder(output: Path | None) -> None:
    """Raise InputError where a report would overwrite files that no report wrote; for the beginning of a command."""
    if output is None:
        return
    from .plots import FIGURES

    check_output_folder(output)
    check_own(output, "bench.json", b'"machine"', ("report.html", *FIGURES))


def write_report(measured: Measurements, output: Path, plots: bool = True) -> list[Path]:
    """Write bench.json, report.html and, by default, plots; return their paths."""
    from .plots import draw_plots

    write_measurements(measured, output / "bench.json")
    write_explorer(output / "report.html", measured)
    with one_line(output, "the plots cannot be drawn"):  # numbers of a third party's bench.json
        return [output / "bench.json", output / "report.html", *(draw_plots(measured, output) if plots else ())]


def write_explorer(path: Path, measurements: Measurements) -> None:
    """Write the page, one HTML file that needs nothing else and may reach no network, atomically."""
    style, script = _read("explorer.css"), explorer_script()
    page = Template(_read("explorer.html")).substitute(
        policy=policy(style, script), style=style, script=script, explorer=explorer_body(measurements)
    )
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")


def explorer_body(measurements: Measurements) -> str:
    """Return the explorer's element and its data as HTML; `explorer_script`, after it, fills the element."""
    data = to_json(asdict(measurements)).replace("<", "\\u003c")  # no name ends the block
    return (
        '<main class="explorer" id="shvit-explorer"><noscript>This page needs JavaScript.</noscript></main>\n'
        f'<script type="application/json" id="shvit-measurements">{data}</script>'
    )


def explorer_script() -> str:
    """Return the explorer's JavaScript, in a function of its own, so that its names stay private."""
    joined = re.sub(r"^export .*$", "", "\n".join(map(_read, SCRIPTS)), flags=re.MULTILINE)
    return f'"use strict";\n(() => {{\n{joined}}})();\n'


def policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy: this style, this script, images inside the page, and no network."""
    return (
        f"default-src 'none'; style-src '{_source(style)}'; script-src '{_source(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")
