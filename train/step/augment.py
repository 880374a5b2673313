"""Augmentation by timm: of each image in a worker, and of a batch on the device."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import Grayscale
from torchvision.transforms import functional as F

from shvit.errors import InputError, first_line

from ..data.pixels.fit import check_interpolation, resizing
from ..data.pixels.formats import Decoded
from ..data.pixels.preprocessing import Preprocessing
from ..distributed import World
from ..recipe import Augment, Recipe
from .batch import Batch
from .seeds import MIXING, seed_generators

Transform = Callable[[Decoded], np.ndarray | torch.Tensor]
MAX_OPERATIONS = 16  # of a policy, on one image
TRIALS = 5  # of an augmentation, before it is used


def create_train_transform(augment: Augment, preprocessing: Preprocessing, crop_mode: str | None = None) -> Transform:
    """Create timm's training transform, decoded image → (C, H, W) of its pixels; `DeviceAugment` does the rest.

    Args:
        preprocessing: the evaluation's, with the height and width of the training images.
        crop_mode: the recipe's way of fitting images, which training follows: with squash, crops are distorted as the
            whole image is; with squash or border and a scale of 1, images are whole and fitted as in evaluation.

    Raises:
        InputError: a name is not known, or the policy fails on an image.
    """
    pixels, img_size = preprocessing.pixels, preprocessing.input_size[1:]
    if not pixels.uses_pillow:
        augment = without_color(augment)
        check_interpolation(pixels, "bilinear" if augment.interpolation == "random" else augment.interpolation)
    aspect = img_size[1] / img_size[0]
    counts = re.findall(r"(?:^|-)([nwd])(\d+)", augment.auto_augment or "")
    if any(len(count) > 2 or int(count) > MAX_OPERATIONS for _, count in counts):
        raise InputError(f"--augment.auto-augment {str(augment.auto_augment)[:80]}: more than {MAX_OPERATIONS} "
                         "operations on an image; see recipe s1")  # fmt: skip
    try:
        transform = create_transform(
            (3, *img_size),
            is_training=True,
            use_prefetcher=True,  # bytes, not yet normalized
            scale=augment.scale,
            ratio=(augment.ratio[0] * aspect, augment.ratio[1] * aspect),
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            interpolation=augment.interpolation,
        )
    except Exception as error:  # each policy of timm has its own
        raise InputError(f"--augment.auto-augment {augment.auto_augment} and --augment.interpolation "
                         f"{augment.interpolation} are not known to timm; see recipe s1") from error  # fmt: skip
    for part in transform.transforms:
        for operation in getattr(part, "ops", None) or chain(*getattr(part, "policy", ())):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize
    transform.transforms[:1] = _cropping(augment, preprocessing, crop_mode, transform.transforms[0])
    if pixels.uses_pillow and pixels.in_chans == 1:
        transform.transforms.insert(-1, Grayscale())
    try:
        for _ in range(TRIALS):
            transform(pixels.blank.resize(img_size[::-1]) if isinstance(pixels.blank, Image.Image) else pixels.blank)
    except Exception as error:  # each operation has its own
        raise InputError(f"--augment.auto-augment {augment.auto_augment} cannot be carried out "
                         f"({first_line(error)}); see recipe s1") from error  # fmt: skip
    return transform


def without_color(augment: Augment) -> Augment:
    """Return the augmentation of images that are not in RGB: without policies and jitter, which change colors."""
    return replace(augment, auto_augment=None, color_jitter=0.0)


def _cropping(augment: Augment, preprocessing: Preprocessing, crop_mode: str | None, usual: Any) -> list[Any]:
    """Return the first steps of a training transform; `usual` is timm's random crop."""
    if crop_mode in ("squash", "border") and min(augment.scale) == 1:
        return resizing(preprocessing.pixels, **preprocessing.config)
    return [SquashedCrop(usual.size, usual.scale, usual.ratio, augment.interpolation)
            if crop_mode == "squash" else usual]  # fmt: skip


class SquashedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, of aspect ratios relative to the image's own: it is distorted as the whole image would be."""

    def get_params(  # type: ignore[override]  # timm's is static
        self, img: Any, scale: tuple[float, float], ratio: tuple[float, float]
    ) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a crop."""
        width, height = F.get_image_size(img)
        relative = (width / height) / (self.size[1] / self.size[0])
        return super().get_params(img, scale, (ratio[0] * relative, ratio[1] * relative))


def posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    """Posterize as timm does; 0 bits, which timm's policies ask for and Pillow 13 refuses, give a black image."""
    return auto_augment.posterize(image, bits) if bits > 0 else image.point(lambda value: 0)


class DeviceAugment:
    """Turns bytes into the model's input: normalized, erased and mixed by timm, on the device.

    Returns (images float32 (B, C, H, W), targets: int64 (B,), or float32 (B, targets) where they are vectors or mixed).

    Args:
        dense: targets are vectors: proportions of classes, labels, or values.
    """

    def __init__(
        self, recipe: Recipe, num_classes: int, preprocessing: Preprocessing, world: World, dense: bool = False
    ):
        augment = recipe.augment
        self.device = world.device
        self.memory_format = torch.channels_last if recipe.compute.channels_last else torch.contiguous_format
        self.key = (recipe.seed, MIXING, world.rank)
        self.mean, self.std = (
            preprocessing.pixels.white * torch.tensor(value, device=self.device)[:, None, None]
            for value in (list(preprocessing.mean), list(preprocessing.std))
        )
        self.erase = None
        if augment.random_erasing > 0:
            self.erase = RandomErasing(augment.random_erasing, mode="pixel", device=str(self.device))
        smooths = recipe.task == "classification" and recipe.class_weight is None  # else the loss does, or nothing
        smoothing = augment.smoothing if smooths else 0.0
        self.smoothing = smoothing if dense else 0.0
        self.mix = None
        if recipe.mixes:
            self.mix = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                label_smoothing=0.0 if dense else smoothing,
                num_classes=num_classes,
                multi_label=dense,
            )

    def __call__(self, batch: Batch, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch; this seeds the process's generators for the step, which dropout draws from as well."""
        seed_generators(*self.key, step, micro_step)
        images = batch.images.to(self.device, non_blocking=True).to(torch.float32, memory_format=self.memory_format)
        images = images.sub_(self.mean).div_(self.std)
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.erase is not None:
            images = self.erase(images)
        if self.smoothing:
            targets = (1 - self.smoothing) * targets + self.smoothing / targets.shape[1]
        return self.mix(images, targets) if self.mix is not None else (images, targets)
