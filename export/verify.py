"""Compares an artifact's outputs with its model's on images, and states the result as a certificate."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shvit.certificate import Envelope
from shvit.deployment import deploy
from shvit.environment import versions
from shvit.errors import CheckFailed, InputError
from shvit.files import sha256, size
from shvit.img_size import ImgSize

from .backends.backend import Artifact
from .backends.registry import artifact_files, artifact_sha256, resolve_backend
from .formats.parameters import LayerParameters, compare_parameters, convolve, holds_shvit, rounding_output
from .images import ImageFile, gray_level_difference, read_pixels, spread
from .labels import label_faults, task_faults
from .quantization.qdq import unfold_identities
from .spec import PREPROCESSING, Spec
from .verdict import (
    TOLERANCES,
    Figure,
    Figures,
    Tolerance,
    Verdict,
    accuracy,
    compare,
    judge,
    snr_db,
    worst_figures,
    worst_verdict,
)
from .wrappers import first_layer, layer_outputs, layers, nearest_zero, run_batches, run_model, share_of_macs

PACKAGES = (
    *("shvit", "torch", "timm", "onnx", "onnxruntime", "openvino", "coremltools", "ncnn", "pnnx", "litert-torch"),
    *("ai-edge-litert", "ai-edge-quantizer", "executorch"),
)
LAYER_IMAGES = 4  # images on which layers are compared; all of their outputs are held
PREPROCESSED_IMAGES = 32  # images on which two different preprocessings are compared
MAX_GRAY_LEVELS = 1.0
SATURATION_IMAGES = 32
SATURATED_DB = 40.0  # kernels that merely round otherwise are nearer to each other
MAX_REASONS = 4  # in the one line of a refusal; the certificate has all
MAX_8_BIT_GRAY_LEVELS = 4.0  # of a first layer whose input and output are in 8 bits, whose ranges may be cut


PASSED: Mapping[Verdict, bool | None] = {"passed": True, "refused": False, "undecided": None}


@dataclass(frozen=True, kw_only=True)
class Arm64(Figures):
    """Section of a certificate: the file in its runtime's build for ARM64, on a processor that QEMU emulates.

    Figures are those of a certificate. Those of `host` are of the outputs beside this machine's own, as its runtime
    gives them: where kernels differ, they do.
    """

    cpu: str  # QEMU's name for the processor
    features: tuple[str, ...]  # of its instruction sets, those that kernels are chosen by, as the runtime finds them
    system: str  # the distribution that the rest of the emulated machine is of
    versions: Mapping[str, str]
    root_sha256: str  # of all files of the emulated machine
    images: int
    host_snr_db: float
    host_top1_agreement: float | None
    outputs: dict[str, dict[str, Figure]]
    accuracy: float | None
    passed: bool | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Certificate(Figures, Envelope):
    """Description of an artifact and of its errors, by `verdict.compare`: the worst of all outputs and sizes."""

    random_weights: bool
    spec: Spec  # input, preprocessing and precision; for int8 also the layers that are excluded from quantization
    worst_image: str  # the file with the largest error
    outputs: dict[str, dict[str, Figure]]  # these figures of each output at each size
    accuracy: float | None
    """Top-1 of the artifact, percent, at its first size; None where folders give no labels, and for other tasks."""
    model_accuracy: float | None  # top-1 of the model, percent
    worst_layer: str | None
    """The convolution or linear layer whose output is farthest from the model's; None where layers are not known."""
    worst_layer_snr_db: float | None
    largest_values: dict[str, float]
    """Of a file in half precision: the operations with the largest values seen, by name; float16 ends at 65504."""
    excluded_macs: float  # percent of the multiplications that an int8 artifact keeps in higher precision
    compared_layers: int  # layers whose weights were compared one by one
    gray_levels: float
    """Largest difference, in gray levels of 255, of the artifact's preprocessing from timm's; at most 1 is allowed."""
    tolerance: Tolerance
    faults: tuple[str, ...]
    """What is wrong beside the outputs' errors: preprocessing, task, weights, scales, labels. They are among the
    reasons."""
    notes: tuple[str, ...]  # what users of the file should know
    arm64: Arm64 | None = None
    """The same on a phone's kind of processor, whose verdict counts as much; None where it was not asked for."""

    @property
    def verdict(self) -> Verdict:
        return {True: "passed", False: "refused", None: "undecided"}[self.passed]  # type: ignore[return-value]


@dataclass(frozen=True)
class Reference:
    """A model on a set of images: what artifacts are held against. Images are decoded, and the model is run, once.

    Args:
        model: in eval mode, before deployment; its outputs are those that the artifacts must match.
        spec: the model's own preprocessing, whatever an artifact says.
        image_source: what certificates say of where the images are from.
        labels: names of the classes in the order of the model's outputs; empty where they have none.
        checkpoint: the file with the model's weights, for its hash; None for random weights.
        checkpoint_name, ema, data: the weights' name, whether they are EMA weights, and the identity of the images that
            they were trained on, for the certificate.
        in_memory: the model was given with its weights, of which there is no file.
    """

    model: nn.Module
    spec: Spec
    images: Sequence[ImageFile]
    image_source: str
    labels: Sequence[str] = ()
    checkpoint: Path | None = None
    checkpoint_name: str | None = None
    ema: bool = False
    data: Mapping[str, Any] | None = None
    in_memory: bool = False
    _pixels: dict[Spec, torch.Tensor] = field(default_factory=dict)
    _outputs: dict[ImgSize, list[torch.Tensor]] = field(default_factory=dict)
    _gray_levels: dict[Spec, float] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        """True if the weights are not random: they are a file's, or were given with the model."""
        return self.in_memory or self.checkpoint is not None

    def pixels(self, spec: Spec) -> torch.Tensor:
        """Return the images' pixels (n, C, H, W), resized and cut as `spec` says."""
        key = _input_of(spec)
        if key not in self._pixels:
            self._pixels[key] = read_pixels(self.images, spec)
        return self._pixels[key]

    def gray_levels(self, declared: Spec) -> float:
        """Return the largest difference, in gray levels, of a declared preprocessing of some images from timm's."""
        if declared.pixels != self.spec.pixels:
            return 255.0
        key = replace(_input_of(declared), mean=declared.mean, std=declared.std)
        if key not in self._gray_levels:
            images = spread(self.images, PREPROCESSED_IMAGES)
            self._gray_levels[key] = gray_level_difference(declared, self.spec, images)
        return self._gray_levels[key]

    @cached_property
    def zero(self) -> torch.Tensor:
        """The value that a regression's outputs are measured from, (1,): 0, or its last layer's bias if that is nearer.

        A unit may have its zero anywhere, as years and degrees have, and the size of values then tells nothing.
        """
        if self.spec.output_kind != "value":
            return torch.zeros(1)
        return nearest_zero(self.model, self.outputs(self.spec.img_size)[0])

    @property
    def image_labels(self) -> torch.Tensor:
        """The class of each image, (n,); -1 where it is not known, or images are not of one class."""
        known = self.spec.task == "classification"
        return torch.tensor([image.label if known else -1 for image in self.images])

    def outputs(self, px: ImgSize) -> list[torch.Tensor]:
        """Return the model's outputs for all images at one size."""
        if px not in self._outputs:
            spec = replace(self.spec, img_size=px)
            outputs = run_batches(lambda batch: run_model(self.model, spec.normalize(batch)), self.pixels(spec))
            if not all(torch.isfinite(output).all() for output in outputs):
                name = self.checkpoint_name or self.spec.model
                raise InputError(f"{name} itself gives NaN or infinite outputs at {px} px, so that nothing can be held "
                                 "against it; take an earlier checkpoint")  # fmt: skip
            self._outputs[px] = outputs
        return self._outputs[px]

    @cached_property
    def deployed(self) -> nn.Module:
        return deploy(self.model, self.spec.img_size)

    @cached_property
    def stem(self) -> str | None:
        """The name of the convolution whose input is the image itself; None where there is none."""
        return first_layer(self.deployed, self.spec.normalize(self.pixels(self.spec)[:1]))

    @cached_property
    def layers(self) -> dict[str, torch.Tensor]:
        """The output of each layer of the deployed model for the first few images."""
        return layer_outputs(self.deployed, self.spec.normalize(self.pixels(self.spec)[:LAYER_IMAGES]))


def _check_overflow(artifact: Artifact) -> None:
    """Raise CheckFailed if a value did not fit the artifact's half precision."""
    if (name := artifact.overflow()) is None:
        return
    values = dict(artifact.largest_values())
    largest = ", ".join(f"{each} {value:.3g}" for each, value in values.items())
    raise CheckFailed(f"{artifact.path.name} overflows {artifact.spec.precision}: {name} is the first operation whose "
                      f"values do not fit; nearest before it: {largest}; choose fp32",
                      {"passed": False, "overflow": name, "largest_values": values})  # fmt: skip


def _input_of(spec: Spec) -> Spec:
    """Return a spec's preprocessing alone, up to pixels."""
    fields_read = ("img_size", "in_chans", "pixel_type", "interpolation", "crop_pct", "crop_mode")
    values = {name: getattr(spec, name) for name in fields_read}
    return Spec(model="", num_classes=0, mean=(0.0,) * spec.in_chans, std=(1.0,) * spec.in_chans, **values)


def certify(artifact: Artifact, reference: Reference, name: str = "") -> Certificate:
    """Run the reference's images through an artifact and state how far it is from the model.

    The model is fed through timm's transform, the artifact with pixels, which are cut and normalized as it says itself.

    Args:
        name: what the certificate calls the artifact; its file name where empty.
    """
    spec = reference.spec
    outputs = _compare_outputs(artifact, reference)
    layer_values = run_layers(artifact, reference)
    limit = _gray_level_limit(artifact, reference)
    parameters = artifact.parameters()
    stem = parameters.get(reference.stem or "")
    gray_levels, faults = preprocessing_faults(artifact.spec, reference, layer_values, limit, stem)
    weights = compare_parameters(parameters, _quantizable(artifact, reference))
    faults += [*weights.faults, *artifact.scale_faults(), *label_faults(artifact.labels, reference.labels)]
    faults += task_faults(artifact.spec, reference.spec)
    verdict = "refused" if faults else outputs.verdict
    worst: dict[str, Any] = worst_figures(list(outputs.figures.values()))
    shown = {each.name for each in fields(Certificate)}
    worst_image = reference.images[worst["worst_image"]].path
    layer, layer_snr_db = worst_layer(layer_values, reference)
    return Certificate(
        artifact=name or artifact.path.name,
        artifact_sha256=artifact_sha256(artifact.path),
        artifact_bytes=sum(size(file) for file in artifact_files(artifact.path)),
        operators=artifact.operators,
        model=spec.model,
        checkpoint_sha256=sha256(reference.checkpoint) if reference.checkpoint else None,
        random_weights=not reference.trained,
        spec=artifact.spec,
        runtime=artifact.runtime,
        images=len(reference.images),
        image_source=reference.image_source,
        **{key: value for key, value in worst.items() if key in shown and key != "worst_image"},
        worst_image=worst_image.name,
        outputs=outputs.figures,
        accuracy=outputs.accuracy,
        model_accuracy=outputs.model_accuracy,
        worst_layer=layer,
        worst_layer_snr_db=layer_snr_db,
        largest_values=dict(artifact.largest_values()),
        excluded_macs=share_of_macs(reference.deployed, spec, artifact.spec.excluded_layers),
        compared_layers=weights.compared,
        gray_levels=gray_levels,
        tolerance=TOLERANCES[artifact.spec.precision],
        passed=PASSED[verdict],
        faults=tuple(faults),
        reasons=(*faults, *outputs.reasons),
        notes=tuple(_saturation(artifact, reference)),
        versions={**versions(*PACKAGES), "machine": platform.machine()},
        checkpoint=reference.checkpoint_name,
        ema=reference.ema,
        data=reference.data,
    )


@dataclass(frozen=True)
class _Outputs:
    figures: dict[str, dict[str, Figure]]  # figures of each output at each size
    verdict: Verdict
    reasons: tuple[str, ...]
    accuracy: float | None
    model_accuracy: float | None


def _compare_outputs(artifact: Artifact, reference: Reference) -> _Outputs:
    """Run all images at each size; raise CheckFailed if a value does not fit the artifact's half precision."""
    labels = reference.image_labels
    figures: dict[str, dict[str, Figure]] = {}
    verdicts, reasons, accuracies = [], [], []
    for px in artifact.spec.sizes:
        expected = reference.outputs(px)
        pixels = reference.pixels(replace(artifact.spec, img_size=px))
        outputs = run_batches(lambda batch: artifact.run(artifact.spec.feed(batch)), pixels)
        _check_overflow(artifact)
        accuracies.append((accuracy(outputs[0], labels), accuracy(expected[0], labels)))
        figure, verdict, why = judge_outputs(artifact.spec, px, expected, outputs, reference)
        figures |= figure
        verdicts.append(verdict)
        reasons += why
    return _Outputs(figures, worst_verdict(verdicts), tuple(dict.fromkeys(reasons)), *accuracies[0])


def judge_outputs(
    spec: Spec, px: ImgSize, expected: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], reference: Reference
) -> tuple[dict[str, dict[str, Figure]], Verdict, list[str]]:
    """Return the figures of each output at a size, by its name, and the verdict on all of them with its reasons.

    Raise CheckFailed where outputs are not finite or of another shape than the model's, which are `expected`.
    """
    tolerance, probabilities = TOLERANCES[spec.precision], spec.output_kind == "probabilities"
    own = reference.spec
    thresholds = own.label_thresholds if probabilities and own.task == "multi_label" else None
    figures, verdicts, reasons = {}, [], []
    for name, model_output, output in zip(spec.outputs, expected, outputs, strict=True):
        figure = compare(model_output - reference.zero, output - reference.zero, tolerance, probabilities, thresholds)
        verdict, why = judge(figure, tolerance, len(output))
        figures[f"{name} at {px} px"] = figure
        verdicts.append(verdict)
        reasons += why
    return figures, worst_verdict(verdicts), reasons


def _saturation(artifact: Artifact, reference: Reference) -> list[str]:
    """Return a note where 8-bit sums overflow on this processor with the runtime's own settings."""
    if artifact.run_with_defaults is None:
        return []
    pixels = reference.pixels(replace(artifact.spec, img_size=reference.spec.img_size))[:SATURATION_IMAGES]
    expected = [output[:SATURATION_IMAGES] for output in reference.outputs(reference.spec.img_size)]
    right, with_defaults = (run_batches(lambda batch: run(artifact.spec.feed(batch)), pixels)  # noqa: B023
                    for run in (artifact.run, artifact.run_with_defaults))  # fmt: skip
    differ = min(snr_db(a, b) for a, b in zip(right, with_defaults, strict=True))
    defaults_db = min(snr_db(a, b) for a, b in zip(expected, with_defaults, strict=True))
    if differ > SATURATED_DB:
        return []
    return [f"8-bit sums overflow on this kind of processor (x86 without VNNI) with {artifact.runtime}'s own settings, "
            f"which leaves {defaults_db:.1f} dB: {resolve_backend(artifact.path).overflow_advice}"]  # fmt: skip


def preprocessing_faults(
    declared: Spec,
    reference: Reference,
    outputs: Mapping[str, torch.Tensor],
    limit: float = MAX_GRAY_LEVELS,
    stem: LayerParameters | None = None,
) -> tuple[float, list[str]]:
    """Return by how many gray levels of 255 an artifact's preprocessing differs from timm's, and its faults.

    Args:
        declared: the artifact's spec.
        outputs: outputs of its layers, by `run_layers`: the first shows the preprocessing inside.
        limit: most gray levels that the first layer may show; those of the preprocessing outside may be 1.
        stem: the file's weights of the first layer, where they are known.
    """
    spec = reference.spec
    declared = replace(declared, img_size=spec.img_size)
    named = ("in_chans", "pixel_type", *PREPROCESSING)
    unequal = [name for name in named if getattr(declared, name) != getattr(spec, name)]
    faults = [f"preprocessing: {name} is {getattr(declared, name)} and the model's {getattr(spec, name)}"
              for name in unequal]  # fmt: skip
    levels = reference.gray_levels(declared)
    if levels > MAX_GRAY_LEVELS:
        faults.append(f"preprocessing is off by {levels:.1f} gray levels (at most {MAX_GRAY_LEVELS:g})")
    inside = stem_gray_levels(outputs, reference, stem)
    if inside > limit:
        faults.append(f"the first layer is given colors that are off by {inside:.1f} gray levels (at most {limit:g})")
    return levels if limit > MAX_GRAY_LEVELS and inside <= limit else max(levels, inside), faults


def _gray_level_limit(artifact: Artifact, reference: Reference) -> float:
    """Return by how much the first layer's colors may seem to be off; an input in 8 bits rounds them too."""
    spec = artifact.spec
    calibrated = spec.precision == resolve_backend(artifact.path).calibrated
    return MAX_8_BIT_GRAY_LEVELS if calibrated and reference.stem not in spec.excluded_layers else MAX_GRAY_LEVELS


def _quantizable(artifact: Artifact, reference: Reference) -> nn.Module:
    """Return the deployed model in the form that the artifact was written from."""
    unfolded = artifact.spec.precision == "int8" and resolve_backend(artifact.path).unfolds_identities
    return unfold_identities(reference.deployed) if unfolded else reference.deployed


# --- layers -----------------------------------------------------------------------------------------------------------


def run_layers(artifact: Artifact, reference: Reference) -> Mapping[str, torch.Tensor]:
    """Return the outputs of an artifact's layers for the first few images."""
    spec = replace(artifact.spec, img_size=reference.spec.img_size)
    return artifact.run_layers(artifact.spec.feed(reference.pixels(spec)[:LAYER_IMAGES]))


def worst_layer(outputs: Mapping[str, torch.Tensor], reference: Reference) -> tuple[str | None, float | None]:
    """Return the layer whose output is farthest from that of the deployed model's layer, and its SNR."""
    pairs = {name: (reference.layers[name], outputs[name]) for name in reference.layers if name in outputs}
    noise = {name: snr_db(*pair) for name, pair in pairs.items() if pair[0].shape == pair[1].shape}
    return min(noise.items(), key=lambda item: item[1]) if noise else (None, None)


def stem_gray_levels(
    outputs: Mapping[str, torch.Tensor], reference: Reference, stem: LayerParameters | None = None
) -> float:
    """Return by how many gray levels of 255 the first layer's input must be off to explain its output; 0 if unknown.

    What the file's own weights make of the image, `stem`, is no sign of another image: they are compared elsewhere. A
    wrong constant of the normalization moves each color by some levels at black and some at white: these are fitted.
    Other rounding has no direction, and hardly moves either.
    """
    name, spec = reference.stem, reference.spec
    if name is None or name not in outputs or outputs[name].shape != reference.layers[name].shape:
        return 0.0
    expected = reference.layers[name]
    layer: Any = dict(layers(reference.deployed))[name]
    output, expected = outputs[name].double(), expected.double()
    if not holds_shvit(reference.deployed):  # a converter may have put a scale that follows into the weights
        output = output * ((output * expected).sum((0, 2, 3)) / output.square().sum((0, 2, 3)))[:, None, None]
    elif stem is not None and stem.weight.value.shape == layer.weight.shape:
        batch = spec.normalize(reference.pixels(spec)[:LAYER_IMAGES]).double()
        expected = expected + rounding_output(layer, stem, batch)
    shares = spec.shares_of_white(reference.pixels(spec)[:LAYER_IMAGES])
    moves = []
    for channel in range(spec.in_chans):
        for part in (1 - shares[:, channel], shares[:, channel]):  # at black, at white
            level = torch.zeros_like(shares)
            level[:, channel] = part / spec.levels[channel]
            moves.append(convolve(layer, level).flatten())
    basis, error = torch.stack(moves, 1), (output - expected).flatten()
    normal = basis.T @ basis
    normal += 1e-4 * normal.diagonal().max() * torch.eye(len(normal), dtype=torch.float64)
    if not torch.isfinite(error).all():
        return 255.0
    return torch.linalg.solve(normal, basis.T @ error).abs().max().item()


# --- certificates -----------------------------------------------------------------------------------------------------


def require(certificate: Certificate) -> None:
    """Raise CheckFailed, with the figures, if the artifact is refused."""
    if certificate.passed is not False:
        return
    worst = f"; worst layer {certificate.worst_layer}" if certificate.worst_layer else ""
    more = len(certificate.reasons) - MAX_REASONS
    reasons = "; ".join(certificate.reasons[:MAX_REASONS]) + (f" and {more} more" if more > 0 else "")
    raise CheckFailed(f"{certificate.artifact} exceeds its tolerance: {reasons}{worst}", asdict(certificate))
