"""A deployed model as a Core ML package (ML Program, iOS 16 and later)."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shvit.errors import CheckFailed

from .onnx import INPUT, OUTPUT, describe, quiet
from .spec import Spec


class Normalized(nn.Module):
    """The model behind its own normalisation: takes RGB in 0–1, as Core ML's image input gives it at scale 1/255."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: nn.Module, spec: Spec):
        super().__init__()
        self.model = model
        std = torch.tensor(spec.std)
        self.register_buffer("scale", (1 / std)[:, None, None])
        self.register_buffer("shift", (-torch.tensor(spec.mean) / std)[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x * self.scale + self.shift)


def write_coreml(model: nn.Module, path: Path, spec: Spec) -> None:
    """Exports `model`, already deployed, with an RGB image input `image` and an output `logits` (1, classes), float32.

    The image is grey for a model of one channel. Mean and standard deviation are inside the graph. The package carries
    its `Spec` and versions.

    Args:
        model: in eval mode.
        path: a folder name ending in .mlpackage; the caller moves it into place.

    Raises:
        CheckFailed: the package, read back, is not what was asked for.
    """
    with quiet():
        import coremltools as ct

        with torch.no_grad():
            traced = torch.jit.trace(Normalized(model, spec).eval(), torch.rand(1, *spec.shape))
        colors = ct.colorlayout.GRAYSCALE if spec.in_chans == 1 else ct.colorlayout.RGB
        image = ct.ImageType(name=INPUT, shape=(1, *spec.shape), scale=1 / 255, color_layout=colors)
        package = ct.convert(
            traced,
            inputs=[image],
            outputs=[ct.TensorType(name=OUTPUT)],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32,
            convert_to="mlprogram",
        )
        for key, value in describe(spec).items():
            package.user_defined_metadata[key] = value
        package.short_description = f"{spec.model}, {spec.img_size} px, {spec.num_classes} classes"
        package.license = describe(spec)["license"]
        package.save(str(path))
    check_structure(model, path, spec)


def check_structure(model: nn.Module, path: Path, spec: Spec) -> dict[str, Any]:
    """Reads a package back and compares it with what it was made from; it is not run.

    Returns:
        Operator counts, the number of weights and the input, as found in the file.

    Raises:
        CheckFailed: the input, the output, the number of convolutions or the number of weights is not right.
    """
    with quiet():
        import coremltools as ct

        proto = ct.models.MLModel(str(path), skip_model_load=True).get_spec()
    source, target = proto.description.input[0], proto.description.output[0]
    operations = _operations(proto)
    counts = Counter(operation.type for operation in operations)
    found = {
        "input": [source.name, source.type.imageType.width, source.type.imageType.height],
        "output": [target.name, *target.type.multiArrayType.shape],
        "convolutions": counts["conv"],
        "weights": _weights(operations),
    }
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    expected = {
        "input": [INPUT, spec.img_size, spec.img_size],
        "output": [OUTPUT, 1, spec.num_classes],
        "convolutions": len(convolutions),
        "weights": sum(module.weight.numel() for module in convolutions),
    }
    wrong = [name for name in expected if expected[name] != found[name]]
    if wrong:
        differences = "; ".join(f"{name} is {found[name]} and should be {expected[name]}" for name in wrong)
        raise CheckFailed(f"the Core ML package is not what was asked for: {differences}", {"found": found})
    return {**found, "operators": {name: n for name, n in counts.most_common() if name != "const"}}


def _operations(proto: Any) -> list[Any]:
    function = proto.mlProgram.functions["main"]
    return list(function.block_specializations[function.opset].operations)


def _weights(operations: list[Any]) -> int:
    """The number of values in the convolutions' kernels."""
    sizes = {}
    for operation in operations:
        if operation.type == "const":
            shape = [dim.constant.size for dim in operation.outputs[0].type.tensorType.dimensions]
            sizes[operation.outputs[0].name] = int(torch.Size(shape).numel())
    kernels = [operation.inputs["weight"].arguments[0].name for operation in operations if operation.type == "conv"]
    return sum(sizes[name] for name in kernels)
