"""One page of sections, with plots, tables and images."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from shvit.files import atomic_write

INK, ACCENT, MUTED = "#1c2733", "#c2410c", "#2f6690"


@dataclass(frozen=True)
class Prediction:
    """One validation image with the exported file's prediction."""

    image: Image.Image
    truth: str
    predicted: str
    probability: float
    """Softmax of the logits, 0–1."""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence for the reader, and HTML made by the functions below."""

    title: str
    text: str
    body: str


def plot(path: Path, alt: str) -> str:
    """Return a PNG file as HTML, inside the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows of text and numbers as HTML; every cell is escaped."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def gallery(predictions: Sequence[Prediction]) -> str:
    """Return images with their predictions as HTML; mistakes are marked."""
    figures = []
    for item in predictions:
        mark, note = ("right", "") if item.predicted == item.truth else ("wrong", f", is {item.truth}")
        caption = f"{item.predicted} {100 * item.probability:.0f} %{note}"
        figures.append(
            f'<figure class="{mark}"><img alt="{escape(item.truth)}" src="{_thumbnail(item.image)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(figures)}</div>'


def _thumbnail(image: Image.Image, size: int = 144) -> str:
    small = image.convert("RGB")
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; color: {INK}; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ margin-bottom: 0 }} h2 {{ margin: 2.2rem 0 .3rem; border-bottom: 2px solid {ACCENT}; padding-bottom: .2rem }}
img {{ max-width: 100% }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #dde3e9 }}
.gallery {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .7rem }}
figure {{ margin: 0; font-size: .85rem }}
figure img {{ width: 100%; aspect-ratio: 1; object-fit: cover; display: block }}
figure.right figcaption::before {{ content: "✓ "; color: {MUTED} }}
figure.wrong figcaption::before {{ content: "✗ "; color: {ACCENT} }}
footer {{ margin-top: 2.5rem; color: #5b6875; font-size: .85rem }}
@media (prefers-color-scheme: dark) {{ body {{ background: #12181f; color: #e6ebf0 }} th, td {{ border-color: #2c3742 }}
  section img[src^="data:image/png"] {{ background: white }} }}
"""


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section], footer: str) -> None:
    """Write one HTML file that needs nothing else, and no network, atomically."""
    body = "".join(
        f"<section><h2>{escape(part.title)}</h2><p>{escape(part.text)}</p>{part.body}</section>" for part in sections
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1><p>{escape(lead)}</p>{body}<footer>{escape(footer)}</footer></body></html>\n"
    )
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
