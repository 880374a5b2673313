"""From a model to a verified file of any format: deploy → write → certify, with layers kept out of int8 if need be."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from shvit.certificate import certificate_path
from shvit.deployment import deploy
from shvit.documents import to_json
from shvit.errors import InputError
from shvit.files import atomic_write, scratch_folder
from shvit.weights.resolve import Log, Weights

from .backends.registry import artifact_files, open_artifact
from .backends.tuning import TUNING
from .images import ImageFile, read_pixels, spread
from .quantization.qdq import LayerRanges
from .quantization.ranges import Range
from .spec import Precision, Spec, open_weights
from .verdict import lack_of_evidence
from .verify import Certificate, Reference, certify, require
from .wrappers import Probabilities, feature_maps, layers, without_softmax

Format = Literal["onnx", "openvino", "coreml"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "coreml": ".mlpackage"}
RANKED_IMAGES = 8  # images on which layers are ranked by the noise that int8 makes of them
CALIBRATION_BATCH = 8
MIN_CALIBRATION = 8


@dataclass(frozen=True)
class Options:
    """What an artifact can be besides its model, size and precision."""

    features: bool = False
    """Feature maps in place of logits."""
    softmax: bool = False
    """Probabilities in place of logits."""
    dynamic_batch: bool = False
    """Of ONNX and OpenVINO: leave the batch size open."""
    classifier: bool = False
    """Of Core ML: labels with probabilities."""


@dataclass(frozen=True)
class Source:
    """What artifacts are made from, and what they are held against.

    Images are decoded and ranges learned once for all artifacts of a source and those that `replace` makes of it.
    """

    reference: Reference
    """The model, before deployment, which gives what the artifact is to give; and the images to verify with."""
    spec: Spec
    """Of the artifact."""
    calibration: Sequence[ImageFile]
    """To learn int8's ranges from."""
    _shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.reference.model

    @property
    def labels(self) -> Sequence[str]:
        return self.reference.labels

    @cached_property
    def size(self) -> int | None:
        """That the model is deployed for; None for any."""
        return None if self.spec.other_sizes else self.spec.img_size

    def deployed(self) -> nn.Module:
        """The model in its inference form."""
        return self._once(("deployed", self.size), lambda: deploy(self.model, self.size))

    def unfolded(self) -> nn.Module:
        """The form that ONNX and OpenVINO have in int8."""
        from .quantization.qdq import unfold_identities

        return self._once(("unfolded", self.size), lambda: unfold_identities(self.deployed()))

    def calibration_pixels(self) -> torch.Tensor:
        """uint8 (n, C, H, W)."""
        return self._once(("calibration", self.spec.img_size), lambda: read_pixels(self.calibration, self.spec))

    def ranges(self) -> dict[str, LayerRanges]:
        """Those of ONNX and OpenVINO in int8."""
        from .quantization.qdq import activation_ranges

        batches = map(self.spec.normalize, self.calibration_pixels().split(CALIBRATION_BATCH))
        return self._once(
            ("ranges", self.spec.img_size), lambda: activation_ranges(without_softmax(self.unfolded()), batches)
        )

    def coreml_ranges(self) -> dict[str, Range]:
        """Those of Core ML's w8a8, by the tensor's first layer; filled by the first file that is written."""
        return self._once(("Core ML", self.spec.uint8_input), dict)

    def noise(self, unfolded: bool) -> dict[str, float]:
        """The layers by the noise that int8 makes of them, worst first."""
        from .quantization.exclusion import layer_noise

        def measure() -> dict[str, float]:
            model = without_softmax(self.unfolded() if unfolded else self.deployed())
            pixels = self.calibration_pixels()
            return layer_noise(model, self.spec.normalize(pixels[spread(range(len(pixels)), RANKED_IMAGES)]))

        return self._once(("noise", unfolded), measure)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


def open_source_model(
    weights: Weights, img_size: int | None, outputs: str, log: Log = lambda line: None
) -> tuple[nn.Module, Spec]:
    """The model with the outputs wanted (logits, probabilities or features), and its spec.

    Raises:
        InputError: as `open_weights`, or it has no feature maps.
    """
    model, spec = open_weights(weights, img_size, outputs != "features", log)
    if outputs == "features":
        model, names = feature_maps(weights.model, model)
        return model, replace(spec, outputs=names)
    if outputs == "probabilities":
        return Probabilities(model).eval(), replace(spec, outputs=("probabilities",))
    return model, spec


def export(kind: Format, output: Path, source: Source, options: Options) -> Certificate:
    """Writes `output` and its certificate, both or neither.

    In int8 the layers that add the most noise are kept in higher precision, as few as are needed, if all of them in
    int8 would not hold the bounds.

    Raises:
        CheckFailed: the artifact drifts from its model.
        InputError: it cannot be written, or int8 has nothing to learn from.
    """
    spec = source.spec
    check_calibration(kind, source)
    always_kept = float_layers(kind, source.deployed()) if spec.precision == "int8" else ()
    with ExitStack() as stack:
        record = stack.enter_context(atomic_write(certificate_path(output)))
        partials = [stack.enter_context(atomic_write(file)) for file in artifact_files(output)]
        folder = stack.enter_context(scratch_folder(output))
        write = _writer(kind, source, options)

        def attempt(kept: Sequence[str] = ()) -> tuple[Certificate, Path]:
            path = Path(tempfile.mkdtemp(dir=folder)) / output.name
            write(path, replace(spec, excluded_layers=tuple(dict.fromkeys((*always_kept, *kept)))))
            return certify(open_artifact(path, rounded=True), source.reference, output.name), path

        certificate, path = attempt()
        quantized = spec.precision in ("int8", "w8a8")
        if quantized and not certificate.faults and not holds_without_chance(certificate):
            noise = {name: each for name, each in source.noise(kind != "coreml").items() if name not in always_kept}
            if noise:
                certificate, path = _keep_fewest(attempt, (certificate, path), noise)
        require(certificate)
        for partial, file in zip(partials, artifact_files(path), strict=True):
            shutil.move(file, partial)
        record.write_text(to_json(asdict(certificate), indent=2) + "\n")
    return certificate


def float_layers(kind: Format, model: nn.Module) -> tuple[str, ...]:
    """The layers of a deployed model that are quicker in float32 than in int8 in the format's runtime."""
    name, _ = next(layers(model))
    return (name,) if kind == "onnx" and TUNING["onnxruntime"].float_stem else ()


LEARNING: dict[Format, Precision] = {"onnx": "int8", "openvino": "int8", "coreml": "w8a8"}
"""The precision whose ranges are learned from images."""


def check_calibration(kind: Format, source: Source) -> None:
    """Raises InputError where ranges are to be learned, and there is nothing to learn them from."""
    precision = source.spec.precision
    if precision != LEARNING[kind]:
        return
    if source.reference.checkpoint is None:
        raise InputError(f"{precision}, whose ranges are learned, needs trained weights; give --checkpoint")
    if len(source.calibration) < MIN_CALIBRATION:
        raise InputError(f"{len(source.calibration)} images are too few to learn the ranges of {precision} from; "
                         f"give --calibration a folder of {MIN_CALIBRATION} or more, best some hundred")  # fmt: skip


Attempt = tuple[Certificate, Path]


def holds_without_chance(certificate: Certificate) -> bool:
    """Whether a file passes with nothing granted to chance, or is undecided for images that can tell nothing."""
    lacking = lack_of_evidence(certificate.evidence, certificate.images)
    sure = certificate.passed is True and certificate.snr_db >= certificate.tolerance.snr_db
    return sure or (certificate.passed is None and bool(lacking))


def _keep_fewest(attempt: Callable[[Sequence[str]], Attempt], whole: Attempt, noise: Mapping[str, float]) -> Attempt:
    """The file with the fewest of the noisiest layers in higher precision that passes, and is there already.

    Args:
        whole: the file with none of them; it is taken if no other passes more clearly and it is not refused.
        noise: each layer's own, the worst first. Noise adds up, so that its sums tell where to look.
    """
    from .quantization.exclusion import smallest_passing

    names, tried = list(noise), dict[int, Attempt]()

    def holds(count: int) -> bool:
        tried[count] = attempt(names[:count])
        passing = holds_without_chance(tried[count][0])
        for number, (_, path) in list(tried.items()):
            if number > count if passing else number < count:  # is not wanted any more
                shutil.rmtree(path.parent, ignore_errors=True)
        return passing

    certificate, _ = whole
    allowed = 10 ** ((certificate.snr_db - certificate.tolerance.snr_db) / 10)  # a share of the noise of `whole`
    left = sum(noise.values()) * min(allowed, 1.0)
    sums = list(accumulate(reversed([*noise.values()])))[::-1]  # of the layers from each one on
    guess = next((count for count, rest in enumerate(sums) if rest <= left), len(names))
    limit = max(1, len(names) // 2)
    count = smallest_passing(holds, limit, max(1, min(guess, limit)))
    found, _ = tried[count]
    return whole if certificate.passed is not False and not holds_without_chance(found) else tried[count]


def _writer(kind: Format, source: Source, options: Options) -> Callable[[Path, Spec], None]:
    """A function that writes the artifact, given which layers are kept; what all attempts share is done once."""
    if kind == "coreml":
        return _coreml_writer(source, options)
    if source.spec.precision == "int8":
        write = int8_onnx_writer(source.unfolded(), source.spec, source.ranges(), options.dynamic_batch, source.labels)
    else:
        write = _onnx_writer(source, options)
    return write if kind == "onnx" else _openvino_writer(write, source)


def _onnx_writer(source: Source, options: Options) -> Callable[[Path, Spec], None]:
    from .backends.onnx import write_onnx

    return lambda path, spec: write_onnx(source.deployed(), path, spec, options.dynamic_batch, source.labels)


def int8_onnx_writer(
    unfolded: nn.Module,
    spec: Spec,
    ranges: Mapping[str, LayerRanges],
    dynamic_batch: bool,
    labels: Sequence[str] = (),
) -> Callable[[Path, Spec], None]:
    """A function that writes an int8 ONNX file, given its spec, whose kept layers stay in float32.

    Args:
        unfolded: deployed and with its identities unfolded, in eval mode.
        ranges: of `activation_ranges`.
    """
    from .backends.onnx import read_onnx, save_onnx, write_onnx
    from .quantization.qdq import quantize_onnx

    with scratch_folder() as folder:
        path = folder / "float.onnx"
        write_onnx(unfolded, path, spec, dynamic_batch)
        proto = read_onnx(path)

    def write(path: Path, spec: Spec) -> None:
        quantized = quantize_onnx(proto, spec, ranges)
        save_onnx(quantized.proto, path, spec, labels, quantized.ranges)

    return write


def _openvino_writer(write_onnx: Callable[[Path, Spec], None], source: Source) -> Callable[[Path, Spec], None]:
    from .backends.openvino import write_openvino

    def write(path: Path, spec: Spec) -> None:
        with scratch_folder() as folder:
            between = folder / "model.onnx"
            write_onnx(between, replace(spec, precision="int8" if spec.precision == "int8" else "fp32"))
            write_openvino(between, path, spec, source.labels)

    return write


def _coreml_writer(source: Source, options: Options) -> Callable[[Path, Spec], None]:
    from .backends.coreml import write_coreml

    learns = source.spec.precision == "w8a8"
    return lambda path, spec: write_coreml(
        source.deployed(),
        path,
        spec,
        labels=source.labels,
        classifier=options.classifier,
        calibration=list(source.calibration_pixels()) if learns else [],
        keep=spec.excluded_layers,
        ranges=source.coreml_ranges(),
    )
