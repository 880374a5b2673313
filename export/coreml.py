"""A deployed model as a Core ML package (ML Program, iOS 16 and later)."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

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

    The image is grey for a model of one channel. Mean and standard deviation are inside the graph, whose weights and
    arithmetic are of `spec.precision`. The package carries its `Spec` and versions.

    Args:
        model: in eval mode.
        path: a folder name ending in .mlpackage; the caller moves it into place.
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
            outputs=[ct.TensorType(name=OUTPUT, dtype=np.float32)],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT16 if spec.precision == "fp16" else ct.precision.FLOAT32,
            convert_to="mlprogram",
        )
        for key, value in describe(spec).items():
            package.user_defined_metadata[key] = value
        package.short_description = f"{spec.model}, {spec.img_size} px, {spec.num_classes} classes"
        package.license = describe(spec)["license"]
        package.save(str(path))
