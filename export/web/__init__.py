"""Content of pages: bytes or files, with their types and hashes. Installed as `shvit.export.web`."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from shvit.files import is_file, open_file, sha256, size

WEB = Path(__file__).parent
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}


@dataclass(frozen=True)
class Content:
    """Content of one address."""

    source: bytes | Path
    type: str

    @classmethod
    def of(cls, source: bytes | Path, suffix: str = "") -> "Content":
        """Return content with the type of a suffix, by default the file's own."""
        suffix = suffix or (source.suffix if isinstance(source, Path) else "")
        return cls(source, TYPES.get(suffix, "application/octet-stream"))

    @property
    def sha256(self) -> str:
        """Hex digits."""
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else sha256(self.source)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else size(self.source)

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


def is_page(path: Path, title: str) -> bool:
    """Return whether a page of ours with this title is there."""
    if not is_file(path):
        return False
    with open_file(path) as file:
        return f"<title>{title}</title>".encode() in file.read(4096)
