"""Does an artefact give its model's answers? Compared on photographs, written down as a certificate."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from shvit.errors import CheckFailed, InputError
from shvit.files import sha256
from shvit.train.data import open_image

from .runtimes import Predict
from .spec import Spec

MAX_IMAGES = 512  # enough to see drift; each is run twice
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Tolerance:
    """What a float32 artefact must keep to; other precisions will have their own."""

    rel_error: float = 1e-3
    snr_db: float = 60.0
    top1_agreement: float = 100.0


@dataclass(frozen=True)
class Certificate:
    """How far an artefact's logits are from its model's."""

    artefact: str
    artefact_sha256: str
    model: str
    checkpoint_sha256: str | None
    """None where the model has random weights."""
    runtime: str
    images: int
    image_source: str
    max_abs_error: float
    """Largest difference of two logits."""
    max_rel_error: float
    """Largest difference over the largest magnitude among the model's logits of the same photograph."""
    snr_db: float
    """Power of the model's logits over the power of the differences, in dB; capped at 200 for identical ones."""
    top1_agreement: float
    """Percent of photographs with the same highest class."""
    tolerance: Tolerance
    passed: bool
    versions: dict[str, str]


def compare(reference: torch.Tensor, output: torch.Tensor) -> dict[str, float]:
    """Error figures of two sets of logits, (n, classes) each; see `Certificate`.

    Raises:
        CheckFailed: the shapes differ, or the output is not finite.
    """
    if reference.shape != output.shape:
        shapes = f"{tuple(output.shape)}, and its model {tuple(reference.shape)}"
        raise CheckFailed(f"the artefact gives logits of shape {shapes}", {"output_shape": list(output.shape)})
    if not torch.isfinite(output).all():
        raise CheckFailed("the artefact gives NaN or infinite logits", {"finite": False})
    reference, output = reference.double(), output.double()
    tiny = torch.finfo(torch.float64).tiny
    error = (reference - output).abs()
    largest = reference.abs().amax(dim=1).clamp_min(tiny)
    noise = error.square().sum()
    signal = reference.square().sum().clamp_min(tiny)
    return {
        "max_abs_error": error.max().item(),
        "max_rel_error": (error.amax(dim=1) / largest).max().item(),
        "snr_db": min(10 * torch.log10(signal / noise).item(), 200.0),  # infinite for identical ones
        "top1_agreement": 100 * (reference.argmax(1) == output.argmax(1)).double().mean().item(),
    }


def certify(
    artefact: Path,
    reference: Predict,
    predict: Predict,
    spec: Spec,
    images: Path | None = None,
    checkpoint: Path | None = None,
    name: str | None = None,
    runtime: str = "onnxruntime",
    tolerance: Tolerance | None = None,
) -> Certificate:
    """Runs photographs through model and artefact and states how far apart they are.

    Args:
        reference, predict: the model before deployment, and the artefact.
        images: a folder of photographs; scikit-image's bundled ones where None.
        checkpoint: the file with the model's weights, for its hash.
        name: what the certificate calls the artefact; its file name where None.
    """
    tolerance = tolerance or Tolerance()
    paths = find_images(images)
    transform = spec.transform()
    expected, got = [], []
    for path in paths:
        batch = transform(open_image(path))[None]
        expected.append(reference(batch))
        got.append(predict(batch))
    figures = compare(torch.cat(expected), torch.cat(got))
    return Certificate(
        artefact=name or artefact.name,
        artefact_sha256=sha256(artefact),
        model=spec.model,
        checkpoint_sha256=sha256(checkpoint) if checkpoint else None,
        runtime=runtime,
        images=len(paths),
        image_source=str(images) if images else "scikit-image",
        **figures,
        tolerance=tolerance,
        passed=_holds(figures, tolerance),
        versions=versions(),
    )


def _holds(figures: dict[str, float], tolerance: Tolerance) -> bool:
    return (
        figures["max_rel_error"] <= tolerance.rel_error
        and figures["snr_db"] >= tolerance.snr_db
        and figures["top1_agreement"] >= tolerance.top1_agreement
    )


def require(certificate: Certificate) -> None:
    """Raises CheckFailed, with the figures, if the artefact drifts."""
    if not certificate.passed:
        raise CheckFailed(
            f"{certificate.artefact} drifts from its model: relative error {certificate.max_rel_error:.2e} "
            f"(allowed {certificate.tolerance.rel_error:.0e}), {certificate.snr_db:.1f} dB "
            f"(at least {certificate.tolerance.snr_db:.0f}), top-1 agreement {certificate.top1_agreement:.1f} % "
            f"(at least {certificate.tolerance.top1_agreement:.0f} %)",
            asdict(certificate),
        )


def find_images(folder: Path | None) -> list[Path]:
    """The photographs in `folder` and below, at most `MAX_IMAGES` spread evenly; scikit-image's where None.

    Raises:
        InputError: the folder is not there or holds none.
    """
    if folder is None:
        import skimage

        folder = Path(skimage.__file__).parent / "data"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of photographs")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"{folder}: no photographs in it ({', '.join(sorted(SUFFIXES))})")
    step = math.ceil(len(paths) / MAX_IMAGES)
    return paths[::step]


def versions() -> dict[str, str]:
    """Versions of what took part, for the record."""
    import platform
    from importlib.metadata import distributions

    parts = {"shvit", "torch", "timm", "onnx", "onnxruntime", "coremltools"}
    installed = {found.name: found.version for found in distributions() if found.name in parts}
    return {"python": platform.python_version(), "machine": platform.machine(), **installed}
