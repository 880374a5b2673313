"""`shvit site`: the page that measures, the explorer and the table of models as files for any web host."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from shvit.files import write_whole

from .explorer import write_explorer
from .records import Measurements
from .trial import TYPES, WEB, Content, Tried, policy

ISOLATION = "isolation.js"
HEADERS = """/*
  Cross-Origin-Opener-Policy: same-origin
  Cross-Origin-Embedder-Policy: require-corp
  X-Content-Type-Options: nosniff
  Referrer-Policy: no-referrer
"""
"""The file `_headers`, as Netlify and Cloudflare Pages read it; elsewhere isolation.js stands in for the first two."""


def write_site(
    folder: Path, served: Mapping[str, Content], tried: Sequence[Tried], measured: Measurements, hosted: bool
) -> list[Path]:
    """Writes the site into `folder`; each of its files whole or not at all, its front page last.

    Raises:
        InputError: the folder cannot be written to.
    """
    front = (WEB / "site.html").read_text(encoding="utf-8")
    front = front.replace("$policy", policy(hosted)).replace("$rows", "\n".join(map(_row, tried)))
    files = {
        **{"measure.html" if name == "" else name: content for name, content in served.items()},
        ISOLATION: Content(WEB / ISOLATION, TYPES[".js"]),
        "_headers": Content(HEADERS.encode(), "text/plain"),
        "index.html": Content(front.encode(), TYPES[".html"]),
    }
    write_explorer(folder / "explorer.html", measured)
    written = [folder / "explorer.html"]
    for name, content in files.items():
        path = folder / name
        with write_whole(path) as partial:
            partial.write_bytes(content.source if isinstance(content.source, bytes) else content.source.read_bytes())
        written.append(path)
    return written


def _row(tried: Tried) -> str:
    """A line of the table of models."""
    figures = {
        "model": tried.model,
        "precision": tried.spec.precision,
        "px": tried.spec.img_size,
        "top-1 %": "–" if tried.top1 is None else f"{tried.top1:.1f}",
        "GMACs": "–" if tried.gmacs is None else f"{tried.gmacs:.2f}",
        "MB": f"{tried.path.stat().st_size / 1e6:.1f}",
    }
    first, *cells = (escape(str(value)) for value in figures.values())
    return f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
