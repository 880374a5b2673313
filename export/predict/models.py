"""What predicts: a checkpoint's model or an exported file, as one function from pixels to arrays."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from shvit.deployment import deploy
from shvit.errors import InputError
from shvit.files import sha256
from shvit.img_size import ImgSizeLike
from shvit.weights.resolve import Log, Weights

from ..backends.registry import artifact_sha256, load_artifact, refuse_changed
from ..guards import rows_that_fit
from ..labels import known_classes
from ..spec import Spec, open_weights
from ..wrappers import Pooled, feature_maps, run_model, with_predictions

Features = Literal["pooled", "maps"]
Kind = Literal["classes", "labels", "value", "features"]
"""What is predicted of an image: its most probable classes, the labels that it has, a value, or arrays."""
Run = Callable[[torch.Tensor], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class LoadedModel:
    """A function from images to probabilities, a value or features, and what identifies it."""

    name: str
    """Name in messages."""
    spec: Spec
    sha256: str
    """Hash of the weights, or of the exported file."""
    classes: tuple[str, ...]
    """Names of the classes, by index; their indices where no names are known. Empty for features."""
    run: Run
    """From pixels (B, C, H, W) to the float32 outputs: probabilities (B, classes), values (B, 1), or an array for each
    of `shapes`."""
    shapes: dict[str, tuple[int, ...]]
    """Name and shape, for one image, of each array of features; empty for all else."""

    def __call__(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return the outputs for images; raise InputError where they are not finite."""
        parts = [self.run(part) for part in pixels.split(rows_that_fit(len(pixels), self.spec))]
        outputs = [torch.cat([part.float() for part in each]) for each in zip(*parts, strict=True)]
        if not all(torch.isfinite(output).all() for output in outputs):
            raise InputError(f"{self.name}: its outputs are not finite, so that they predict nothing; its weights are "
                             "damaged, or its training diverged")  # fmt: skip
        return outputs

    def kind(self, top: int) -> Kind:
        """Return what it predicts where the `top` most probable classes are asked for, or none of them."""
        if self.shapes:
            return "features"
        if self.spec.task == "regression":
            return "value"
        return "classes" if top else "labels"

    def identity(self) -> dict[str, Any]:
        """Return what predictions depend on, as plain values, by what messages call them."""
        names = hashlib.sha256("\0".join(self.classes).encode()).hexdigest()
        preprocessing = asdict(self.spec)
        task, thresholds = preprocessing.pop("task"), preprocessing.pop("thresholds")
        return {"weights": self.sha256, "preprocessing": preprocessing, "task": task, "thresholds": thresholds,
                "names of classes": names,
                "features": {name: list(shape) for name, shape in self.shapes.items()}}  # fmt: skip


# --- checkpoints ------------------------------------------------------------------------------------------------------


def open_checkpoint(weights: Weights, img_size: ImgSizeLike | None, features: Features | None, log: Log) -> LoadedModel:
    """Return a model with trained weights, in its inference form.

    Raises:
        InputError: as `open_weights`, or the model has no such features.
    """
    assert weights.checkpoint is not None
    model, spec = open_weights(weights, img_size, features is None, log)
    name = weights.name or weights.model
    wrapped, outputs = _wrap(name, model, spec, features)
    deployed = deploy(wrapped.eval(), spec.img_size)
    classes = () if features else _class_names(known_classes(weights, spec, log), spec)

    def run(pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        return run_model(deployed, spec.normalize(pixels))

    return _loaded(name, spec, sha256(weights.checkpoint), classes, run, outputs)


def _wrap(name: str, model: nn.Module, spec: Spec, features: Features | None) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model with what is asked for as its outputs, and the names of its features."""
    if features is None:
        return with_predictions(model, spec, softmax=True)[0], ()
    if features == "maps":
        maps, names = feature_maps(name, model)
        unique = len({*names}) == len(names)  # a ViT's stages all have one stride
        return maps, names if unique else tuple(f"{each}_{stage}" for stage, each in enumerate(names))
    if not hasattr(model, "forward_head"):
        raise InputError(f"{name} has no pooled features; leave out --features")
    return Pooled(model), ("embedding",)


def _class_names(known: Sequence[str], spec: Spec) -> tuple[str, ...]:
    return tuple(known) if len(known) == spec.num_classes else tuple(map(str, range(spec.num_classes)))


def _loaded(
    name: str, spec: Spec, digest: str, classes: tuple[str, ...], run: Run, features: Sequence[str]
) -> LoadedModel:
    """Return a loaded model; the shapes of its features are those of a black image."""
    if not features:
        return LoadedModel(name, spec, digest, classes, run, {})
    outputs = run(torch.zeros(1, *spec.shape, dtype=spec.pixels.dtype))
    return LoadedModel(name, spec, digest, (), run, {
        key: tuple(output.shape[1:]) for key, output in zip(features, outputs, strict=True)
    })  # fmt: skip


# --- artifacts --------------------------------------------------------------------------------------------------------


def open_artifact(path: Path, features: Features | None) -> LoadedModel:
    """Return an exported file.

    Raises:
        InputError: as `load_artifact`, or the file's outputs are others than those that are asked for.
        CheckFailed: the file is not the one that its certificate describes.
    """
    refuse_changed(path)
    artifact = load_artifact(path)
    spec = artifact.spec
    if features is None and spec.output_kind == "features":
        raise InputError(f"{path} gives feature maps; add --features maps, or export it with logits")
    if features is not None and spec.output_kind != "features":
        raise InputError(f"{path} gives {spec.output_kind}; for features give its --checkpoint, or a file that was "
                         "exported with --features")  # fmt: skip
    if features == "pooled":
        raise InputError(f"{path} gives feature maps, which are not pooled; take --features maps")

    def run(pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        outputs = [output.float() for output in artifact.run(spec.feed(pixels))]
        return [output.softmax(dim=1) for output in outputs] if spec.output_kind == "logits" else outputs

    classes = () if features else _class_names(artifact.labels, spec)
    return _loaded(str(path), spec, artifact_sha256(path), classes, run, spec.outputs if features else ())
