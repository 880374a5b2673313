"""Trained tiny models, images of classes that they can tell apart, and files of both, sound and defective."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from conftest import settle
from PIL import Image
from torch import nn

from shvit.deploy import DeployedSHSA, deploy
from shvit.errors import CheckFailed
from shvit.export.formats import SUFFIXES, Format, Options, Source, _writer, float_layers
from shvit.export.forms import Probabilities, layers
from shvit.export.photographs import Photograph
from shvit.export.runtimes import Artefact, open_artefact
from shvit.export.spec import Precision, Spec
from shvit.export.verify import Reference, certify
from shvit.train.data import open_image

PX = 64
SIDES = (72, 80)
CELLS = 6  # of a class's pattern in each direction


def draw_images(folder: Path, classes: int, count: int, seed: int = 0) -> list[Photograph]:
    """Images of `classes` coarse random patterns in turn, each with a pattern of its own added, and their classes."""
    folder.mkdir(parents=True)
    patterns = np.random.default_rng(1000).normal(0, 38, (classes, CELLS, CELLS, 3))
    rng = np.random.default_rng(seed)
    drawn = []
    for index in range(count):
        label = index % classes
        cells = 120 + patterns[label] + rng.normal(0, 20, (CELLS, CELLS, 3)) + rng.normal(0, 15, 3)
        image = Image.fromarray(cells.clip(0, 255).astype(np.uint8)).resize(SIDES[::-1], Image.Resampling.BICUBIC)
        grain = np.asarray(image) + rng.normal(0, 6, (*SIDES, 3))
        path = folder / f"{index:05}.png"
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
        drawn.append(Photograph(path, label))
    return drawn


def read(drawn: Sequence[Photograph], spec: Spec) -> torch.Tensor:
    """As timm's transform gives them: (n, C, H, W)."""
    transform = spec.transform()
    return torch.stack([transform(open_image(each.path)) for each in drawn])


def trained(classes: int, drawn: Sequence[Photograph], seed: int = 0, steps: int = 40) -> tuple[nn.Module, Spec]:
    """A tiny SHViT that was trained on the images for a few seconds, and its spec."""
    torch.manual_seed(seed)
    model = timm.create_model("tiny_vit", num_classes=classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.weight.abs().max() == 0:
            nn.init.constant_(module.weight, 0.3)  # residual branches that begin at zero learn slowly
    spec = Spec.of("tiny_vit", model, PX)
    images, labels = read(drawn, spec), torch.tensor([each.label for each in drawn])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randperm(len(images))[:32]
        loss = nn.functional.cross_entropy(model.train()(images[chosen]), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return settle(model, images[:256]), spec


def source_of(model: nn.Module, spec: Spec, drawn: Sequence[Photograph], calibration: Sequence[Photograph]) -> Source:
    """What files are made from; the weights count as a checkpoint's."""
    labels = [f"class {index}" for index in range(spec.num_classes)]
    reference = Reference(model, spec, drawn, "drawn", labels, checkpoint=Path(__file__))
    return Source(reference, spec, calibration)


def write(source: Source, folder: Path, kind: Format, precision: Precision, **options: bool) -> Path:
    """A file as `formats.export` writes it, without the verdict and the search of int8."""
    spec = replace(source.spec, precision=precision)
    kept = float_layers(kind, source.deployed()) if precision == "int8" else ()
    path = folder / f"{precision}{SUFFIXES[kind]}"
    folder.mkdir(parents=True, exist_ok=True)
    _writer(kind, replace(source, spec=spec), Options(**options))(path, replace(spec, kept=kept))
    return path


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
    "logits given as probabilities": lambda model: Probabilities(deploy(model, PX)),
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
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(change(value.copy())).astype(value.dtype), name))


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
    maker_of(proto, output.name).output[0] = "before"
    proto.graph.node.append(onnx.helper.make_node("Softmax", ["before"], [output.name], "last", axis=1))


def onnx_normalisation(mean: Sequence[float], std: Sequence[float]) -> OnnxDefect:
    """The file normalises with these constants."""

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
        "said: off by 2 grey levels": replace(spec, mean=tuple(each + 2 / 255 for each in spec.mean)),
        "said: another filter": replace(spec, interpolation=other),
        "said: crop_pct ignored": replace(spec, crop_pct=1.0),
    }


def inner_spec_defects(spec: Spec) -> dict[str, Spec]:
    """Wrong constants in a file that normalises pixels itself."""
    return {
        "inside: channels swapped": replace(spec, mean=spec.mean[::-1], std=spec.std[::-1]),
        "inside: mean wrong": replace(spec, mean=(0.5,) * 3),
        "inside: std wrong": replace(spec, std=(0.5,) * 3),
        "inside: off by 2 grey levels": replace(spec, mean=tuple(each + 2 / 255 for each in spec.mean)),
    }


# --- the verdict ------------------------------------------------------------------------------------------------------


def judged(artefact: Artefact | Path, reference: Reference) -> tuple[str, str]:
    """passed, refused or undecided, and what it was refused by."""
    try:
        opened = open_artefact(artefact, 1, rounded=True) if isinstance(artefact, Path) else artefact
        certificate = certify(opened, reference)
    except CheckFailed as error:
        return "refused", str(error)
    return certificate.verdict, "; ".join(certificate.reasons)
