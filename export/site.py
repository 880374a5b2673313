"""`shvit site`: the page that measures, the explorer and the table of models as files for any web host."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from shvit.files import write_whole

from .content import WEB, Content
from .explorer import write_explorer
from .records import Measurements
from .trial import TrialModel, policy

ISOLATION = "isolation.js"
SITE_FILES = ("measure.html", "explorer.html", "trial.json", "_headers", ISOLATION)
"""The site's own files beside index.html and the page's scripts; models are in folders."""
HEADERS = """/*
  Cross-Origin-Opener-Policy: same-origin
  Cross-Origin-Embedder-Policy: require-corp
  X-Content-Type-Options: nosniff
  Referrer-Policy: no-referrer
"""
"""The file `_headers`, as Netlify and Cloudflare Pages read it; elsewhere isolation.js stands in for the first two."""
OURS = re.compile(r"[0-9a-f]{64}\.(onnx|bin|json)")


def write_site(
    folder: Path, served: Mapping[str, Content], tried: Sequence[TrialModel], measured: Measurements, hosted: bool
) -> list[Path]:
    """Writes the site into `folder`, each of its files whole or not at all, and removes those of an earlier one.

    Raises:
        InputError: the folder cannot be written to.
    """
    front = (WEB / "site.html").read_text(encoding="utf-8")
    front = front.replace("$policy", policy(hosted)).replace("$rows", "\n".join(map(_row, tried)))
    files = {
        **{"measure.html" if name == "" else name: content for name, content in served.items()},
        ISOLATION: Content.of(WEB / ISOLATION),
        "_headers": Content.of(HEADERS.encode()),
        "index.html": Content.of(front.encode()),
    }
    write_explorer(folder / "explorer.html", measured)
    for name, content in files.items():
        with write_whole(folder / name) as partial:
            partial.write_bytes(content.read())
    for path in (folder / "files").iterdir():
        if OURS.fullmatch(path.name) and f"files/{path.name}" not in files:
            path.unlink()
    return [folder / "explorer.html", *(folder / name for name in files)]


def _row(model: TrialModel) -> str:
    """A line of the table of models."""
    top1 = "–" if model.top1 is None else f"{model.top1:.1f}"
    gmacs = "–" if model.gmacs is None else f"{model.gmacs:.2f}"
    megabytes = f"{model.path.stat().st_size / 1e6:.1f}"
    cells = (model.spec.precision, model.spec.img_size, top1, gmacs, megabytes)
    return f'<tr><th scope="row">{escape(model.name)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
