"""Content for the browser: verified files, images preprocessed for each of them, and the expected outputs."""

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
from shvit.weights.manifest import published_top1

from ..backends.backend import GraphOptions
from ..backends.onnx import ONNX, create_int8_writer
from ..backends.registry import load_artifact
from ..bench.cases import BenchModel, Settings
from ..images import BUNDLED, MAX_CALIBRATION, ImageFile, read_pixels, sample_images
from ..labels import find_labels
from ..metadata import INPUT
from ..pipeline import MIN_CALIBRATION, export
from ..source import Source
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
    """A file for the browser to measure, with its metadata."""

    name: str
    """timm's name, or the file's."""
    path: Path
    spec: Spec
    labels: tuple[str, ...]
    certified: bool
    """True if its outputs were compared with its model's, as all are but those of int8 with random weights."""
    trained: bool
    gmacs: float | None
    top1: float | None
    """Published top-1 in percent; None for files, whose weights are their owner's."""

    @property
    def key(self) -> tuple[str, str]:
        """Name and precision, unique among the served models."""
        return self.name, self.spec.precision


@dataclass(frozen=True)
class Pace:
    """Rounds and seconds of a browser's measurements."""

    rounds: int = 7
    round_s: float = 0.5
    """Seconds that each case is timed in a round."""
    sustained_s: int = 30


def prepare_models(
    models: Sequence[str],
    precisions: Sequence[Precision],
    settings: Settings,
    images: Path | None,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> list[ServedModel]:
    """Export named models at each precision, verified, into `folder`; load exported files as they are.

    Args:
        models: timm names, or .onnx files of `shvit export` with their certificates.
        settings: checkpoint and size of the named models.
        images: a folder of images to verify with; scikit-image's where None.

    Raises:
        InputError: an unknown model, a file without a certificate, or what does not choose one of several classes.
        CheckFailed: a file exceeds its tolerance or has changed since it was certified.
    """
    served = []
    for name in dict.fromkeys(models):
        if Path(name).suffix == ".onnx":
            served.append(load_served(Path(name)))
            continue
        model = BenchModel(name, settings, folder)
        for precision in dict.fromkeys(precisions):
            progress(f"exporting {name} in {precision}")
            served.append(_export(model, precision, images))
    return served


def check_names(served: Sequence[ServedModel]) -> None:
    """Raise InputError if there is nothing to measure, or two files have the same name and precision."""
    if not served:
        raise InputError("nothing to measure; give at least one model, and for named ones a precision")
    if len({each.key for each in served}) < len(served):
        raise InputError("two files have the same name and precision; rename one of them")


def load_served(path: Path) -> ServedModel:
    """Return a file of `shvit export onnx` that matches its certificate.

    Raises:
        InputError: it has no certificate, does not classify, or is not for browsers.
        CheckFailed: it has changed since it was certified.
    """
    artifact = load_artifact(path, threads=1)
    _require_classes(path.name, artifact.spec)
    _check_pixels(str(path), artifact.spec)
    if artifact.spec.output_kind == "features":
        raise InputError(f"{path}: gives feature maps; export it with logits to compare outputs")
    if artifact.spec.precision not in PRECISIONS or len(path.name) > NAME_CHARS or not path.name.isprintable():
        raise InputError(f"{path}: only files in {', '.join(PRECISIONS)} with names of at most {NAME_CHARS} "
                         "characters are served to browsers; rename it, or export it again")  # fmt: skip
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


def _require_classes(name: str, spec: Spec) -> None:
    """Raise InputError for what the page, which shows the most probable class, would show wrongly."""
    if spec.task != "classification":
        task = spec.task.replace("_", "-")
        raise InputError(f"{name}: is a {task} model, and the page shows the most probable class; give a classifier")


def _export(bench_model: BenchModel, precision: Precision, images: Path | None) -> ServedModel:
    (model, spec), weights = bench_model.opened, bench_model.weights
    _require_classes(bench_model.name, spec)
    _check_pixels(bench_model.name, spec)
    checkpoint = weights.checkpoint
    path = bench_model.folder / f"{bench_model.name.replace('/', '_')}-{precision}.onnx"
    labels = find_labels(None, spec.num_classes, weights.classes)
    calibration = sample_images(None, limit=MAX_CALIBRATION if checkpoint else MIN_CALIBRATION)
    spec = replace(spec, precision=precision)
    certified = precision != "int8" or checkpoint is not None
    if certified:
        samples = sample_images(images, spec.num_classes, classes=labels)
        origin = (str(images or BUNDLED), labels, checkpoint, weights.name, weights.ema)
        reference = Reference(model, spec, samples, *origin)
        spec = export(ONNX, path, Source(reference, spec, calibration), GraphOptions()).spec
    else:  # speed does not depend on the int8 accuracy of random weights
        spec = replace(spec, excluded_layers=ONNX.float_layers(deploy(model)))
        certificate_path(path).unlink(missing_ok=True)  # of an earlier file
        with atomic_write(path) as partial:
            source = Source(Reference(model, spec, [], "", labels), spec, calibration)
            create_int8_writer(source.unfolded(), spec, source.ranges(), False, labels)(partial, spec)
    return ServedModel(
        name=bench_model.name,
        path=path,
        spec=spec,
        labels=tuple(labels),
        certified=certified,
        trained=checkpoint is not None,
        gmacs=bench_model.macs / 1e9,
        top1=published_top1(bench_model.name, spec.img_size),
    )


def _check_pixels(name: str, spec: Spec) -> None:
    """Raise InputError for a model whose images a browser does not decode."""
    if not spec.pixels.uses_pillow:
        raise InputError(f"{name} takes {spec.pixels}, and a browser's images have 1 or 3 channels of 8 bits; "
                         "measure it with `shvit bench`")  # fmt: skip


def select_images(folder: Path | None) -> list[ImageFile]:
    """Return a few of a folder's images, spread evenly; scikit-image's where None."""
    return sample_images(folder, limit=MAX_SERVED_IMAGES)


def create_contents(
    models: Sequence[ServedModel],
    images: Sequence[ImageFile],
    runtime: dict[str, Path] | None,
    pace: Pace,
    submit: str | None,
) -> dict[str, Content]:
    """Return the page and everything that it fetches, by address relative to it; "" is the page.

    Args:
        runtime: ONNX Runtime's files by name; None for the CDN's, whose hashes the page checks.
        submit: address to which the page posts its record; None to keep it in the page.
    """
    contents = {name: Content.of(WEB / name) for name in SCRIPTS}
    contents |= {f"ort/{name}": Content.of(path) for name, path in (runtime or {}).items()}
    served = {
        "runtime": _runtime(hosted=runtime is not None),
        "models": [_describe(each, images, contents) for each in models],
        "images": len(images),
        "pace": asdict(pace),
        "submit": submit,
    }
    contents["served.json"] = Content.of(to_json(served).encode(), ".json")
    page = (WEB / "phone.html").read_text(encoding="utf-8").replace("$policy", policy(hosted=runtime is not None))
    contents[""] = Content.of(page.encode(), ".html")
    return contents


def policy(hosted: bool) -> str:
    """Return a Content-Security-Policy: the page's files, and ONNX Runtime from the same host, or else the CDN."""
    elsewhere = "" if hosted else " " + CDN
    return (
        "default-src 'none'; script-src 'self' blob: 'wasm-unsafe-eval'; worker-src 'self' blob:; style-src 'self'; "
        f"connect-src 'self' blob:{elsewhere}; img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; "
        "form-action 'none'"
    )


def _runtime(hosted: bool) -> dict[str, Any]:
    """Return the addresses of the runtime's builds, with their hashes."""
    base = "ort/" if hosted else CDN
    builds: dict[str, dict[str, Any]] = {name: {} for name in BUILDS}
    for name, build in BUILDS.items():
        for role, file in vars(build).items():
            entry = {"url": base + file.name, "integrity": integrity(file.sha256), "bytes": file.size_bytes}
            builds[name][role] = entry
    return {"version": VERSION, "builds": builds}


def _describe(model: ServedModel, images: Sequence[ImageFile], contents: dict[str, Content]) -> dict[str, Any]:
    """Return a model for the page, and add its files to the contents, each of them once."""
    pixels = read_pixels(images, model.spec)
    return {
        "model": model.name,
        "precision": model.spec.precision,
        "file": _add(contents, Content.of(model.path), ".onnx"),
        "pixels": _add(contents, _binary(pixels.permute(0, 2, 3, 1)), ".bin"),
        "expected": _add(contents, _binary(expected_outputs(model, pixels)), ".bin"),
        "labels": _add(contents, Content.of(to_json(list(model.labels)).encode(), ".json"), ".json"),
        "spec": asdict(model.spec),
        "input": INPUT,
        "tolerance": tolerance(model.spec.precision, len(images)),
        "certified": model.certified,
        "trained": model.trained,
        "gmacs": model.gmacs,
        "top1": model.top1,
    }


def tolerance(precision: Precision, images: int) -> dict[str, float]:
    """Return the bounds that the page checks outputs against, as `verdict.judge` does."""
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


def expected_outputs(model: ServedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Return the file's outputs for pixels, uint8 (n, C, H, W), in ONNX Runtime on this machine."""
    return load_artifact(model.path)(pixels).float()


def _binary(tensor: torch.Tensor) -> Content:
    """Return a tensor's numbers, little-endian, in row-major order."""
    array = tensor.contiguous().numpy()
    return Content.of(array.astype(array.dtype.newbyteorder("<")).tobytes())


def _add(contents: dict[str, Content], content: Content, suffix: str) -> dict[str, Any]:
    """Add a file under an address made of its hash, so that browsers may cache it, and describe it for the page."""
    digest = content.sha256
    url = f"files/{digest}{suffix}"
    contents[url] = content
    return {"url": url, "integrity": integrity(digest), "sha256": digest, "bytes": content.size}
