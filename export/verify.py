"""Does an artefact give its model's answers? Compared on photographs, written down as a certificate."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shvit.deploy import deploy
from shvit.errors import CheckFailed
from shvit.files import sha256, size
from shvit.train.data import open_image

from .forms import layers
from .photographs import Photograph
from .runtimes import Artefact, artefact_files
from .spec import Precision, Spec

TINY = torch.finfo(torch.float64).tiny
LAYER_IMAGES = 4  # photographs on which layers are compared; all of their outputs are held
MAX_GREY_LEVELS = 1.0


@dataclass(frozen=True)
class Tolerance:
    """What an artefact must keep to."""

    rel_error: float
    snr_db: float
    top1_agreement: float
    spare: int = 0
    """So many photographs may have another top-1 even if that is too large a share of a few."""


INT8 = Tolerance(rel_error=0.4, snr_db=27.0, top1_agreement=98.5, spare=1)
TOLERANCES: dict[Precision, Tolerance] = {
    # Rounding alone: deployment and runtimes differ by 1e-6 or so; a wrong constant, or colours, by much more.
    "fp32": Tolerance(rel_error=1e-4, snr_db=80.0, top1_agreement=100.0),
    # Half precision rounds each value by up to 2^-11, and a model adds up some hundred such roundings: S1 and S4 kept
    # 61 to 66 dB, with differences of 0.03 to 0.15 % of the spread.
    "fp16": Tolerance(rel_error=1e-2, snr_db=40.0, top1_agreement=99.5),
    # 2^-9 and so 12 to 18 dB less: S1 kept 42.
    "bf16": Tolerance(rel_error=0.1, snr_db=32.0, top1_agreement=99.0, spare=1),
    # 8 bits for each of some hundred tensors. 27 dB are a disturbance of 4.5 % of the logits' size: on trained models
    # accuracy moved by 0 to 2 photographs of 341, and not always down.
    "int8": INT8,
    "w8a8": INT8,
}


@dataclass(frozen=True)
class Certificate:
    """How far an artefact's outputs are from its model's, and what the artefact is."""

    artefact: str
    artefact_sha256: str
    artefact_bytes: int
    operators: dict[str, int]
    """Of the artefact, most frequent first."""
    model: str
    checkpoint_sha256: str | None
    """None where the model has random weights."""
    spec: Spec
    """Input, preprocessing and precision; for int8 also the layers that are in higher precision."""
    runtime: str
    """What ran the artefact; mil is this project's evaluator of Core ML packages."""
    images: int
    image_source: str
    max_abs_error: float
    """Largest difference of two logits (or values of a feature map). This and all figures below are the worst of all
    outputs and sizes."""
    max_rel_error: float
    """Largest difference over the spread (highest less lowest) of the model's output for the same photograph."""
    snr_db: float
    """Power of the model's outputs over the power of the differences, in dB; capped at 200 for identical ones."""
    cosine: float
    """Lowest cosine of the two outputs for one photograph."""
    top1_agreement: float
    """Percent of photographs with the same highest class; 100 for feature maps."""
    top5_agreement: float
    """Percent of the model's five highest classes that are among the artefact's; 100 for feature maps."""
    outputs: dict[str, dict[str, float]]
    """These figures of each output at each size."""
    accuracy: float | None
    """Top-1 of the artefact, percent, at its first size; None where folders give no labels."""
    model_accuracy: float | None
    """Top-1 of the model, percent."""
    worst_layer: str | None
    """The convolution or linear layer whose output is farthest from the model's; None where layers cannot be told."""
    worst_layer_snr_db: float | None
    kept_macs: float
    """Percent of the multiplications that an int8 artefact keeps in higher precision."""
    grey_levels: float
    """Largest difference, in grey levels of 255, of the artefact's preprocessing from timm's; at most 1 is allowed."""
    tolerance: Tolerance
    passed: bool
    versions: dict[str, str]


def compare(reference: torch.Tensor, output: torch.Tensor) -> dict[str, float]:
    """Error figures of two sets of outputs, (n, classes) or (n, C, H, W) each; see `Certificate`.

    Raises:
        CheckFailed: the shapes differ, or the output is not finite.
    """
    if reference.shape != output.shape:
        shapes = f"{tuple(output.shape)}, and its model {tuple(reference.shape)}"
        raise CheckFailed(f"the artefact gives outputs of shape {shapes}", {"output_shape": list(output.shape)})
    if not torch.isfinite(output).all():
        raise CheckFailed("the artefact gives NaN or infinite outputs", {"finite": False})
    classes = reference.dim() == 2
    reference, output = reference.double().flatten(1), output.double().flatten(1)
    error = (reference - output).abs()
    spread = (reference.amax(dim=1) - reference.amin(dim=1)).clamp_min(TINY)
    agreement = _agreement(reference, output) if classes else {"top1_agreement": 100.0, "top5_agreement": 100.0}
    return {
        "max_abs_error": error.max().item(),
        "max_rel_error": (error.amax(dim=1) / spread).max().item(),
        "snr_db": snr_db(reference, output),
        "cosine": torch.cosine_similarity(reference, output, eps=TINY).min().item(),
        **agreement,
    }


def snr_db(reference: torch.Tensor, output: torch.Tensor) -> float:
    """Power of `reference` over that of the difference, in dB, at most 200."""
    reference, output = reference.double(), output.double()
    signal = reference.square().sum().clamp_min(TINY)
    return min(10 * torch.log10(signal / (reference - output).square().sum()).item(), 200.0)  # infinite if identical


def _agreement(reference: torch.Tensor, output: torch.Tensor) -> dict[str, float]:
    top = min(5, reference.shape[1])
    highest, found = reference.topk(top).indices, output.topk(top).indices
    return {
        "top1_agreement": 100 * (reference.argmax(1) == output.argmax(1)).double().mean().item(),
        "top5_agreement": 100 * (highest[:, :, None] == found[:, None]).any(2).double().mean().item(),
    }


def certify(
    artefact: Artefact,
    model: nn.Module,
    spec: Spec,
    photographs: Sequence[Photograph],
    source: str,
    checkpoint: Path | None = None,
    name: str = "",
) -> Certificate:
    """Runs photographs through model and artefact and states how far apart they are.

    The model is fed through timm's transform, the artefact with pixels, which are cut and normalised as it says itself.

    Args:
        model: in eval mode, before deployment; it gives what the artefact gives.
        spec: the model's own, whatever the artefact says.
        source: what the certificate says of where the photographs are from.
        checkpoint: the file with the model's weights, for its hash.
        name: what the certificate calls the artefact; its file name where empty.
    """
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    grey_levels = 0.0
    for px in artefact.spec.sizes:
        expected, got, difference = _run(artefact, model, replace(spec, img_size=px), photographs)
        grey_levels = max(grey_levels, difference)
        for output, *pair in zip(artefact.spec.outputs, expected, got, strict=True):
            pairs[f"{output} at {px} px"] = (pair[0], pair[1])
    outputs = {key: compare(*pair) for key, pair in pairs.items()}
    figures = {key: _worst(key, [each[key] for each in outputs.values()]) for key in next(iter(outputs.values()))}
    tolerance = TOLERANCES[artefact.spec.precision]
    deployed = deploy(model, spec.img_size)
    layer, layer_snr_db = worst_layer(artefact, deployed, spec, photographs)
    labels = torch.tensor([photograph.label for photograph in photographs])
    model_accuracy, accuracy = (_accuracy(side, labels) for side in next(iter(pairs.values())))
    return Certificate(
        artefact=name or artefact.path.name,
        artefact_sha256=artefact_sha256(artefact.path),
        artefact_bytes=sum(size(file) for file in artefact_files(artefact.path)),
        operators=artefact.operators,
        model=spec.model,
        checkpoint_sha256=sha256(checkpoint) if checkpoint else None,
        spec=artefact.spec,
        runtime=artefact.runtime,
        images=len(photographs),
        image_source=source,
        **figures,
        outputs=outputs,
        accuracy=accuracy,
        model_accuracy=model_accuracy,
        worst_layer=layer,
        worst_layer_snr_db=layer_snr_db,
        kept_macs=share_of_macs(deployed, spec, artefact.spec.kept),
        grey_levels=grey_levels,
        tolerance=tolerance,
        passed=_holds(figures, tolerance, len(photographs)) and grey_levels <= MAX_GREY_LEVELS,
        versions=versions(),
    )


def _run(
    artefact: Artefact, model: nn.Module, spec: Spec, photographs: Sequence[Photograph]
) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """The outputs of both at one size, and by how many grey levels their inputs differ."""
    told = replace(artefact.spec, img_size=spec.img_size)
    to_model, to_pixels = spec.transform(), told.transform(normalize=False)
    std = torch.tensor(spec.std)[:, None, None]
    expected, got, difference = [], [], 0.0
    for photograph in photographs:
        image = open_image(photograph.path)
        normalized, pixels = to_model(image)[None], to_pixels(image)[None]
        expected.append(run_model(model, normalized))
        got.append(artefact.run(artefact.spec.feed(pixels)))
        if normalized.shape == pixels.shape:
            levels = ((told.normalize(pixels) - normalized).abs() * std * 255).max().item()
            difference = max(difference, levels)
    return _joined(expected), _joined(got), difference


def _joined(outputs: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """The outputs for several photographs, each as one tensor."""
    return [torch.cat(each) for each in zip(*outputs, strict=True)]


def run_model(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A model's output, or outputs, as a tuple."""
    with torch.inference_mode():
        outputs = model(batch)
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def _worst(figure: str, values: list[float]) -> float:
    return max(values) if figure.endswith("error") else min(values)


def _accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Percent of the labelled photographs whose highest class is the right one."""
    known = labels >= 0
    if outputs.dim() != 2 or not known.any():
        return None
    return 100 * (outputs.argmax(1) == labels)[known].double().mean().item()


def _holds(figures: dict[str, float], tolerance: Tolerance, images: int) -> bool:
    differ = round(images * (100 - figures["top1_agreement"]) / 100)
    return (
        figures["max_rel_error"] <= tolerance.rel_error
        and figures["snr_db"] >= tolerance.snr_db
        and (figures["top1_agreement"] >= tolerance.top1_agreement or differ <= tolerance.spare)
    )


# --- layers -----------------------------------------------------------------------------------------------------------


def worst_layer(
    artefact: Artefact, deployed: nn.Module, spec: Spec, photographs: Sequence[Photograph]
) -> tuple[str | None, float | None]:
    """The layer whose output is farthest from that of the same layer of the deployed model in float32, and its SNR."""
    to_model, to_pixels = spec.transform(), artefact.spec.transform(normalize=False)
    images = [open_image(photograph.path) for photograph in photographs[:LAYER_IMAGES]]
    found = artefact.run_layers(artefact.spec.feed(torch.stack([to_pixels(image) for image in images])))
    expected = layer_outputs(deployed, torch.stack([to_model(image) for image in images]))
    noise = {
        name: snr_db(expected[name], output)
        for name, output in found.items()
        if name in expected and expected[name].shape == output.shape
    }
    return min(noise.items(), key=lambda item: item[1]) if noise else (None, None)


def layer_outputs(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each convolution and linear layer gives, by its dotted name; of one called twice, the last."""
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, output.clone())  # what follows may be in place

    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers(model)]
    try:
        run_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def share_of_macs(model: nn.Module, spec: Spec, names: Sequence[str]) -> float:
    """Percent of all layers' multiplications that are in the named ones."""
    if not names:
        return 0.0
    sizes = {name: output[0].numel() for name, output in layer_outputs(model, spec.blank()).items()}
    macs = {name: sizes.get(name, 0) * layer.weight[0].numel() for name, layer in layers(model)}  # type: ignore[index]
    kept = {name.removesuffix(".conv") if name not in macs else name for name in names}  # as `unfold_identities` names
    return 100 * sum(macs.get(name, 0) for name in kept) / max(sum(macs.values()), 1)


# --- certificates -----------------------------------------------------------------------------------------------------


def artefact_sha256(artefact: Path) -> str:
    """Of its file; of two, of their digests one after the other."""
    import hashlib

    digests = [sha256(file) for file in artefact_files(artefact)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def require(certificate: Certificate) -> None:
    """Raises CheckFailed, with the figures, if the artefact drifts."""
    if not certificate.passed:
        worst = f"; worst layer {certificate.worst_layer}" if certificate.worst_layer else ""
        raise CheckFailed(
            f"{certificate.artefact} drifts from its model: relative error {certificate.max_rel_error:.2e} "
            f"(allowed {certificate.tolerance.rel_error:.0e}), {certificate.snr_db:.1f} dB "
            f"(at least {certificate.tolerance.snr_db:.0f}), top-1 agreement {certificate.top1_agreement:.1f} % "
            f"(at least {certificate.tolerance.top1_agreement:g} %), preprocessing {certificate.grey_levels:.2f} grey "
            f"levels (allowed {MAX_GREY_LEVELS:.0f}){worst}",
            asdict(certificate),
        )


def versions() -> dict[str, str]:
    """Versions of what took part, for the record."""
    import platform
    from importlib.metadata import distributions

    parts = {"shvit", "torch", "timm", "onnx", "onnxruntime", "openvino", "coremltools"}
    installed = {found.name: found.version for found in distributions() if found.name in parts}
    return {"python": platform.python_version(), "machine": platform.machine(), **installed}
