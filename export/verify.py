"""Does an artefact give its model's answers? Compared on photographs, written down as a certificate."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from shvit.errors import CheckFailed, InputError
from shvit.files import sha256, size
from shvit.train.data import open_image

from .runtimes import Artefact, torch_predict
from .spec import Precision, Spec

MAX_IMAGES = 512  # enough to see drift; each is run twice
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True)
class Tolerance:
    """What an artefact must keep to."""

    rel_error: float
    snr_db: float
    top1_agreement: float


TOLERANCES: dict[Precision, Tolerance] = {
    # Rounding alone: deployment and runtimes differ by 1e-6 or so; a wrong constant, or colours, by much more.
    "fp32": Tolerance(rel_error=1e-4, snr_db=80.0, top1_agreement=100.0),
    # Half precision rounds each value by up to 2^-11, and a model adds up some hundred such roundings: S1 and S4 kept
    # 61 to 66 dB, with differences of 0.03 to 0.15 % of the spread.
    "fp16": Tolerance(rel_error=1e-2, snr_db=40.0, top1_agreement=99.5),
}


@dataclass(frozen=True)
class Certificate:
    """How far an artefact's logits are from its model's, and what the artefact is."""

    artefact: str
    artefact_sha256: str
    artefact_bytes: int
    operators: dict[str, int]
    """Of the artefact, most frequent first."""
    model: str
    checkpoint_sha256: str | None
    """None where the model has random weights."""
    spec: Spec
    """Input, preprocessing and precision."""
    runtime: str
    """What ran the artefact; mil is this project's evaluator of Core ML packages."""
    images: int
    image_source: str
    max_abs_error: float
    """Largest difference of two logits."""
    max_rel_error: float
    """Largest difference over the spread (highest less lowest) of the model's logits of the same photograph."""
    snr_db: float
    """Power of the model's logits over the power of the differences, in dB; capped at 200 for identical ones."""
    cosine: float
    """Lowest cosine of the two vectors of logits."""
    top1_agreement: float
    """Percent of photographs with the same highest class."""
    top5_agreement: float
    """Percent of the model's five highest classes that are among the artefact's."""
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
    spread = (reference.amax(dim=1) - reference.amin(dim=1)).clamp_min(tiny)
    top = min(5, reference.shape[1])
    highest, found = reference.topk(top).indices, output.topk(top).indices
    noise = error.square().sum()
    signal = reference.square().sum().clamp_min(tiny)
    return {
        "max_abs_error": error.max().item(),
        "max_rel_error": (error.amax(dim=1) / spread).max().item(),
        "snr_db": min(10 * torch.log10(signal / noise).item(), 200.0),  # infinite for identical ones
        "cosine": torch.cosine_similarity(reference, output, eps=tiny).min().item(),
        "top1_agreement": 100 * (reference.argmax(1) == output.argmax(1)).double().mean().item(),
        "top5_agreement": 100 * (highest[:, :, None] == found[:, None]).any(2).double().mean().item(),
    }


def certify(
    artefact: Artefact,
    model: nn.Module,
    spec: Spec,
    images: Path | None = None,
    checkpoint: Path | None = None,
    name: str = "",
) -> Certificate:
    """Runs photographs through model and artefact and states how far apart they are.

    The model is fed through timm's transform, the artefact with pixels, which are cut and normalised as it says itself.

    Args:
        model: before deployment, in eval mode.
        spec: the model's own, whatever the artefact says.
        images: a folder of photographs; scikit-image's bundled ones where None.
        checkpoint: the file with the model's weights, for its hash.
        name: what the certificate calls the artefact; its file name where empty.
    """
    paths = find_images(images)
    predict = torch_predict(model)
    to_model, to_pixels = spec.transform(), artefact.spec.transform(normalize=False)
    expected, got = [], []
    for path in paths:
        image = open_image(path)
        expected.append(predict(to_model(image)[None]))
        got.append(artefact(to_pixels(image)[None]))
    figures = compare(torch.cat(expected), torch.cat(got))
    tolerance = TOLERANCES[artefact.spec.precision]
    return Certificate(
        artefact=name or artefact.path.name,
        artefact_sha256=sha256(artefact.path),
        artefact_bytes=size(artefact.path),
        operators=artefact.operators,
        model=spec.model,
        checkpoint_sha256=sha256(checkpoint) if checkpoint else None,
        spec=artefact.spec,
        runtime=artefact.runtime,
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


def certificate_path(artefact: Path) -> Path:
    """Where an artefact's certificate stands: beside it."""
    return artefact.with_name(artefact.name + ".certificate.json")


def check_unchanged(artefact: Path) -> None:
    """Compares an artefact with the hash in its certificate, where one stands beside it.

    Raises:
        InputError: the certificate is not readable, or is another file's.
        CheckFailed: the artefact has changed since it was certified.
    """
    path = certificate_path(artefact)
    if not path.exists():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        name, expected = str(record["artefact"]), str(record["artefact_sha256"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not a readable certificate; export again, or remove it") from error
    found = sha256(artefact)
    if found == expected:
        return
    if name != artefact.name:
        raise InputError(f"{path}: is the certificate of another file, {name}; export again, or remove it")
    raise CheckFailed(
        f"{artefact} has changed since it was certified: its SHA-256 is {found[:12]}…, and was {expected[:12]}…; "
        "export it again",
        {"artefact": str(artefact), "artefact_sha256": found, "certified_sha256": expected},
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
