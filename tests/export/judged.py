"""Files of trained tiny models, sound and with one deliberate defect, and their verdicts."""

import copy
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from coremltools.proto import Model_pb2
from torch import nn

from shvit.deployment import deploy
from shvit.errors import CheckFailed
from shvit.export.backends.backend import Artifact
from shvit.export.backends.coreml import write_coreml
from shvit.export.backends.onnx import save_onnx, write_onnx
from shvit.export.backends.openvino import write_openvino
from shvit.export.backends.registry import BACKENDS, load_artifact
from shvit.export.formats.onnx import metadata
from shvit.export.images import ImageFile
from shvit.export.metadata import SPEC_KEY, spec_from
from shvit.export.quantization.qdq import LayerRanges, Unfolded, activation_ranges, quantize_onnx
from shvit.export.source import Source
from shvit.export.spec import Precision, Spec
from shvit.export.verify import Reference, certify
from shvit.export.wrappers import Probabilities, layers
from shvit.fold import DeployedSHSA
from tests.trained_models import PX, draw_images, trained


def source_of(model: nn.Module, spec: Spec, drawn: Sequence[ImageFile], calibration: Sequence[ImageFile]) -> Source:
    """What files are made from; the weights count as a checkpoint's."""
    labels = [f"class {index}" for index in range(spec.num_classes)]
    reference = Reference(model, spec, drawn, "drawn", labels, checkpoint=Path(__file__))
    return Source(reference, spec, calibration)


# --- defects of a model, which any format can be written from ---------------------------------------------------------

LAYER = "stages.1.blocks.0.ffn.m.pw1"
"""A convolution before a ReLU, on which single defects are tried."""
ModelDefect = Callable[[nn.Module], nn.Module]
"""From the model to a deployed model with the defect."""


def _of_deployed(change: Callable[[nn.Module], None]) -> ModelDefect:
    def defect(model: nn.Module) -> nn.Module:
        deployed = deploy(model, PX)
        with torch.no_grad():
            change(deployed)
        return deployed

    return defect


def _swapped(deployed: nn.Module) -> None:
    weight = deployed.get_submodule("patch_embed.0").weight
    weight.copy_(weight.flip(1))


def _one_weight(deployed: nn.Module) -> None:
    """The largest: one per cent of a small one is less than what 8 bits round it by."""
    weight = deployed.get_submodule(LAYER).weight
    weight.view(-1)[weight.abs().argmax()] *= 1.01


def _no_bias(deployed: nn.Module) -> None:
    deployed.get_submodule(LAYER).bias.zero_()


def wrong_eps(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eps = 1e-3
    return deploy(model, PX)


def _no_relu(deployed: nn.Module) -> None:
    deployed.set_submodule(LAYER.replace("pw1", "act"), nn.Identity())


class _WrongAxes(DeployedSHSA):
    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=self.eps)


def _wrong_axes(deployed: nn.Module) -> None:
    for module in deployed.modules():
        if isinstance(module, DeployedSHSA):
            module.__class__ = _WrongAxes


WEIGHT_DEFECTS: dict[str, ModelDefect] = {
    "channels swapped": _of_deployed(_swapped),
    "one weight off by 1 %": _of_deployed(_one_weight),
    "a bias dropped": _of_deployed(_no_bias),
    "BatchNorm's eps wrong": wrong_eps,
}
GRAPH_DEFECTS: dict[str, ModelDefect] = {
    "a ReLU missing": _of_deployed(_no_relu),
    "the norm over the wrong axes": _of_deployed(_wrong_axes),
    "logits given as probabilities": lambda model: Probabilities(deploy(model, PX)).eval(),  # under the logits' name
}


# --- defects of an ONNX file, of which an OpenVINO IR can be made too -------------------------------------------------

OnnxDefect = Callable[[Any], None]
"""Changes a file's protobuf in place."""


def node_of(proto: Any, name: str) -> Any:
    return next(node for node in proto.graph.node if node.name == name)


def maker_of(proto: Any, value: str) -> Any:
    return next(node for node in proto.graph.node if value in node.output)


def edit(proto: Any, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """An initializer, whose type is kept."""
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    value = onnx.numpy_helper.to_array(tensor)
    changed = np.asarray(change(value.copy())).astype(value.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(changed, name))


def with_weights(proto: Any, deployed: nn.Module) -> None:
    """Puts a deployed model's weights into a float file."""
    for name, layer in layers(deployed):
        node = node_of(proto, name)
        for value, tensor in zip(node.input[1:], (layer.weight, layer.bias), strict=True):
            edit(proto, value, lambda _, tensor=tensor: tensor.detach().numpy())


def onnx_without_bias(proto: Any) -> None:
    del node_of(proto, LAYER).input[2:]


def onnx_without_relu(proto: Any) -> None:
    relu = next(node for node in proto.graph.node if node.name.startswith(LAYER.replace("pw1", "act")))
    for node in proto.graph.node:
        for index, value in enumerate(node.input):
            if value == relu.output[0]:
                node.input[index] = relu.input[0]
    proto.graph.node.remove(relu)


def onnx_wrong_axes(proto: Any) -> None:
    norms = [node for node in proto.graph.node if node.op_type == "LayerNormalization"]
    for name in {node.input[1] for node in norms}:
        edit(proto, name, lambda scale: scale[0, 0])
    for node in norms:
        next(each for each in node.attribute if each.name == "axis").i = -1


def onnx_softmax(proto: Any) -> None:
    """A softmax behind what the file gives."""
    (output,) = proto.graph.output
    before = f"{output.name}/{len(proto.graph.node)}"
    maker_of(proto, output.name).output[0] = before
    proto.graph.node.append(onnx.helper.make_node("Softmax", [before], [output.name], before, axis=1))


def onnx_normalization(mean: Sequence[float], std: Sequence[float]) -> OnnxDefect:
    """The file normalizes with these constants."""

    def change(proto: Any) -> None:
        shape = lambda values: np.array(values).reshape(-1, 1, 1)  # noqa: E731
        edit(proto, "model.scale", lambda _: shape([1 / (255 * s) for s in std]))
        edit(proto, "model.shift", lambda _: shape([-m / s for m, s in zip(mean, std, strict=True)]))

    return change


ONNX_GRAPH_DEFECTS: dict[str, OnnxDefect] = {
    "a bias left out": onnx_without_bias,
    "a ReLU missing": onnx_without_relu,
    "the norm over the wrong axes": onnx_wrong_axes,
    "logits given as probabilities": onnx_softmax,
}


def around(proto: Any) -> tuple[Any, Any, Any]:
    """QuantizeLinear and DequantizeLinear of what goes into `LAYER`, and the latter of its weights."""
    layer = node_of(proto, LAYER)
    read, weights = (maker_of(proto, value) for value in layer.input[:2])
    return maker_of(proto, read.input[0]), read, weights


def own(proto: Any, node: Any, index: int) -> str:
    """An input of a node that no other node has: a copy of the initializer in its place."""
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == node.input[index])
    copied = proto.graph.initializer.add()
    copied.CopyFrom(tensor)
    copied.name = f"{tensor.name}/{node.name}"
    node.input[index] = copied.name
    return copied.name


def onnx_scale(*where: str, index: int = 1) -> OnnxDefect:
    """Doubles scales, or with `index` 2 moves zero points by one: of weights, rounding or reading."""

    def change(proto: Any) -> None:
        nodes = dict(zip(("rounding", "reading", "weights"), around(proto), strict=True))
        for place in where:
            name = own(proto, nodes[place], index)
            if index == 1:
                edit(proto, name, lambda scale: np.where(np.arange(scale.size) == 1, 2, 1) * scale
                     if scale.ndim else 2 * scale)  # fmt: skip
            else:
                edit(proto, name, lambda zero: np.where(zero < 127, zero + 1, zero - 1))

    return change


def onnx_scale_everywhere(proto: Any) -> None:
    """Also of the bias, so that all of them belong together."""
    onnx_scale("rounding", "reading")(proto)
    layer = node_of(proto, LAYER)
    bias = maker_of(proto, layer.input[2])
    edit(proto, own(proto, bias, 1), lambda scale: 2 * scale)
    edit(proto, own(proto, bias, 0), lambda levels: np.round(levels / 2))


SCALE_DEFECTS: dict[str, OnnxDefect] = {
    "a weight channel's scale doubled": onnx_scale("weights"),
    "a scale doubled in rounding": onnx_scale("rounding"),
    "a scale doubled in reading": onnx_scale("reading"),
    "a scale doubled in both": onnx_scale("rounding", "reading"),
    "a scale doubled in both and the bias": onnx_scale_everywhere,
    "a weights' zero point off by one": onnx_scale("weights", index=2),
    "a zero point off by one in rounding": onnx_scale("rounding", index=2),
    "a zero point off by one in reading": onnx_scale("reading", index=2),
    "a zero point off by one in both": onnx_scale("rounding", "reading", index=2),
}


# --- defects of what a file says of itself ----------------------------------------------------------------------------


def spec_defects(spec: Spec) -> dict[str, Spec]:
    """Wrong preprocessing in a file's metadata."""
    other = "bilinear" if spec.interpolation != "bilinear" else "bicubic"
    return {
        "said: channels swapped": replace(spec, mean=spec.mean[::-1], std=spec.std[::-1]),
        "said: mean wrong": replace(spec, mean=(0.5,) * 3),
        "said: std wrong": replace(spec, std=(0.5,) * 3),
        "said: off by 2 gray levels": replace(spec, mean=tuple(each + 2 / 255 for each in spec.mean)),
        "said: another filter": replace(spec, interpolation=other),
        "said: crop_pct ignored": replace(spec, crop_pct=1.0),
    }


def inner_spec_defects(spec: Spec) -> dict[str, Spec]:
    """Wrong constants in a file that normalizes pixels itself."""
    return {
        "inside: channels swapped": replace(spec, mean=spec.mean[::-1], std=spec.std[::-1]),
        "inside: mean wrong": replace(spec, mean=(0.5,) * 3),
        "inside: std wrong": replace(spec, std=(0.5,) * 3),
        "inside: off by 2 gray levels": replace(spec, mean=tuple(each + 2 / 255 for each in spec.mean)),
    }


# --- defects of a Core ML package -------------------------------------------------------------------------------------


def coreml_scale(*where: str, zero_point: bool = False) -> Callable[[Path], None]:
    """As `onnx_scale`, of a package in 8 bits, in place."""

    def change(package: Path) -> None:
        folder = package / "Data" / "com.apple.CoreML"
        proto = Model_pb2.Model()
        proto.ParseFromString((folder / "model.mlmodel").read_bytes())
        main = proto.mlProgram.functions["main"]
        makers = {op.outputs[0].name: op for op in main.block_specializations[main.opset].operations}
        layer = next(op for op in makers.values() if _coreml_name(op) == LAYER)
        weights = makers[layer.inputs["weight"].arguments[0].name]
        if "weights" in where:
            _change_blob(folder / "weights" / "weight.bin", weights, zero_point)
            return
        reading = makers[layer.inputs["x"].arguments[0].name]
        rounding = makers[reading.inputs["input"].arguments[0].name]
        for place, op in (("rounding", rounding), ("reading", reading)):
            if place in where:
                name = op.inputs["zero_point" if zero_point else "scale"].arguments[0].name
                tensor = makers[name].attributes["val"].immediateValue.tensor
                dtype = np.uint8 if zero_point else np.float16
                value = np.frombuffer(tensor.bytes.values, dtype)
                tensor.bytes.values = (value + 1 if zero_point else 2 * value).astype(dtype).tobytes()
        (folder / "model.mlmodel").write_bytes(proto.SerializeToString())

    return change


def _coreml_name(op: Any) -> str:
    return "".join(op.attributes["name"].immediateValue.tensor.strings.values) if "name" in op.attributes else ""


def _change_blob(path: Path, weights: Any, zero_point: bool) -> None:
    """Of the second channel; a blob begins with where its data is."""
    blob = bytearray(path.read_bytes())
    at = weights.attributes["zero_point" if zero_point else "scale"].blobFileValue.offset
    (data,) = struct.unpack_from("<Q", blob, at + 16)
    dtype = np.int8 if zero_point else np.float16
    values = np.frombuffer(blob, dtype, 2, data)
    values[1] = values[1] + 1 if zero_point else 2 * values[1]
    path.write_bytes(blob)


COREML_WEIGHT_DEFECTS = {
    "a weight channel's scale doubled": coreml_scale("weights"),
    "a weights' zero point off by one": coreml_scale("weights", zero_point=True),
}
COREML_SCALE_DEFECTS = {
    **COREML_WEIGHT_DEFECTS,
    "a scale doubled in rounding": coreml_scale("rounding"),
    "a scale doubled in reading": coreml_scale("reading"),
    "a scale doubled in both": coreml_scale("rounding", "reading"),
    "a zero point off by one in rounding": coreml_scale("rounding", zero_point=True),
    "a zero point off by one in reading": coreml_scale("reading", zero_point=True),
    "a zero point off by one in both": coreml_scale("rounding", "reading", zero_point=True),
}


# --- models whose float16 overflows -----------------------------------------------------------------------------------


@torch.no_grad()
def overflowing(model: nn.Module) -> nn.Module:
    """The same function, with numbers up to 100 thousand between its first two layers, which float16 has not."""
    model = copy.deepcopy(model)
    first, _, second, _, third = model.patch_embed[:5]
    for norm, factor in ((first.bn, 2.0**15), (second.bn, 2.0**7)):
        norm.weight *= factor
        norm.bias *= factor
    second.c.weight /= 2.0**15
    third.c.weight /= 2.0**7
    return model


# --- files ------------------------------------------------------------------------------------------------------------


KEPT = 14


class Workshop:
    """Writes sound and defective files of one model, each float graph only once.

    Args:
        images: to verify with; the reference is this model on them.
    """

    def __init__(self, folder: Path, classes: int = 10, images: int = 26, seed: int = 0):
        self.folder = folder
        training = draw_images(folder / "train", classes, max(128, 2 * classes), seed=1)
        self.model, plain = trained(classes, training, seed, steps=max(40, classes // 5))
        self.spec = replace(plain, uint8_input=True)
        drawn = draw_images(folder / "val", classes, images, seed=2)
        calibration = draw_images(folder / "calibration", classes, max(64, min(classes, 256)), seed=3)
        self.source = source_of(self.model, self.spec, drawn, calibration)
        self.count = 0
        self.made: dict[Any, Any] = {}

    @property
    def reference(self) -> Reference:
        return self.source.reference

    def kept(self) -> tuple[str, ...]:
        """Layers that stay in float, so that noise is well within its bound on any machine; none that is tried."""
        noisy = [name for name in self.source.noise(True) if not name.startswith(LAYER.removesuffix("pw1"))]
        return tuple(dict.fromkeys((*BACKENDS["onnx"].float_layers(self.source.deployed()), *noisy[:KEPT])))

    def path(self, suffix: str) -> Path:
        self.count += 1
        return self.folder / f"{self.count}{suffix}"

    def float_graph(self, form: str) -> Any:
        """The protobuf that the writers make: fp32, fp16, or unfolded, which int8 is made from."""
        if form not in self.made:
            self.made[form] = self._float_graph(form)
        return self.made[form]

    def _float_graph(self, form: str) -> Any:
        model = self.source.unfolded() if form == "unfolded" else self.source.deployed()
        path = self.path(".onnx")
        precision: Precision = "fp16" if form == "fp16" else "fp32"
        write_onnx(model, path, replace(self.spec, precision=precision))  # an open batch takes twice as long to trace
        return onnx.load(path)

    def onnx(
        self,
        precision: Precision,
        before: OnnxDefect = lambda proto: None,
        after: OnnxDefect = lambda proto: None,
        weights: ModelDefect | None = None,
        ranges: Mapping[str, LayerRanges] | None = None,
        labels: Sequence[str] | None = None,
        spec: Spec | None = None,
    ) -> Path:
        """An ONNX file.

        Args:
            before: changes the float graph.
            after: changes the file.
            weights: gives the weights of the float graph.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self.float_graph({"fp16": "fp16", "int8": "unfolded"}.get(precision, "fp32")))
        if weights is not None:
            deployed = weights(self.model)
            with_weights(proto, unfold_like(deployed, self.source.unfolded()) if precision == "int8" else deployed)
        before(proto)
        del proto.graph.value_info[:]
        labels = self.source.labels if labels is None else labels
        path, spec = self.path(".onnx"), replace(spec or self.spec, precision=precision)
        if precision == "int8":
            spec = replace(spec, excluded_layers=self.kept())
            quantized = quantize_onnx(proto, spec, self.source.ranges() if ranges is None else ranges)
            save_onnx(quantized.proto, path, spec, labels, quantized.ranges)
        else:
            save_onnx(proto, path, spec, labels)
        proto = onnx.load(path)
        after(proto)
        onnx.save(proto, path)
        return path

    def openvino(self, precision: Precision, onnx_file: Path, labels: Sequence[str] | None = None) -> Path:
        """An IR made of an ONNX file."""
        path = self.path(".xml")
        spec = replace(load_artifact(onnx_file, 1).spec, precision=precision)
        write_openvino(onnx_file, path, spec, self.source.labels if labels is None else labels)
        return path

    def coreml(
        self,
        precision: Precision,
        deployed: nn.Module | None = None,
        spec: Spec | None = None,
        labels: Sequence[str] = (),
    ) -> Path:
        """A package."""
        path, spec = self.path(".mlpackage"), replace(spec or self.spec, precision=precision)
        deployed = self.source.deployed() if deployed is None else deployed
        calibration = list(self.source.calibration_pixels()) if precision == "w8a8" else []
        write_coreml(deployed, path, spec, labels=labels or self.source.labels, calibration=calibration)
        return path

    def two_classes(self, precision: Precision) -> tuple[Path, Reference]:
        """A sound ONNX file of the model with the first two of its classes, and what it is held against."""
        model = copy.deepcopy(self.model)
        linear = model.head.l
        linear.weight, linear.bias = (nn.Parameter(each.detach()[:2].clone()) for each in (linear.weight, linear.bias))
        spec, labels = replace(self.spec, num_classes=2), self.source.labels[:2]
        reference = replace(self.reference, model=model, spec=spec, labels=labels, _outputs={})

        def smaller(proto: Any) -> None:
            proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2

        weights = lambda _: deploy(model, PX)  # noqa: E731
        return self.onnx(precision, smaller, weights=weights, labels=labels, spec=spec), reference

    def defective(self, kind: str, precision: Precision, defect: str) -> tuple[Artifact | Path, Reference]:
        """A file with one deliberate defect, and what it is held against."""
        reference, labels = self.reference, [*self.source.labels[1:], self.source.labels[0]]
        if defect.startswith("said: "):
            sound = load_artifact(self.sound(kind, precision), 1, rounded=True)
            return replace(sound, spec=spec_defects(sound.spec)[defect]), reference
        if defect == "labels permuted":
            if kind == "coreml":
                return self.coreml(precision, labels=labels), reference
            path = self.onnx(onnx_precision(kind, precision), labels=labels)
            return (path if kind == "onnx" else self.openvino(precision, path, labels)), reference
        if defect == "float16 overflows":
            reference = replace(reference, model=overflowing(self.model), _outputs={})
            if kind == "coreml":
                return self.coreml(precision, deploy(reference.model, PX)), reference
            path = self.onnx(onnx_precision(kind, precision), weights=lambda _: deploy(reference.model, PX))
            return (path if kind == "onnx" else self.openvino(precision, path)), reference
        if defect == "a softmax twice":
            return self._softmax_twice(kind, precision)
        if kind == "coreml":
            return self._coreml_defect(precision, defect), reference
        path = self._onnx_defect(onnx_precision(kind, precision), defect)
        return (path if kind == "onnx" else self.openvino(precision, path)), reference

    def sound(self, kind: str, precision: Precision) -> Path:
        """A file without a defect, written by the same steps."""
        if (kind, precision) not in self.made:
            self.made[kind, precision] = self._sound(kind, precision)
        return self.made[kind, precision]

    def _sound(self, kind: str, precision: Precision) -> Path:
        if kind == "coreml":
            return self.coreml(precision)
        path = self.onnx(onnx_precision(kind, precision))
        return path if kind == "onnx" else self.openvino(precision, path)

    def _onnx_defect(self, precision: Precision, defect: str) -> Path:
        if defect in WEIGHT_DEFECTS:
            return self.onnx(precision, weights=WEIGHT_DEFECTS[defect])
        if defect in SCALE_DEFECTS:
            return self._changed(precision, SCALE_DEFECTS[defect])
        if defect.startswith("inside: "):
            wrong = inner_spec_defects(self.spec)[defect]
            return self._changed(precision, onnx_normalization(wrong.mean, wrong.std))
        ranges = dict(self.source.ranges()) if precision == "int8" else None
        if ranges is not None and defect == "a ReLU missing":  # learned with the ReLU they would cut off what it does
            ranges = self._ranges_without_relu()
        place = "after" if defect == "logits given as probabilities" else "before"
        return self.onnx(precision, ranges=ranges, **{place: ONNX_GRAPH_DEFECTS[defect]})

    def _ranges_without_relu(self) -> dict[str, LayerRanges]:
        wrong = unfold_like(GRAPH_DEFECTS["a ReLU missing"](self.model), self.source.unfolded())
        return activation_ranges(wrong, [self.spec.normalize(self.source.calibration_pixels())])

    def _changed(self, precision: Precision, change: OnnxDefect) -> Path:
        """The sound ONNX file, changed."""
        proto, path = onnx.load(self.sound("onnx", precision)), self.path(".onnx")
        change(proto)
        onnx.save(proto, path)
        return path

    def _coreml_defect(self, precision: Precision, defect: str) -> Path | Artifact:
        if defect.startswith("inside: "):
            path = self.coreml(precision, spec=inner_spec_defects(self.spec)[defect])
            opened = load_artifact(path, 1)
            said = replace(self.spec, precision=precision)
            return replace(opened, spec=said)
        if defect in {**WEIGHT_DEFECTS, **GRAPH_DEFECTS}:
            return self.coreml(precision, {**WEIGHT_DEFECTS, **GRAPH_DEFECTS}[defect](self.model))
        path = self.path(".mlpackage")
        shutil.copytree(self.sound("coreml", precision), path)
        COREML_SCALE_DEFECTS[defect](path)
        return path

    def _softmax_twice(self, kind: str, precision: Precision) -> tuple[Path, Reference]:
        reference = replace(self.reference, model=Probabilities(self.model).eval(), _outputs={})
        spec = replace(self.spec, precision=precision, outputs=("probabilities",))
        if kind == "coreml":
            return self.coreml(precision, Probabilities(Probabilities(self.source.deployed())).eval(), spec), reference

        def twice(proto: Any) -> None:
            for _ in range(2):
                onnx_softmax(proto)
            last = maker_of(proto, proto.graph.output[0].name)
            last.output[0] = proto.graph.output[0].name = "probabilities"
            for each in proto.metadata_props:
                if each.key == SPEC_KEY:
                    each.value = replace(spec_from(metadata(proto), Path()), outputs=("probabilities",)).to_json()

        path = self.onnx(onnx_precision(kind, precision), after=twice)
        return (path if kind == "onnx" else self.openvino(precision, path)), reference


def onnx_precision(kind: str, precision: Precision) -> Precision:
    """Of the ONNX file that a file of this format is made from."""
    return precision if kind == "onnx" or precision == "int8" else "fp32"


def unfold_like(deployed: nn.Module, unfolded: nn.Module) -> nn.Module:
    """Takes the identity out of the same convolutions as the sound model's."""
    deployed = copy.deepcopy(deployed)
    for name, module in unfolded.named_modules():
        if isinstance(module, Unfolded):
            deployed.set_submodule(name, Unfolded(deployed.get_submodule(name)))
    return deployed


# --- the verdict ------------------------------------------------------------------------------------------------------


def judged(artifact: Artifact | Path, reference: Reference) -> tuple[str, str]:
    """passed, refused or undecided, and what it was refused by."""
    try:
        opened = load_artifact(artifact, 1, rounded=True) if isinstance(artifact, Path) else artifact
        certificate = certify(opened, reference)
    except CheckFailed as error:
        return "refused", str(error)
    return certificate.verdict, "; ".join(certificate.reasons)
