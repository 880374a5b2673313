"""From a model to a verified file of any format: deploy → write → certify, with layers kept out of int8 if need be."""

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from shvit.certificate import certificate_path
from shvit.deploy import deploy
from shvit.errors import InputError
from shvit.files import remove, write_whole

from .forms import Probabilities, feature_maps, layers, without_softmax
from .photographs import Photograph, read_pixels
from .runtimes import artefact_files, open_artefact
from .spec import Precision, Spec, open_model
from .tuning import TUNING
from .verify import Certificate, certify, require

Format = Literal["onnx", "openvino", "coreml"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "coreml": ".mlpackage"}
RANKED_IMAGES = 16  # photographs on which layers are ranked by the noise that int8 makes of them
CALIBRATION_BATCH = 8
FEWEST_CALIBRATION = 8


@dataclass(frozen=True)
class Options:
    """What an artefact can be besides its model, size and precision."""

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
    """What an artefact is made from, and what it is held against."""

    model: nn.Module
    """In eval mode, before deployment; it gives what the artefact is to give."""
    spec: Spec
    labels: Sequence[str]
    photographs: Sequence[Photograph]
    """To verify with."""
    photographs_from: str
    calibration: Sequence[Photograph]
    """To learn int8's ranges from."""
    checkpoint: Path | None


def open_source_model(
    name: str, checkpoint: Path | None, img_size: int | None, ema: bool, outputs: str
) -> tuple[nn.Module, Spec]:
    """The model with the outputs wanted (logits, probabilities or features), and its spec.

    Raises:
        InputError: as `open_model`, or it has no feature maps.
    """
    model, spec = open_model(name, checkpoint, img_size, ema, classifies=outputs != "features")
    if outputs == "features":
        model, names = feature_maps(name, model)
        return model, replace(spec, outputs=names)
    if outputs == "probabilities":
        return Probabilities(model).eval(), replace(spec, outputs=("probabilities",))
    return model, spec


def export(kind: Format, output: Path, source: Source, options: Options) -> Certificate:
    """Writes `output` and its certificate, both or neither.

    In int8 the layers that add the most noise are kept in higher precision, as few as are needed, if all of them in
    int8 would not hold the bounds.

    Raises:
        CheckFailed: the artefact drifts from its model.
        InputError: it cannot be written, or int8 has nothing to learn from.
    """
    spec = source.spec
    _check_calibration(kind, source)
    always_kept = float_layers(kind, deploy(source.model)) if spec.precision == "int8" else ()
    with ExitStack() as stack:
        record = stack.enter_context(write_whole(certificate_path(output)))
        partials = [stack.enter_context(write_whole(file)) for file in artefact_files(output)]
        write = _writer(kind, source, options)

        def attempt(kept: Sequence[str] = ()) -> Certificate:
            for partial in partials:
                remove(partial)  # the last attempt's may still be mapped into memory
            write(partials[0], replace(spec, kept=tuple(dict.fromkeys((*always_kept, *kept)))))
            artefact = open_artefact(partials[0])
            return certify(
                artefact,
                source.model,
                spec,
                source.photographs,
                source.photographs_from,
                source.checkpoint,
                output.name,
            )

        certificate = attempt()
        if not certificate.passed and spec.precision in ("int8", "w8a8"):
            certificate = _keep_fewest(attempt, _noisiest(kind, source))
        require(certificate)
        record.write_text(json.dumps(asdict(certificate), indent=2) + "\n")
    return certificate


def float_layers(kind: Format, model: nn.Module) -> tuple[str, ...]:
    """The layers of a deployed model that are quicker in float32 than in int8 in the format's runtime."""
    name, _ = next(layers(model))
    return (name,) if kind == "onnx" and TUNING["onnxruntime"].float_stem else ()


LEARNING: dict[Format, Precision] = {"onnx": "int8", "openvino": "int8", "coreml": "w8a8"}
"""The precision whose ranges are learnt from photographs."""


def _check_calibration(kind: Format, source: Source) -> None:
    precision = source.spec.precision
    if precision != LEARNING[kind]:
        return
    if source.checkpoint is None:
        raise InputError(f"--precision {precision} needs trained weights; give --checkpoint")
    if len(source.calibration) < FEWEST_CALIBRATION:
        raise InputError(f"{len(source.calibration)} photographs are too few to learn the ranges of {precision} from; "
                         f"give --calibration a folder of {FEWEST_CALIBRATION} or more, best some hundred")  # fmt: skip


def _keep_fewest(attempt: Callable[[Sequence[str]], Certificate], candidates: Sequence[str]) -> Certificate:
    from .quantize import fewest

    count = fewest(lambda number: attempt(candidates[:number]).passed, most=len(candidates) // 2)
    return attempt(candidates[:count])


def _noisiest(kind: Format, source: Source) -> list[str]:
    """The layers by the noise that int8 makes of them, worst first."""
    from .quantize import layer_noise, unfold_identities

    model = without_softmax(deploy(source.model, source.spec.img_size))
    if kind != "coreml":
        model = unfold_identities(model)
    pixels = read_pixels(source.calibration[:: -(-len(source.calibration) // RANKED_IMAGES)], source.spec)
    return list(layer_noise(model, source.spec.normalize(pixels)))


def _writer(kind: Format, source: Source, options: Options) -> Callable[[Path, Spec], None]:
    """A function that writes the artefact, given which layers are kept; what all attempts share is done once."""
    size = None if source.spec.other_sizes else source.spec.img_size
    model = deploy(source.model, size)
    if kind == "coreml":
        return _coreml_writer(model, source, options)
    if source.spec.precision == "int8":
        write = int8_onnx_writer(model, source.spec, source.calibration, options.dynamic_batch, source.labels)
    else:
        write = _onnx_writer(model, source, options)
    return write if kind == "onnx" else _openvino_writer(write, source)


def _onnx_writer(model: nn.Module, source: Source, options: Options) -> Callable[[Path, Spec], None]:
    from .onnx import write_onnx

    return lambda path, spec: write_onnx(model, path, spec, options.dynamic_batch, source.labels)


def int8_onnx_writer(
    model: nn.Module,
    spec: Spec,
    calibration: Sequence[Photograph],
    dynamic_batch: bool,
    labels: Sequence[str] = (),
) -> Callable[[Path, Spec], None]:
    """A function that writes an int8 ONNX file, given its spec, whose kept layers stay in float32.

    Args:
        model: deployed, in eval mode.
        calibration: to learn the ranges from.
    """
    from .onnx import read_onnx, write_onnx
    from .quantize import activation_ranges, quantize_onnx, unfold_identities

    model = unfold_identities(model)
    pixels = read_pixels(calibration, spec)
    ranges = activation_ranges(without_softmax(model), map(spec.normalize, pixels.split(CALIBRATION_BATCH)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        write_onnx(model, path, spec, dynamic_batch)
        proto = read_onnx(path)
    return lambda path, spec: quantize_onnx(proto, path, spec, labels, ranges)


def _openvino_writer(write_onnx: Callable[[Path, Spec], None], source: Source) -> Callable[[Path, Spec], None]:
    from .openvino import write_openvino

    def write(path: Path, spec: Spec) -> None:
        with tempfile.TemporaryDirectory() as folder:
            between = Path(folder) / "model.onnx"
            write_onnx(between, replace(spec, precision="int8" if spec.precision == "int8" else "fp32"))
            write_openvino(between, path, spec, source.labels)

    return write


def _coreml_writer(model: nn.Module, source: Source, options: Options) -> Callable[[Path, Spec], None]:
    from .coreml import write_coreml

    pixels = list(read_pixels(source.calibration, source.spec)) if source.spec.precision == "w8a8" else []
    return lambda path, spec: write_coreml(
        model,
        path,
        spec,
        labels=source.labels,
        classifier=options.classifier,
        calibration=pixels,
        keep=spec.kept,
    )
