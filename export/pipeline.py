"""From a model to a verified file of any format: deploy, write, certify; layers are excluded from int8 if need be."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from shvit.certificate import Envelope, certificate_path, read_origin, write_certificate
from shvit.errors import CheckFailed, InputError, refuse
from shvit.files import atomic_write, is_file, scratch_folder, sha256
from shvit.img_size import ImgSizeLike
from shvit.weights.resolve import Log, Weights, find_weights, resolve_weights

from .arm64.compare import certify_arm64, check_arm64
from .arm64.emulator import Cpu
from .backends.backend import Backend, O
from .backends.registry import BACKENDS, artifact_files, load_artifact, refuse_changed, resolve_backend
from .guards import check_files, images_that_fit
from .images import MAX_IMAGES
from .labels import known_classes
from .quantization.exclusion import expected_count, smallest_passing
from .source import Outputs, Source, create_reference, create_source, create_wrapped_model
from .spec import Precision, Spec
from .verdict import lack_of_evidence
from .verify import Certificate, certify, require

MIN_CALIBRATION = 8  # images


def export_model(
    format: str,  # noqa: A002  (the word of this field)
    model: str | nn.Module | None,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    ema: bool = False,
    precision: Precision = "fp32",
    img_size: ImgSizeLike | None = None,
    outputs: Outputs = "logits",
    images: str | Path | None = None,
    calibration: str | Path | None = None,
    labels: str | Path | None = None,
    arm64: Cpu | None = None,
    log: Log = lambda line: None,
    **options: Any,
) -> Certificate:
    """Export a model into a verified file, as `shvit export` does, and write its certificate beside it.

    Args:
        format: onnx, openvino, coreml, litert, ncnn or executorch.
        model: a name that timm knows, None for the checkpoint's own model; or a timm model with the weights that it
            has.
        output: the file to write.
        checkpoint: weights in any layout, or a name of `shvit weights list`; random ones where None.
        pretrained: take the model's published weights in place of a checkpoint.
        ema: take the checkpoint's EMA weights.
        precision: weight and compute precision.
        img_size: input size in pixels, one number or (height, width); the one that the checkpoint was trained for where
            None.
        outputs: logits; probabilities; or features, the maps at strides 16, 32 and 64 of a SHViT. In place of logits
            a multi-label model gives the probability of each label, and a regression its value.
        images: a folder of images to verify with; scikit-image's bundled ones where None.
        calibration: a folder of training images from which 8-bit ranges are learned.
        labels: a text file with the name of a class on each line; those that are known of the weights where None.
        arm64: run the file in its runtime's build for ARM64 too, on this processor, which QEMU emulates.
        log: called with each line about what is not as would be expected.
        options: the format's own, such as `dynamic_batch=True` or `classifier=True`; see `shvit export FORMAT --help`.

    Raises:
        CheckFailed: the artifact exceeds its tolerance; nothing is written.
        InputError: the model cannot be exported like this.
    """
    if format not in BACKENDS:
        raise InputError(f"unknown format {format!r}; choose from {', '.join(BACKENDS)}")
    backend, output = BACKENDS[format], Path(output)
    if precision not in backend.precisions:
        raise InputError(f"{backend.title} has no precision {precision!r}; choose from {', '.join(backend.precisions)}")
    known = [each.name for each in fields(backend.options)]
    if unknown := options.keys() - known:
        raise InputError(f"{backend.title} has no option {min(unknown)!r}; choose from {', '.join(known)}")
    chosen = backend.options(**options)
    if outputs == "features":
        refuse("--features gives no classes", classifier=chosen.classifies, labels=labels)
    softmax, outputs = outputs == "probabilities", "probabilities" if chosen.classifies else outputs
    if not output.name.endswith(backend.ending) or output.name == backend.ending:
        raise InputError(f"--output {output} must end in {backend.ending}")
    check_files(output, artifact_files(output))
    if arm64 is not None:
        check_arm64(backend)
    if isinstance(model, nn.Module):
        weights: Weights | nn.Module = model
    else:
        weights = resolve_weights(model, _path(checkpoint), ema, pretrained, log)
    source = create_source(weights, outputs, img_size, _path(images), _path(calibration), _path(labels), log)
    if source.spec.task == "multi_label":
        refuse("a multi-label model gives the probability of each label as it is", softmax=softmax,
               classifier=chosen.classifies)  # fmt: skip
    if source.spec.num_classes == 1:
        refuse("the model has one output, of which there are no probabilities", softmax=softmax,
               classifier=chosen.classifies)  # fmt: skip
    if chosen.classifies and not source.labels:
        raise InputError(f"--classifier needs names for the {source.spec.num_classes} classes; give --labels")
    source = replace(source, spec=chosen.complete(replace(source.spec, precision=precision)))
    return export(backend, output, source, chosen, arm64, log)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def export(
    backend: Backend[O],
    output: Path,
    source: Source,
    options: O,
    arm64: Cpu | None = None,
    log: Log = lambda line: None,
) -> Certificate:
    """Write a verified file and its certificate, both or neither.

    In int8, if not all layers can be quantized within tolerance, the noisiest are excluded, as few as are needed.
    With `arm64` the file must hold on that processor too.

    Raises:
        CheckFailed: the artifact exceeds its tolerance.
        InputError: it cannot be written, or int8 has nothing to learn from.
    """
    spec = source.spec
    check_calibration(backend, source)
    always_excluded = backend.float_layers(source.deployed()) if spec.precision == "int8" else ()
    with ExitStack() as stack:
        record = stack.enter_context(atomic_write(certificate_path(output)))
        partials = [stack.enter_context(atomic_write(file)) for file in artifact_files(output)]
        folder = stack.enter_context(scratch_folder(output))
        write = backend.create_writer(source, options)

        def attempt(excluded: Sequence[str] = ()) -> Attempt:
            path = Path(tempfile.mkdtemp(dir=folder)) / output.name
            write(path, replace(spec, excluded_layers=tuple(dict.fromkeys((*always_excluded, *excluded)))))
            try:
                return certify(load_artifact(path, rounded=True), source.reference, output.name), path
            except InputError as error:  # a file that its converter wrote, and its runtime does not take
                raise InputError(str(error).replace(str(path), str(output))) from error

        certificate, path = attempt()
        quantized = spec.precision in ("int8", "w8a8")
        if quantized and not certificate.faults and not holds_without_chance(certificate):
            noise = source.noise(backend.unfolds_identities)
            noise = {name: each for name, each in noise.items() if name not in always_excluded}
            if noise:
                certificate, path = _exclude_fewest(attempt, (certificate, path), noise)
        require(certificate)
        if arm64 is not None:
            certificate = certify_arm64(certificate, path, source.reference, arm64, log)
            require(certificate)
        extras = backend.create_extras(source, options) if backend.create_extras is not None else {}
        for suffix, write_extra in extras.items():
            extra = output.with_suffix(suffix)
            written = write_extra(stack.enter_context(atomic_write(extra)))
            note = f"{extra.name} was written beside it and not run: {written}"
            certificate = replace(certificate, notes=(*certificate.notes, note))
        for partial, file in zip(partials, artifact_files(path), strict=True):
            shutil.move(file, partial)
        write_certificate(certificate, record)
    return certificate


def check_calibration(backend: Backend[Any], source: Source) -> None:
    """Raise InputError where ranges are to be learned, and there is nothing to learn them from."""
    precision = source.spec.precision
    if precision != backend.calibrated:
        return
    if not source.reference.trained:
        raise InputError(f"{precision}, whose ranges are learned, needs trained weights; give --checkpoint")
    if len(source.calibration) < MIN_CALIBRATION:
        raise InputError(f"{len(source.calibration)} images are too few to learn the ranges of {precision} from; give "
                         f"--calibration a folder of {MIN_CALIBRATION} or more, ideally several hundred")  # fmt: skip


Attempt = tuple[Certificate, Path]


def holds_without_chance(certificate: Certificate) -> bool:
    """Return whether a file passes with nothing granted to chance, or its images are no evidence either way."""
    lacking = lack_of_evidence(certificate.evidence, certificate.images)
    sure = certificate.passed is True and certificate.snr_db >= certificate.tolerance.snr_db
    return sure or (certificate.passed is None and bool(lacking))


def _exclude_fewest(attempt: Callable[[Sequence[str]], Attempt], whole: Attempt, noise: Mapping[str, float]) -> Attempt:
    """Return the file with the fewest of the noisiest layers excluded from quantization that passes.

    Args:
        whole: the file with none of them; it is taken if no other passes more clearly and it is not refused.
        noise: noise of each layer, the noisiest first. Noise adds up, so that its sums tell where to begin.
    """
    names, tried = list(noise), dict[int, Attempt]()

    def holds(count: int) -> bool:
        tried[count] = attempt(names[:count])
        passing = holds_without_chance(tried[count][0])
        for number, (_, path) in list(tried.items()):
            if number > count if passing else number < count:  # is not needed any more
                shutil.rmtree(path.parent, ignore_errors=True)
        return passing

    certificate, _ = whole
    allowed = 10 ** ((certificate.snr_db - certificate.tolerance.snr_db) / 10)  # a share of the noise of `whole`
    limit = max(1, len(names) // 2)
    count = smallest_passing(holds, limit, max(1, min(expected_count(list(noise.values()), allowed), limit)))
    best = tried[count][0]
    return whole if certificate.passed is not False and not holds_without_chance(best) else tried[count]


# --- verification -----------------------------------------------------------------------------------------------------


def verify_artifact(
    artifact: str | Path,
    *,
    model: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    ema: bool = False,
    images: str | Path | None = None,
    native: bool = False,
    arm64: Cpu | None = None,
    log: Log = lambda line: None,
) -> Certificate:
    """Compare an exported file with its model, as `shvit verify` does, and return a new certificate.

    Args:
        artifact: a file of `shvit export`. The certificate beside it names its model and weights.
        model: the model that it was made from; like all weights below, as the certificate says where not given.
        checkpoint: the weights that it was made from.
        pretrained: it was made from the model's published weights.
        ema: it was made from the checkpoint's EMA weights.
        images: a folder of images; scikit-image's bundled ones where None.
        native: run a Core ML package in Core ML, on a Mac; in our own evaluator otherwise.
        arm64: run the file in its runtime's build for ARM64 too, on this processor, which QEMU emulates.

    Raises:
        InputError: the file cannot be read, or nothing tells its weights.
        CheckFailed: the file has changed since it was certified, or was made from another model or other weights. One
            that exceeds its tolerance is returned, with `passed` False.
    """
    path = Path(artifact)
    refuse_changed(path)
    if arm64 is not None:
        check_arm64(resolve_backend(path))
    loaded = load_artifact(path, native=native, rounded=True)
    spec = loaded.spec
    weights = _origin_weights(path, spec, model, _path(checkpoint), pretrained, ema, log)
    outputs: Any = spec.output_kind
    wrapped, own_spec = create_wrapped_model(weights, outputs, spec.img_size, log)
    classes = known_classes(weights, own_spec, log) if outputs != "features" else ()
    limit = images_that_fit(MAX_IMAGES, own_spec, spec)
    reference = create_reference(weights, wrapped, own_spec, classes, _path(images), limit, loaded.labels)
    certificate = certify(loaded, reference)
    return certificate if arm64 is None else certify_arm64(certificate, path, reference, arm64, log)


def _origin_weights(
    artifact: Path, spec: Spec, model: str | None, checkpoint: Path | None, pretrained: bool, ema: bool, log: Log
) -> Weights:
    """Return the weights that an artifact was made from: the certificate's, which options must not contradict.

    Raise InputError where nothing tells them or they are missing, CheckFailed for another model or other weights.
    """

    def other(what: str, **certified: Any) -> CheckFailed:
        return CheckFailed(f"{artifact} was made from {what}", {"artifact": str(artifact), **certified})

    origin = read_origin(artifact)
    made_from = origin.model if origin and origin.model else spec.model
    if model is not None and model.partition(".")[0] != made_from.partition(".")[0]:
        raise other(f"another model: {made_from}, not {model}", model=made_from)
    if origin is None:
        if checkpoint is None and model is None and not pretrained:
            raise InputError(f"{artifact}: no certificate beside it names its weights; give --checkpoint")
        return resolve_weights(model or made_from, checkpoint, ema, pretrained, log)
    if ema and not origin.ema and origin.checkpoint is not None:
        raise other("the weights themselves, not the EMA weights", ema=False)
    if checkpoint is None and not pretrained and origin.checkpoint_sha256 is not None:
        checkpoint = _certified_checkpoint(artifact, origin, log)
    ema = ema or (origin.ema and checkpoint is not None)
    weights = resolve_weights(model or made_from, checkpoint, ema, pretrained, log)
    digest = sha256(weights.checkpoint) if weights.checkpoint else None
    if digest != origin.checkpoint_sha256:
        expected, actual = (f"SHA-256 {each[:12]}…" if each else "random ones"
                            for each in (origin.checkpoint_sha256, digest))  # fmt: skip
        named = f" ({origin.checkpoint})" if origin.checkpoint else ""
        what = f"another checkpoint: its weights are {expected}{named}, and {weights.name or 'no file'} is {actual}"
        raise other(what, checkpoint_sha256=origin.checkpoint_sha256, found=digest)
    return weights


def _certified_checkpoint(artifact: Path, origin: Envelope, log: Log) -> Path:
    """Return the checkpoint that a certificate names, as it is named or beside the artifact: the one of its hash."""
    if origin.checkpoint is None:
        raise InputError(f"{artifact}: its certificate does not name its weights; give --checkpoint")
    named, folder = Path(origin.checkpoint), artifact.parent
    candidates = [path for path in (named, folder / named, folder / named.name) if is_file(path)]
    if candidates:  # one of another hash is reported by the caller
        return next((path for path in candidates if sha256(path) == origin.checkpoint_sha256), candidates[0])
    try:
        return find_weights(origin.checkpoint, log)[0]
    except InputError as error:
        raise InputError(f"{artifact}: its certificate names {named}, which is not there; give --checkpoint"
                         ) from error  # fmt: skip
