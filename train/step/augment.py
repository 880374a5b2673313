"""Augmentation by timm: of each image in a worker, and of a batch on the device."""

import re
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing

from shvit.errors import InputError, first_line
from shvit.img_size import ImgSize

from ..distributed import World
from ..recipe import Augment, Recipe
from .batch import Batch
from .seeds import MIXING, seed_generators

Transform = Callable[[Image.Image], np.ndarray]
MAX_OPERATIONS = 16  # of a policy, on one image
TRIALS = 5  # of an augmentation, before it is used
BLACK = Image.new("RGB", (8, 8))


def create_train_transform(augment: Augment, img_size: ImgSize) -> Transform:
    """Create timm's training transform, PIL RGB image → (3, H, W) uint8; `DeviceAugment` does the rest.

    Raises:
        InputError: a name is not known, or the policy fails on an image.
    """
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
            ratio=augment.ratio,
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
    try:
        for _ in range(TRIALS):
            transform(BLACK.resize((img_size.width, img_size.height)))
    except Exception as error:  # each operation has its own
        raise InputError(f"--augment.auto-augment {augment.auto_augment} cannot be carried out "
                         f"({first_line(error)}); see recipe s1") from error  # fmt: skip
    return transform


def posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    """Posterize as timm does; 0 bits, which timm's policies ask for and Pillow 13 refuses, give a black image."""
    return auto_augment.posterize(image, bits) if bits > 0 else image.point(lambda value: 0)


class DeviceAugment:
    """Turns bytes into the model's input: normalized, erased and mixed by timm, on the device.

    Returns (images float32 (B, 3, H, W), targets: int64 (B,), or float32 (B, targets) where they are vectors or mixed).

    Args:
        dense: targets are vectors: proportions of classes, labels, or values.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        world: World,
        dense: bool = False,
    ):
        augment = recipe.augment
        self.device = world.device
        self.memory_format = torch.channels_last if recipe.compute.channels_last else torch.contiguous_format
        self.key = (recipe.seed, MIXING, world.rank)
        self.mean, self.std = (
            255 * torch.tensor(value, device=self.device)[:, None, None] for value in (list(mean), list(std))
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
