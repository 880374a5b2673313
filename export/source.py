"""The model from which artifacts are made, and the images to calibrate and verify them with."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from shvit.deployment import deploy
from shvit.img_size import ImgSize, ImgSizeLike
from shvit.weights.resolve import Log, Weights

from .guards import images_that_fit
from .images import BUNDLED, MAX_CALIBRATION, MAX_IMAGES, ImageFile, read_pixels, sample_images, spread
from .labels import find_labels, known_classes
from .quantization.exclusion import layer_noise
from .quantization.qdq import LayerRanges, activation_ranges, unfold_identities
from .quantization.ranges import Range
from .spec import Spec, open_weights
from .verify import Reference
from .wrappers import feature_maps, with_predictions, without_probabilities

RANKED_IMAGES = 8  # images on which layers are ranked by the noise that int8 makes of them
CALIBRATION_BATCH = 8


@dataclass(frozen=True)
class Source:
    """A model from which artifacts are made, and the images to calibrate and verify them with.

    Images are decoded and ranges learned once for all artifacts of a source and its copies by `replace`.
    """

    reference: Reference
    """The model, before deployment, whose outputs the artifact must match; and the images to verify with."""
    spec: Spec  # the artifact's spec
    calibration: Sequence[ImageFile]  # images from which int8's ranges are learned
    _shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.reference.model

    @property
    def labels(self) -> Sequence[str]:
        return self.reference.labels

    @cached_property
    def size(self) -> ImgSize | None:
        """Size that the model is deployed for; None for any."""
        return None if self.spec.other_sizes else self.spec.img_size

    def deployed(self) -> nn.Module:
        """Return the model in its inference form."""
        return self.once(("deployed", self.size), lambda: deploy(self.model, self.size))

    def unfolded(self) -> nn.Module:
        """Return the deployed model with identities unfolded, from which QDQ files in int8 are made."""
        return self.once(("unfolded", self.size), lambda: unfold_identities(self.deployed()))

    def calibration_pixels(self) -> torch.Tensor:
        """Return the pixels of the calibration images, (n, C, H, W)."""
        return self.once(("calibration", self.spec.img_size), lambda: read_pixels(self.calibration, self.spec))

    def ranges(self, symmetric: bool = False) -> dict[str, LayerRanges]:
        """Return the ranges of layers in int8; of formats without a zero point symmetric ones."""
        batches = map(self.spec.normalize, self.calibration_pixels().split(CALIBRATION_BATCH))
        model, key = without_probabilities(self.unfolded()), ("ranges", self.spec.img_size, symmetric)
        return self.once(key, lambda: activation_ranges(model, batches, symmetric))

    def coreml_ranges(self) -> dict[str, Range]:
        """Return the ranges of Core ML's w8a8, by the tensor's first layer, which the first file fills."""
        return self.once(("Core ML", self.spec.uint8_input), dict)

    def noise(self, unfolded: bool) -> dict[str, float]:
        """Return the noise that int8 adds to each layer, the noisiest first."""

        def measure() -> dict[str, float]:
            model = without_probabilities(self.unfolded() if unfolded else self.deployed())
            pixels = self.calibration_pixels()
            return layer_noise(model, self.spec.normalize(pixels[spread(range(len(pixels)), RANKED_IMAGES)]))

        return self.once(("noise", unfolded), measure)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for this key, for any of the copies."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


Outputs = Literal["logits", "probabilities", "features"]
"""What is asked of a classifier; multi-label models and regressions have one kind of predictions."""


def create_source(
    weights: Weights | nn.Module,
    outputs: Outputs = "logits",
    img_size: ImgSizeLike | None = None,
    images: Path | None = None,
    calibration: Path | None = None,
    labels: Path | None = None,
    log: Log = lambda line: None,
) -> Source:
    """Return what artifacts are made from.

    Args:
        weights: result of `resolve_weights`, or a model in memory with the weights that it has.
        img_size: in pixels, one number or (height, width); where None, the one that the model was trained for.
        images: a folder of images to verify with; scikit-image's where None.
        calibration: a folder of images to learn 8-bit ranges from; scikit-image's where None.
        labels: a text file with the name of a class on each line.

    Raises:
        InputError: as `load_weights`, `find_labels` and `sample_images`, or the model has no feature maps.
    """
    model, spec = create_wrapped_model(weights, outputs, img_size, log)
    names: list[str] = []
    if outputs != "features":
        names = find_labels(labels, spec.num_classes, known_classes(weights, spec, log))
        if not names and isinstance(weights, Weights) and weights.checkpoint is not None:
            log(f"{weights.name}: no names of its {spec.num_classes} classes are known, so none are written; give "
                "--labels")  # fmt: skip
    limit = images_that_fit(MAX_CALIBRATION, spec)
    reference = create_reference(weights, model, spec, names, images, images_that_fit(MAX_IMAGES, spec))
    if calibration is None and not spec.pixels.uses_pillow:
        return Source(reference, spec, ())
    return Source(reference, spec, sample_images(calibration, limit=limit, part="train", pixels=spec.pixels))


def create_wrapped_model(
    weights: Weights | nn.Module, outputs: Outputs, img_size: ImgSizeLike | None, log: Log
) -> tuple[nn.Module, Spec]:
    """Return the model with the given outputs, those of its task if it is no classifier, and its spec."""
    if isinstance(weights, Weights):
        name = weights.model
        model, spec = open_weights(weights, img_size, outputs != "features", log)
    else:
        name = getattr(weights, "pretrained_cfg", {}).get("architecture") or type(weights).__name__
        model = copy.deepcopy(weights).eval()
        spec = Spec.of(name, model, img_size)
    if outputs == "features":
        model, names = feature_maps(name, model)
        return model, replace(spec, outputs=names)
    return with_predictions(model, spec, softmax=outputs == "probabilities")


def create_reference(
    weights: Weights | nn.Module,
    model: nn.Module,
    spec: Spec,
    labels: Sequence[str],
    images: Path | None,
    limit: int,
    classes: Sequence[str] = (),
) -> Reference:
    """Return the model on images of a folder, whose folders are named like `classes` where there are no labels.

    Folders tell the one class of an image, and so nothing for other tasks.
    """
    one_of_classes = spec.task == "classification"
    names = (labels or classes) if one_of_classes else ()
    count = spec.num_classes if one_of_classes else 0
    files = sample_images(images, count, limit=limit, classes=names, pixels=spec.pixels)
    source = str(images or BUNDLED)
    if not isinstance(weights, Weights):
        return Reference(model, spec, files, source, labels, in_memory=True)
    data = weights.info.data if weights.info else None
    return Reference(model, spec, files, source, labels, weights.checkpoint, weights.name, weights.ema, data)
