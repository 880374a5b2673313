"""A deployed model as a Core ML package (ML Program) in floating point, with int8 weights, or in 8 bits throughout."""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from shvit.errors import InputError
from shvit.fold import DeployedSHSA
from shvit.terminal import quiet

from ..metadata import INPUT, describe
from ..quantization.ranges import Range
from ..spec import Spec
from ..wrappers import Normalized, Wrapper, layer_name

if TYPE_CHECKING:
    from coremltools.converters.mil.mil import Function, Var

LABEL = "classLabel"
"""What a classifier calls the most probable label; Core ML's customary name."""


class Tupled(Wrapper):
    """A model of several outputs, which a trace can have as a tuple but not as a list."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.model(x))


class FlexibleSHSA(DeployedSHSA):
    """Attention at any grid whose trace holds no number of rows or columns.

    `x.shape[2]` would be traced as arithmetic on whole numbers, which coremltools cannot convert with NumPy 2.4;
    `reshape_as` becomes its `shape` and `reshape`.
    """

    def __init__(self, attention: DeployedSHSA):
        qk_dim, partial_dim = attention.qk_dim, attention.partial_dim
        super().__init__(attention.qkv, attention.proj, attention.act, qk_dim, partial_dim, attention.eps)

    def _to_grid(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.reshape_as(like)


def flexible(model: nn.Module) -> nn.Module:
    """A copy of `model` whose attentions are `FlexibleSHSA`."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DeployedSHSA):
                setattr(parent, name, FlexibleSHSA(child).eval())
    return model


def write_coreml(
    model: nn.Module,
    path: Path,
    spec: Spec,
    *,
    labels: Sequence[str] = (),
    classifier: bool = False,
    calibration: Sequence[torch.Tensor] = (),
    keep: Collection[str] = (),
    ranges: dict[str, Range] | None = None,
) -> None:
    """Exports `model`, already deployed, with an input `image` and float32 outputs named by `spec.outputs`.

    The input is an RGB image (gray for a model of one channel) where `spec.uint8_input`, with mean and standard
    deviation inside the graph; a normalized float32 tensor (1, C, H, W) otherwise. int8 is that of the weights, one
    scale for each output channel, computed with in float16; w8a8 has 8-bit inputs of convolutions and linear layers
    too, and needs iOS 17 where the others need iOS 16. Each convolution and linear layer is named after the module that
    it came from. The package carries its `Spec` and versions.

    Args:
        model: in eval mode; deployed without a size where `spec.other_sizes` has any. Gives one output, or a list or
            tuple of them.
        path: a folder name ending in .mlpackage; the caller moves it into place.
        labels: of the classes, in order.
        classifier: make it a Core ML classifier, which gives a label and the probabilities by label; `model` then ends
            in a softmax.
        calibration: images as uint8 (C, H, W) of `spec.img_size`, as `spec.transform(normalize=False)` gives them;
            w8a8 takes its activations' ranges from them.
        keep: names of convolutions and linear layers that are not quantized.
        ranges: of the inputs of w8a8's layers, by the layer's name; those that are missing are learned and put in.

    Raises:
        InputError: labels, images or names that do not fit, or w8a8 in several sizes.
    """
    _check(spec, labels, classifier, calibration)
    with quiet():
        import coremltools as ct
        from coremltools.converters.mil.mil import Program

        from ..quantization.coreml_passes import pipeline

        traced = _trace(model, spec)
        ranges = {} if ranges is None else ranges
        # Its checks after each of a hundred passes are a third of the time; the result is checked once.
        with patch.object(Program, "validate", lambda *_, **__: None):
            package = ct.convert(
                traced,
                inputs=[_input(spec)],
                outputs=[ct.TensorType(name=name, dtype=np.float32) for name in spec.outputs],
                classifier_config=ct.ClassifierConfig(list(labels), LABEL) if classifier else None,
                minimum_deployment_target=ct.target.iOS17 if spec.precision == "w8a8" else ct.target.iOS16,
                compute_precision=ct.precision.FLOAT32 if spec.precision == "fp32" else ct.precision.FLOAT16,
                convert_to="mlprogram",
                pass_pipeline=pipeline(
                    spec, _traced_names(model, spec), _inputs(spec, calibration), _evaluator, keep, ranges
                ),
            )
        package._mil_program.validate()
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
    if wrong or any(pixels.dtype != torch.uint8 for pixels in calibration):
        got = f"{wrong[0]}" if wrong else "another type"
        raise InputError(f"images to calibrate with must be uint8 {spec.shape}, not {got}; "
                         "take them from spec.transform(normalize=False)")  # fmt: skip


def _trace(model: nn.Module, spec: Spec) -> Any:
    if spec.other_sizes:
        model = flexible(model)
    if len(spec.outputs) > 1:
        model = Tupled(model)
    if spec.uint8_input:
        model = Normalized(model, spec, white=1)  # which Core ML's image input gives at scale 1/255
    with torch.no_grad():
        return torch.jit.trace(model.eval(), torch.rand(1, *spec.shape), check_trace=False)  # the package is compared


def _traced_names(model: nn.Module, spec: Spec) -> dict[str, str]:
    """Layers' names in `model` by those in what `_trace` makes of it."""
    wrappers = (len(spec.outputs) > 1) + spec.uint8_input
    return {"model." * wrappers + name: layer_name(name) for name in layer_names(model)}


def _input(spec: Spec) -> Any:
    """What coremltools is told of the input."""
    import coremltools as ct

    shapes = [(1, spec.in_chans, size, size) for size in spec.sizes]
    shape = ct.EnumeratedShapes(shapes, default=shapes[0]) if spec.other_sizes else shapes[0]
    if not spec.uint8_input:
        return ct.TensorType(name=INPUT, shape=shape, dtype=np.float32)
    colors = ct.colorlayout.GRAYSCALE if spec.in_chans == 1 else ct.colorlayout.RGB
    return ct.ImageType(name=INPUT, shape=shape, scale=1 / 255, color_layout=colors)


def _inputs(spec: Spec, calibration: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The images as the traced graph takes them: (1, C, H, W), normalized or in 0–1."""
    return [pixels[None].float() / 255 if spec.uint8_input else spec.normalize(pixels[None]) for pixels in calibration]


def _evaluator(function: "Function") -> Callable[[torch.Tensor], Mapping["Var", torch.Tensor]]:
    """Return what computes every variable of a traced function with one input."""
    from ..mil.program import Program

    (name,) = function.inputs
    program = Program(function, "the traced model")
    return lambda x: program.values({name: x})


def layer_names(model: nn.Module) -> list[str]:
    """Names of the modules that one convolution or linear operation gives the output of.

    A norm is one: coremltools folds it into the convolution before it. Subclasses of norms may add an activation.
    """
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    return [
        name
        for name, module in model.named_modules()
        if name and (isinstance(module, nn.Conv2d | nn.Linear) or type(module) in norms)
    ]


def _restore_names(proto: Any, names: Iterable[str]) -> None:
    """Gives operations their modules' names again, where what was written can be one module's alone."""
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
