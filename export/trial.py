"""What a browser is given to try: verified files, photographs cut for each of them, and the answers to be expected."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shvit.certificate import certificate_path, check_unchanged
from shvit.deploy import deploy
from shvit.errors import InputError
from shvit.files import sha256, size

from .cases import Settings, Subject
from .formats import FEWEST_CALIBRATION, Options, Source, export, float_layers, int8_onnx_writer
from .labels import find_labels
from .onnx import INPUT, LABELS_KEY, metadata, read_onnx
from .ort_web import BUILDS, CDN, VERSION, integrity
from .photographs import BUNDLED, Photograph, find_photographs, read_pixels
from .published import published_top1
from .runtimes import open_artefact
from .spec import Precision, Spec
from .verify import TOLERANCES

WEB = Path(__file__).with_name("web")
MOST_PHOTOGRAPHS = 8
SCRIPTS = ("phone.js", "measure.js", "phone_worker.js", "pixels.js", "phone.css")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}


@dataclass(frozen=True)
class Tried:
    """A file, and what is known of it."""

    model: str
    """timm's name, or the file's own."""
    path: Path
    spec: Spec
    labels: tuple[str, ...]
    certified: bool
    """Whether its answers were held against its model's; those of int8 with random weights are not."""
    trained: bool
    gmacs: float | None
    top1: float | None
    """Published, percent; None for files, whose weights are their owner's."""

    @property
    def name(self) -> str:
        return f"{self.model} {self.spec.precision}"


@dataclass(frozen=True)
class Content:
    """Something with an address: bytes, or a file."""

    source: bytes | Path
    type: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest() if isinstance(self.source, bytes) else sha256(self.source)

    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else size(self.source)


@dataclass(frozen=True)
class Pace:
    """How long a browser measures."""

    rounds: int = 7
    turn_s: float = 0.5
    """Seconds that each case is timed for in a round."""
    sustained_s: float = 30.0


# --- files ------------------------------------------------------------------------------------------------------------


def prepare(
    models: Sequence[str],
    precisions: Sequence[Precision],
    settings: Settings,
    images: Path | None,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Tried]:
    """Exports named models at each precision, verified, into `folder`; takes exported files as they are.

    Args:
        models: timm's names, or .onnx files of `shvit export` with their certificates.
        settings: checkpoint and size of the named models.
        images: a folder of photographs to verify with; scikit-image's where None.

    Raises:
        InputError: an unknown model, a file without a certificate, or one that does not classify.
        CheckFailed: a file drifts from its model or has changed since it was certified.
    """
    tried = []
    for name in dict.fromkeys(models):
        if Path(name).suffix == ".onnx":
            tried.append(take_file(Path(name)))
            continue
        subject = Subject(name, settings, folder)
        for precision in dict.fromkeys(precisions):
            progress(f"exporting {name} in {precision}")
            tried.append(_export(subject, precision, images))
    if not tried:
        raise InputError("nothing to try; give at least one model, and for named ones a precision")
    if len({each.name for each in tried}) < len(tried):
        raise InputError("two files are of one name and precision; a name can only be tried once")
    return tried


def take_file(path: Path) -> Tried:
    """A file of `shvit export onnx`, if it is the one that its certificate is of."""
    artefact = open_artefact(path, threads=1)
    if artefact.spec.gives == "features":
        raise InputError(f"{path}: gives feature maps; export it with logits to compare answers")
    if not certificate_path(path).exists():
        raise InputError(f"{path}: has no certificate beside it; export it with `shvit export onnx`, which writes one")
    check_unchanged(path, sha256(path))
    labels = json.loads(metadata(read_onnx(path)).get(LABELS_KEY, "[]"))
    return Tried(path.name, path, artefact.spec, tuple(map(str, labels)), True, True, None, None)


def _export(subject: Subject, precision: Precision, images: Path | None) -> Tried:
    model, spec = subject.opened
    checkpoint = subject.settings.checkpoint
    path = subject.folder / f"{subject.name.replace('/', '_')}-{precision}.onnx"
    labels = find_labels(None, spec.num_classes)
    calibration = find_photographs(None, most=256 if checkpoint else FEWEST_CALIBRATION)
    spec = replace(spec, precision=precision)
    certified = precision != "int8" or checkpoint is not None
    if certified:
        photographs = find_photographs(images, spec.num_classes)
        source = Source(model, spec, labels, photographs, str(images or BUNDLED), calibration, checkpoint)
        spec = export("onnx", path, source, Options()).spec
    else:  # speed does not depend on what int8 makes of random weights
        spec = replace(spec, kept=float_layers("onnx", deploy(model)))
        int8_onnx_writer(deploy(model, spec.img_size), spec, calibration, False, labels)(path, spec)
    return Tried(
        model=subject.name,
        path=path,
        spec=spec,
        labels=tuple(labels),
        certified=certified,
        trained=checkpoint is not None,
        gmacs=subject.macs / 1e9,
        top1=published_top1(subject.name, spec.img_size),
    )


def few_photographs(folder: Path | None) -> list[Photograph]:
    """Some of a folder's photographs, spread evenly; scikit-image's where None."""
    return find_photographs(folder, most=MOST_PHOTOGRAPHS)


# --- what is served ---------------------------------------------------------------------------------------------------


def contents(
    tried: Sequence[Tried],
    photographs: Sequence[Photograph],
    runtime: dict[str, Path] | None,
    pace: Pace,
    submit: str | None,
) -> dict[str, Content]:
    """The page and everything that it fetches, by address relative to it.

    Args:
        runtime: ONNX Runtime's files by name; None for those of the CDN, whose hashes the page checks.
        submit: where the page posts its record; None where it is kept in the page.
    """
    served = {name: _from_file(WEB / name) for name in SCRIPTS}
    served |= {f"ort/{name}": _from_file(path) for name, path in (runtime or {}).items()}
    trial = {
        "runtime": _runtime(hosted=runtime is not None),
        "models": [_describe(each, photographs, served) for each in tried],
        "photographs": len(photographs),
        "pace": asdict(pace),
        "submit": submit,
    }
    served["trial.json"] = Content(json.dumps(trial).encode(), TYPES[".json"])
    page = (WEB / "phone.html").read_text(encoding="utf-8").replace("$policy", policy(hosted=runtime is not None))
    served[""] = Content(page.encode(), TYPES[".html"])
    return served


def policy(hosted: bool) -> str:
    """A Content-Security-Policy: the page's own files, ONNX Runtime after its hash was checked, and nobody else.

    Args:
        hosted: whether ONNX Runtime comes from the page's own host.
    """
    elsewhere = "" if hosted else " " + CDN
    return (
        "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; worker-src 'self' blob:; style-src 'self'; "
        f"connect-src 'self' blob:{elsewhere}; img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; "
        "form-action 'none'"
    )


def _from_file(path: Path) -> Content:
    return Content(path, TYPES.get(path.suffix, "application/octet-stream"))


def _runtime(hosted: bool) -> dict[str, Any]:
    """Where the runtime's builds are, with their hashes."""
    base = "ort/" if hosted else CDN
    builds = {
        name: {
            role: {"url": base + file.name, "integrity": file.integrity, "bytes": file.size_bytes}
            for role, file in vars(build).items()
        }
        for name, build in BUILDS.items()
    }
    return {"version": VERSION, "builds": builds}


def _describe(tried: Tried, photographs: Sequence[Photograph], served: dict[str, Content]) -> dict[str, Any]:
    """A model for the page; adds its files to what is served, each of them once."""
    pixels = read_pixels(photographs, tried.spec)
    answers = expected(tried, pixels)
    file = _add(served, _from_file(tried.path), ".onnx")
    return {
        "model": tried.model,
        "precision": tried.spec.precision,
        "sha256": file["sha256"],
        "file": file,
        "pixels": _add(served, _binary(pixels.permute(0, 2, 3, 1)), ".bin"),
        "expected": _add(served, _binary(answers), ".bin"),
        "labels": _add(served, Content(json.dumps(tried.labels).encode(), TYPES[".json"]), ".json"),
        "spec": asdict(tried.spec),
        "input": INPUT,
        "tolerance": asdict(TOLERANCES[tried.spec.precision]),
        "certified": tried.certified,
        "trained": tried.trained,
        "gmacs": tried.gmacs,
        "top1": tried.top1,
    }


def expected(tried: Tried, pixels: torch.Tensor) -> torch.Tensor:
    """What the file answers in ONNX Runtime on this machine, as its certificate compared it with its model.

    Args:
        pixels: uint8 (n, C, H, W).
    """
    return open_artefact(tried.path)(pixels).float()


def _binary(tensor: torch.Tensor) -> Content:
    """A tensor's numbers, little-endian, the last dimension's beside each other."""
    array = tensor.contiguous().numpy()
    return Content(array.astype(array.dtype.newbyteorder("<")).tobytes(), "application/octet-stream")


def _add(served: dict[str, Content], content: Content, suffix: str) -> dict[str, Any]:
    """Serves it below an address made of its hash, so that browsers may keep it."""
    digest = content.sha256
    url = f"files/{digest}{suffix}"
    served[url] = content
    return {"url": url, "integrity": integrity(digest), "sha256": digest, "bytes": content.size()}


def total_bytes(served: Iterable[Content]) -> int:
    """What the browser fetches at most."""
    return sum(content.size() for content in served)
