"""What a browser is given to try: verified files, images cut for each of them, and the answers to be expected."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from shvit.certificate import certificate_path, check_unchanged, read_certificate
from shvit.deployment import deploy
from shvit.documents import to_json
from shvit.errors import InputError
from shvit.files import atomic_write, sha256
from shvit.weights.published import published_top1

from ..backends.registry import open_artifact
from ..bench.cases import Settings, Subject
from ..images import BUNDLED, MAX_CALIBRATION, ImageFile, read_pixels, sample_images
from ..labels import find_labels
from ..metadata import INPUT
from ..pipeline import MIN_CALIBRATION, Options, Source, export, float_layers, int8_onnx_writer
from ..spec import Precision, Spec
from ..verdict import CONFIDENCE, FAR, FULL_EVIDENCE, MIN_EVIDENCE, SIGMAS, TOLERANCES, allowed_failures
from ..verify import Reference
from ..web import WEB, Content
from .ort_web import BUILDS, CDN, VERSION, integrity
from .phone_record import NAME_CHARS, PRECISIONS

MAX_SERVED_IMAGES = 8
SCRIPTS = ("phone.js", "measure.js", "elements.js", "phone_worker.js", "pixels.js", "phone.css")


@dataclass(frozen=True)
class ServedModel:
    """A file that is tried, and what is known of it."""

    name: str
    """timm's, or the file's own."""
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
    def key(self) -> tuple[str, str]:
        """What tells it from others: its name and precision."""
        return self.name, self.spec.precision


@dataclass(frozen=True)
class Pace:
    """How long a browser measures."""

    rounds: int = 7
    turn_s: float = 0.5
    """Seconds that each case is timed for in a round."""
    sustained_s: int = 30


# --- files ------------------------------------------------------------------------------------------------------------


def prepare(
    models: Sequence[str],
    precisions: Sequence[Precision],
    settings: Settings,
    images: Path | None,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> list[ServedModel]:
    """Exports named models at each precision, verified, into `folder`; takes exported files as they are.

    Args:
        models: timm's names, or .onnx files of `shvit export` with their certificates.
        settings: checkpoint and size of the named models.
        images: a folder of images to verify with; scikit-image's where None.

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
    return tried


def check_names(tried: Sequence[ServedModel]) -> None:
    """Raises InputError if there is nothing to try, or two files would be taken for each other."""
    if not tried:
        raise InputError("nothing to try; give at least one model, and for named ones a precision")
    if len({each.key for each in tried}) < len(tried):
        raise InputError("two files are of one name and precision; a name can only be tried once")


def take_file(path: Path) -> ServedModel:
    """A file of `shvit export onnx`, if it is the one that its certificate is of."""
    artifact = open_artifact(path, threads=1)
    if artifact.spec.output_kind == "features":
        raise InputError(f"{path}: gives feature maps; export it with logits to compare answers")
    if artifact.spec.precision not in PRECISIONS or len(path.name) > NAME_CHARS or not path.name.isprintable():
        raise InputError(f"{path}: a browser is given files in {', '.join(PRECISIONS)} whose names have at most "
                         f"{NAME_CHARS} characters; rename it, or export it again")  # fmt: skip
    certificate = read_certificate(path)
    if certificate is None:
        raise InputError(f"{path}: has no certificate beside it; export it with `shvit export onnx`, which writes one")
    check_unchanged(path, sha256(path))
    return ServedModel(
        name=path.name,
        path=path,
        spec=artifact.spec,
        labels=tuple(artifact.labels) if len(artifact.labels) == artifact.spec.num_classes else (),
        certified=True,
        trained=certificate.checkpoint_sha256 is not None,
        gmacs=None,
        top1=None,
    )


def _export(subject: Subject, precision: Precision, images: Path | None) -> ServedModel:
    model, spec = subject.opened
    weights = subject.weights
    checkpoint = weights.checkpoint
    path = subject.folder / f"{subject.name.replace('/', '_')}-{precision}.onnx"
    labels = find_labels(None, spec.num_classes, weights.classes)
    calibration = sample_images(None, limit=MAX_CALIBRATION if checkpoint else MIN_CALIBRATION)
    spec = replace(spec, precision=precision)
    certified = precision != "int8" or checkpoint is not None
    if certified:
        samples = sample_images(images, spec.num_classes, classes=labels)
        reference = Reference(
            model, spec, samples, str(images or BUNDLED), labels, checkpoint, weights.name, weights.ema
        )
        spec = export("onnx", path, Source(reference, spec, calibration), Options()).spec
    else:  # speed does not depend on what int8 makes of random weights
        spec = replace(spec, excluded_layers=float_layers("onnx", deploy(model)))
        certificate_path(path).unlink(missing_ok=True)  # of an earlier file
        with atomic_write(path) as partial:
            reference = Reference(model, spec, [], "", labels)
            source = Source(reference, spec, calibration)
            int8_onnx_writer(source.unfolded(), spec, source.ranges(), False, labels)(partial, spec)
    return ServedModel(
        name=subject.name,
        path=path,
        spec=spec,
        labels=tuple(labels),
        certified=certified,
        trained=checkpoint is not None,
        gmacs=subject.macs / 1e9,
        top1=published_top1(subject.name, spec.img_size),
    )


def few_images(folder: Path | None) -> list[ImageFile]:
    """Some of a folder's images, spread evenly; scikit-image's where None."""
    return sample_images(folder, limit=MAX_SERVED_IMAGES)


# --- what is served ---------------------------------------------------------------------------------------------------


def contents(
    tried: Sequence[ServedModel],
    images: Sequence[ImageFile],
    runtime: dict[str, Path] | None,
    pace: Pace,
    submit: str | None,
) -> dict[str, Content]:
    """The page and everything that it fetches, by address relative to it; "" is the page.

    Args:
        runtime: ONNX Runtime's files by name; None for those of the CDN, whose hashes the page checks.
        submit: where the page posts its record; None where it is kept in the page.
    """
    served = {name: Content.of(WEB / name) for name in SCRIPTS}
    served |= {f"ort/{name}": Content.of(path) for name, path in (runtime or {}).items()}
    trial = {
        "runtime": _runtime(hosted=runtime is not None),
        "models": [_describe(each, images, served) for each in tried],
        "images": len(images),
        "pace": asdict(pace),
        "submit": submit,
    }
    served["trial.json"] = Content.of(to_json(trial).encode(), ".json")
    page = (WEB / "phone.html").read_text(encoding="utf-8").replace("$policy", policy(hosted=runtime is not None))
    served[""] = Content.of(page.encode(), ".html")
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


def _describe(model: ServedModel, images: Sequence[ImageFile], served: dict[str, Content]) -> dict[str, Any]:
    """A model for the page; adds its files to what is served, each of them once."""
    pixels = read_pixels(images, model.spec)
    return {
        "model": model.name,
        "precision": model.spec.precision,
        "file": _add(served, Content.of(model.path), ".onnx"),
        "pixels": _add(served, _binary(pixels.permute(0, 2, 3, 1)), ".bin"),
        "expected": _add(served, _binary(expected(model, pixels)), ".bin"),
        "labels": _add(served, Content.of(to_json(list(model.labels)).encode(), ".json"), ".json"),
        "spec": asdict(model.spec),
        "input": INPUT,
        "tolerance": tolerance(model.spec.precision, len(images)),
        "certified": model.certified,
        "trained": model.trained,
        "gmacs": model.gmacs,
        "top1": model.top1,
    }


def tolerance(precision: Precision, images: int) -> dict[str, float]:
    """What the page holds answers against, as `verdict.judge` does."""
    bounds = TOLERANCES[precision]
    return {
        **asdict(bounds),
        "max_changed": allowed_failures(100 - bounds.top1_agreement, images),
        "max_far": allowed_failures(bounds.far_images, images),
        "far": FAR,
        "min_evidence": MIN_EVIDENCE,
        "full_evidence": FULL_EVIDENCE,
        "confidence_sigmas": NormalDist().inv_cdf(CONFIDENCE),
        "sigmas": SIGMAS,
    }


def expected(model: ServedModel, pixels: torch.Tensor) -> torch.Tensor:
    """What the file answers in ONNX Runtime on this machine, as its certificate compared it with its model.

    Args:
        pixels: uint8 (n, C, H, W).
    """
    return open_artifact(model.path)(pixels).float()


def _binary(tensor: torch.Tensor) -> Content:
    """A tensor's numbers, little-endian, the last dimension's beside each other."""
    array = tensor.contiguous().numpy()
    return Content.of(array.astype(array.dtype.newbyteorder("<")).tobytes())


def _add(served: dict[str, Content], content: Content, suffix: str) -> dict[str, Any]:
    """Serves it below an address made of its hash, so that browsers may keep it."""
    digest = content.sha256
    url = f"files/{digest}{suffix}"
    served[url] = content
    return {"url": url, "integrity": integrity(digest), "sha256": digest, "bytes": content.size}
