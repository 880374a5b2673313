"""Core ML: how a package (ML Program) is written from a deployed model, and how it is loaded and run."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from timm.utils import natural_key
from torch import nn

from shvit.errors import InputError
from shvit.fold import DeployedSHSA
from shvit.img_size import ImgSize
from shvit.terminal import quiet
from shvit.train.data.pixels.formats import PixelFormat

from ..formats.parameters import LayerParameters, Stored, quantized, range_faults, stored
from ..formats.rounding import Outputs
from ..guards import check_ports, one_line
from ..metadata import INPUT, describe, labels_from, ranges_from, spec_from
from ..quantization.ranges import Range
from ..spec import Spec
from ..wrappers import MIL_LAYERS, Normalized, Tupled, layer_name, with_attention
from .backend import Artifact, Backend, FormatOptions, ImageInput, Job, Source, Timing, Writer, with_pixel_input
from .compute_plan import COMPUTE_UNITS

if TYPE_CHECKING:
    import coremltools as ct
    from coremltools.converters.mil.mil import Function, Var
    from coremltools.proto.Model_pb2 import Model

    from ..mil.program import Package

LABEL = "classLabel"  # name of a classifier's output with the most probable label, as is customary in Core ML


@dataclass(frozen=True, kw_only=True)
class CoremlOptions(FormatOptions):
    """Options of Core ML packages."""

    tensor_input: bool = False
    """Take a normalized float32 (1, C, H, W); an RGB image by default."""
    other_sizes: tuple[ImgSize, ...] = ()
    """Further image sizes in pixels that the same package takes, as 192 or HEIGHTxWIDTH."""
    classifier: bool = False
    """Write a classifier with labels and their probabilities, as Vision and Xcode's preview expect."""

    @property
    def classifies(self) -> bool:
        return self.classifier

    def complete(self, spec: Spec) -> Spec:
        if self.other_sizes and spec.precision == "w8a8":
            raise InputError("--precision w8a8 takes one size; leave out --other-sizes")
        others = tuple(ImgSize.of(size, "--other-sizes") for size in self.other_sizes)
        if spec.img_size in others or len(set(others)) < len(others):
            raise InputError(f"--other-sizes: give each size once, and not {spec.img_size}, which is the first")
        spec = with_pixel_input(spec, not self.tensor_input, "give --tensor-input")
        return replace(spec, other_sizes=others)

    def for_pixels(self, pixels: PixelFormat) -> "CoremlOptions":
        return replace(self, tensor_input=self.tensor_input or not pixels.uses_pillow)


def create_writer(source: Source, options: CoremlOptions) -> Writer:
    """Return a function that writes packages of a model."""
    calibration = list(source.calibration_pixels()) if source.spec.precision == "w8a8" else []
    ranges, labels, classifier = source.coreml_ranges(), source.labels, options.classifier
    return lambda path, spec: write_coreml(
        source.deployed(), path, spec, labels=labels, classifier=classifier, calibration=calibration, ranges=ranges
    )


class FlexibleSHSA(DeployedSHSA):
    """Attention at any grid whose trace holds no number of rows or columns.

    `x.shape[2]` would be traced as arithmetic on whole numbers, which coremltools cannot convert with NumPy 2.4;
    `reshape_as` becomes its `shape` and `reshape`.
    """

    def _to_grid(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.reshape_as(like)


def write_coreml(
    model: nn.Module,
    path: Path,
    spec: Spec,
    *,
    labels: Sequence[str] = (),
    classifier: bool = False,
    calibration: Sequence[torch.Tensor] = (),
    ranges: dict[str, Range] | None = None,
) -> None:
    """Export a deployed model with an input `image` and float32 outputs named by `spec.outputs`.

    The input is an RGB image (gray for a model of one channel) where `spec.uint8_input`, with mean and standard
    deviation inside the graph; a normalized float32 tensor (1, C, H, W) otherwise. int8 is that of the weights, one
    scale for each output channel, computed with in float16; w8a8 has 8-bit inputs of convolutions and linear layers
    too, and needs iOS 17 where the others need iOS 16. Each convolution and linear layer is named after the module that
    it came from. The package carries its `Spec` and versions.

    Args:
        model: in eval mode; deployed without a size where `spec.other_sizes` has any. Gives one output, or a list or
            tuple of them.
        path: a folder name ending in .mlpackage; the caller moves it into place.
        labels: names of the classes, in order.
        classifier: make it a Core ML classifier, which gives a label and the probabilities by label; `model` then ends
            in a softmax.
        calibration: images as uint8 (C, H, W) of `spec.img_size`, as `spec.transform(normalize=False)` gives them;
            w8a8 takes its activations' ranges from them.
        ranges: ranges of the inputs of w8a8's layers, by the layer's name; missing ones are learned and added.

    Raises:
        InputError: labels, images or names that do not fit, or w8a8 in several sizes.
    """
    _check(spec, labels, classifier, calibration)
    with quiet(), one_line(spec.model, "cannot be converted to Core ML"):
        import coremltools as ct

        from ..quantization.coreml_passes import Calibration, pipeline

        ranges = {} if ranges is None else ranges
        learning = Calibration(_inputs(spec, calibration), _evaluator)
        package = ct.convert(
            _trace(model, spec),
            inputs=[_input(spec)],
            outputs=[ct.TensorType(name=name, dtype=np.float32) for name in spec.outputs],
            classifier_config=ct.ClassifierConfig(list(labels), LABEL) if classifier else None,
            minimum_deployment_target=ct.target.iOS17 if spec.precision == "w8a8" else ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32 if spec.precision == "fp32" else ct.precision.FLOAT16,
            convert_to="mlprogram",
            pass_pipeline=pipeline(spec, _traced_names(model, spec), learning, ranges),
        )
        for key, value in describe(spec, labels, ranges).items():
            package.user_defined_metadata[key] = value
        package.short_description = f"{spec.model}, {spec.img_size} px, {spec.num_classes} classes"
        package.license = describe(spec)["license"]
        proto = package.get_spec()
        _restore_names(proto, map(layer_name, layer_names(model)))
        if classifier:
            ct.utils.rename_feature(proto, f"{LABEL}_probs", spec.outputs[0])
        ct.models.MLModel(proto, weights_dir=package.weights_dir, skip_model_load=True).save(str(path))


def _check(spec: Spec, labels: Sequence[str], classifier: bool, calibration: Sequence[torch.Tensor]) -> None:
    if classifier and len(labels) != spec.num_classes:
        raise InputError(f"{len(labels)} labels for {spec.num_classes} classes; a classifier needs one for each")
    if classifier and len(set(labels)) < len(labels):
        twice = Counter(labels).most_common(1)[0][0]
        raise InputError(f"label {twice!r} stands for several classes; a classifier needs a different one for each")
    if classifier and len(spec.outputs) != 1:
        raise InputError(f"a classifier has one output, its probabilities, not {', '.join(spec.outputs)}")
    if spec.precision != "w8a8":
        return
    if spec.other_sizes:
        sizes = ", ".join(map(str, spec.sizes))
        raise InputError(f"w8a8 is calibrated for one size, not {sizes}; write one package per size, or choose int8")
    if not calibration:
        raise InputError("w8a8 takes its activations' ranges from images, and none were given; give 128 or more")
    wrong = [tuple(pixels.shape) for pixels in calibration if tuple(pixels.shape) != spec.shape]
    if wrong or any(pixels.dtype != spec.pixels.dtype for pixels in calibration):
        actual = f"{wrong[0]}" if wrong else "another type"
        raise InputError(f"images to calibrate with must be uint8 {spec.shape}, not {actual}; "
                         "take them from spec.transform(normalize=False)")  # fmt: skip


def _trace(model: nn.Module, spec: Spec) -> torch.jit.ScriptModule:
    if spec.other_sizes:
        model = with_attention(model, FlexibleSHSA)
    if len(spec.outputs) > 1:
        model = Tupled(model)
    if spec.uint8_input:
        model = Normalized(model, spec, white=1)  # which Core ML's image input gives at scale 1/255
    with torch.no_grad():
        return torch.jit.trace(model.eval(), torch.rand(1, *spec.shape), check_trace=False)  # the package is compared


def _traced_names(model: nn.Module, spec: Spec) -> dict[str, str]:
    """Return the layers' names in `model` by their names in its trace."""
    wrappers = (len(spec.outputs) > 1) + spec.uint8_input
    return {"model." * wrappers + name: layer_name(name) for name in layer_names(model)}


def _input(spec: Spec) -> "ct.TensorType | ct.ImageType":
    """Return coremltools' description of the input."""
    import coremltools as ct

    shapes = [(1, spec.in_chans, *size) for size in spec.sizes]
    shape = ct.EnumeratedShapes(shapes, default=shapes[0]) if spec.other_sizes else shapes[0]
    if not spec.uint8_input:
        return ct.TensorType(name=INPUT, shape=shape, dtype=np.float32)
    colors = ct.colorlayout.GRAYSCALE if spec.in_chans == 1 else ct.colorlayout.RGB
    return ct.ImageType(name=INPUT, shape=shape, scale=1 / 255, color_layout=colors)


def _inputs(spec: Spec, calibration: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the images as the traced graph takes them: (1, C, H, W), normalized or in 0–1."""
    return [pixels[None].float() / 255 if spec.uint8_input else spec.normalize(pixels[None]) for pixels in calibration]


def _evaluator(function: "Function") -> Callable[[torch.Tensor], Mapping["Var", torch.Tensor]]:
    """Return a function that computes every variable of a traced function with one input."""
    from ..mil.program import Program

    (name,) = function.inputs
    program = Program(function, "the traced model")
    return lambda x: program.values({name: x})


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the modules whose output is that of one convolution or linear operation.

    A norm is one: coremltools folds it into the convolution before it. Subclasses of norms may add an activation.
    """
    norms, named = (nn.BatchNorm1d, nn.BatchNorm2d), model.named_modules()
    return [name for name, each in named if name and (isinstance(each, nn.Conv2d | nn.Linear) or type(each) in norms)]


def _restore_names(proto: "Model", names: Iterable[str]) -> None:
    """Give operations their modules' names again, where the written name can be one module's alone."""
    from ..quantization.coreml_passes import written

    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(written(name), []).append(name)
    main = proto.mlProgram.functions["main"]
    for op in main.block_specializations[main.opset].operations:
        values = op.attributes["name"].immediateValue.tensor.strings.values
        candidates = modules.get(values[0], ())
        if op.type in ("conv", "linear") and len(candidates) == 1:
            values[0] = candidates[0]


# --- run --------------------------------------------------------------------------------------------------------------


def load(path: Path, threads: int | None) -> Artifact:
    """Load a package of `shvit export` in our evaluator, which runs everywhere, with PyTorch's threads."""
    from ..mil.program import Package

    package = Package(path)
    spec, labels = spec_from(package.metadata, path), labels_from(package.metadata, path)
    check_ports(path, spec, *package.ports, INPUT)
    if wrong := [size for size in spec.sizes if (1, spec.in_chans, *size) not in package.inputs[0].shapes]:
        raise InputError(f"{path}: says that it takes {wrong[0]} px, and does not; export the model again")
    package.half = spec.precision != "fp32"
    if package.labels not in ((), labels):
        raise InputError(f"{path}: the labels that it gives are not those that it says it has; export the model again")

    def scale_faults() -> list[str]:
        ranges = ranges_from(package.metadata, path)
        return [*coreml_scale_faults(package), *range_faults(ranges, coreml_steps(package))]

    return Artifact(
        path=path,
        spec=spec,
        runtime="mil",
        operators=package.operators,
        run=partial(_run, package, spec, labels),
        run_layers=partial(_run_layers, package, spec),
        parameters=partial(coreml_parameters, package),
        scale_faults=scale_faults,
        labels=labels,
    )


def load_native(artifact: Artifact) -> Artifact:
    """Return the same package in Core ML itself, on all of the machine's compute units; layers stay our evaluator's."""
    if sys.platform != "darwin":
        raise InputError("--runtime coreml needs macOS, of which Core ML is a part; leave it out for our own evaluator")
    import coremltools as ct

    model, spec = ct.models.MLModel(str(artifact.path)), artifact.spec

    def run(batch: torch.Tensor) -> Outputs:
        inputs = (image if isinstance(image, Image.Image) else image.numpy() for image in _images(spec, batch))
        return _by_name([model.predict({INPUT: image}) for image in inputs], spec, artifact.labels)

    return replace(artifact, runtime="coreml", run=run)


def _run(package: "Package", spec: Spec, labels: Sequence[str], batch: torch.Tensor) -> Outputs:
    return _by_name([package(**{INPUT: image}) for image in _images(spec, batch)], spec, labels)


def _run_layers(package: "Package", spec: Spec, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    results = [package.layers(**{INPUT: image}) for image in _images(spec, batch)]
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def _images(spec: Spec, batch: torch.Tensor) -> list[Image.Image | torch.Tensor]:
    """Return a package's input for each item of a batch: a PIL image, or a tensor (1, C, H, W)."""
    return [Image.fromarray(item.squeeze(2).numpy()) if spec.uint8_input else item[None] for item in batch]


def _by_name(results: Sequence[Mapping[str, Any]], spec: Spec, labels: Sequence[str] = ()) -> Outputs:
    """Return the outputs that the spec names, of several images as a batch."""
    return tuple(torch.cat([_tensor(result[name], labels) for result in results]) for name in spec.outputs)


def _tensor(output: Any, labels: Sequence[str]) -> torch.Tensor:
    """Return an output as a batch of one; a classifier's come by label and, from Core ML, in no order.

    Without `labels` the order is that in which people count. Raise InputError where the output has other labels.
    """
    if not isinstance(output, dict):
        return torch.as_tensor(output)
    chances = {str(label): chance for label, chance in output.items()}
    labels = labels or sorted(chances, key=natural_key)
    if chances.keys() != set(labels):
        unlike = sorted(chances.keys() ^ set(labels))
        raise InputError(f"the classifier's labels are not those that its package tells: {', '.join(unlike[:4])} "
                         f"{'…' if len(unlike) > 4 else 'differ'}; export the model again")  # fmt: skip
    return torch.tensor([[chances[label] for label in labels]])


# --- weights ----------------------------------------------------------------------------------------------------------


def coreml_parameters(package: "Package") -> dict[str, LayerParameters]:
    """Return the weights of a Core ML package, by its layers' names."""
    parameters = {}
    for op in package.program.function.operations:
        if op.op_type in MIL_LAYERS and (weight := _mil_constant(op.inputs.get("weight"))) is not None:
            parameters[op.name] = LayerParameters(weight, _mil_constant(op.inputs.get("bias")))
    return parameters


def _mil_constant(var: "Var | None") -> Stored | None:
    if var is None or var.op is None:
        return None
    op = var.op
    if op.op_type == "const":
        return stored(np.asarray(var.val))
    if op.op_type == "constexpr_affine_dequantize":
        values = {name: np.asarray(op.inputs[name].val) for name in ("quantized_data", "scale", "zero_point", "axis")}
        return quantized(values["quantized_data"], values["scale"], values["zero_point"], int(values["axis"]))
    return None


def coreml_scale_faults(package: "Package") -> list[str]:
    """Return the tensors of a package that are written and read with different scales or zero points."""
    faults = []
    for op in package.program.function.operations:
        source = op.inputs["input"].op if op.op_type == "dequantize" else None
        if source is not None and source.op_type == "quantize":
            pairs = [(source.inputs.get(name), op.inputs.get(name)) for name in ("scale", "zero_point")]
            if any(a is not None and b is not None and not np.array_equal(a.val, b.val) for a, b in pairs):
                faults.append(f"{source.inputs['x' if 'x' in source.inputs else 'input'].name} is rounded with another "
                              "scale or zero point than it is read with")  # fmt: skip
    return faults


def coreml_steps(package: "Package") -> dict[str, tuple[float, float]]:
    """Return the scale and zero point that each layer's input is read with, by the layer's name."""
    steps = {}
    for op in package.program.function.operations:
        source = op.inputs["x"].op if op.op_type in MIL_LAYERS else None
        if source is not None and source.op_type == "dequantize":
            zero_point = source.inputs.get("zero_point")
            steps[op.name] = (float(source.inputs["scale"].val), 0.0 if zero_point is None else float(zero_point.val))
    return steps


def inspect(path: Path) -> ImageInput:
    """Return the image input of a package of `shvit export`."""
    spec = load(path, None).spec
    return ImageInput(spec.img_size, None, spec.precision)


def job(path: Path, batch_size: int, precision: str, compute_units: str) -> Job:
    """Return how the worker opens a package in Core ML."""
    return {"runner": "coreml", "path": str(path), "compute_units": COMPUTE_UNITS[compute_units]}


COREML = Backend(
    name="coreml",
    title="Core ML",
    suffix=".mlpackage",
    help="Write a verified Core ML package (ML Program, iOS 16; iOS 17 for w8a8), run here by our own evaluator.",
    timings={
        "coreml": Timing("the package of `shvit export coreml` in Core ML, on a Mac", "fp16", "fp16", on_cpu=False)
    },
    job=job,
    packages=("coremltools",),
    extra="coreml",
    precisions=("fp32", "fp16", "int8", "w8a8"),
    precision_help="Weight and compute precision. int8 rounds weights alone, to half of fp16's size; w8a8 rounds "
    "activations too.",
    compared=("fp16", "int8", "w8a8"),
    calibrated="w8a8",
    options=CoremlOptions,
    all_options=CoremlOptions(),
    create_writer=create_writer,
    load=load,
    load_native=load_native,
    inspect=inspect,
    unfolds_identities=False,
)
