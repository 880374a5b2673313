"""The static site: the page that measures, the explorer and the table of models as files for any web host."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from shvit.errors import InputError
from shvit.files import atomic_write, is_file, is_there, sha256

from ..bench.explorer import write_explorer
from ..bench.records import Measurements
from ..web import WEB, Content, is_page
from .served import SCRIPTS, ServedModel, policy

ISOLATION = "isolation.js"
HEADERS = """/*
  Cross-Origin-Opener-Policy: same-origin
  Cross-Origin-Embedder-Policy: require-corp
  X-Content-Type-Options: nosniff
  Referrer-Policy: no-referrer
"""
"""Content of `_headers`, which Netlify and Cloudflare Pages read; elsewhere isolation.js adds the first two headers."""
OURS = re.compile(r"[0-9a-f]{64}\.(onnx|bin|json)")
FRONT = "index.html"
OWN_NAMES = (FRONT, "measure.html", "explorer.html", "served.json", "_headers", ISOLATION, "files", "ort", *SCRIPTS)


def check_site_folder(folder: Path) -> None:
    """Raise InputError where a site would overwrite files that no site wrote; for the beginning of a command."""
    for name in ("files", "ort"):
        if (folder / name).is_symlink():
            raise InputError(f"{folder / name}: is a symbolic link; choose another folder for --output")
    if is_page(folder / FRONT, "SHViT: models, and how fast they are on your device"):
        return
    for name in OWN_NAMES:
        if (folder / name).is_symlink() or is_there(folder / name):
            raise InputError(f"{folder / name}: is there already, and {folder} is not a folder of `shvit site`; choose "
                             "a new folder for --output")  # fmt: skip


def write_site(
    folder: Path, contents: Mapping[str, Content], models: Sequence[ServedModel], measured: Measurements, hosted: bool
) -> list[Path]:
    """Write the site into `folder`, each file atomically, remove an earlier site's files, and return the paths.

    Raises:
        InputError: the folder cannot be written to, or as in `check_site_folder`.
    """
    check_site_folder(folder)
    front = (WEB / "site.html").read_text(encoding="utf-8")
    front = front.replace("$policy", policy(hosted)).replace("$rows", "\n".join(map(_row, models)))
    files = {
        FRONT: Content.of(front.encode()),  # written first: it marks the folder as a site's
        **{"measure.html" if name == "" else name: content for name, content in contents.items()},
        ISOLATION: Content.of(WEB / ISOLATION),
        "_headers": Content.of(HEADERS.encode()),
    }
    for name, content in files.items():
        if is_file(folder / name) and sha256(folder / name) == content.sha256:
            continue  # as an earlier site had it
        with atomic_write(folder / name) as partial:
            partial.write_bytes(content.read())
    write_explorer(folder / "explorer.html", measured)
    for path in (folder / "files").iterdir():
        if OURS.fullmatch(path.name) and f"files/{path.name}" not in files:
            path.unlink()
    return [folder / "explorer.html", *(folder / name for name in files)]


def _row(model: ServedModel) -> str:
    """Return a row of the table of models."""
    top1 = "–" if model.top1 is None else f"{model.top1:.1f}"
    gmacs = "–" if model.gmacs is None else f"{model.gmacs:.2f}"
    megabytes = f"{model.path.stat().st_size / 1e6:.1f}"
    cells = (model.spec.precision, model.spec.img_size, top1, gmacs, megabytes)
    return f'<tr><th scope="row">{escape(model.name)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
