"""What a recipe can say. Recipes themselves are values, in recipes.py."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Data:
    """The photographs."""

    root: Path | None = None
    """A folder with train/ and val/ of class folders, or with class folders alone; elpv-dataset's cells by default."""
    workers: int = 1
    """Processes that read and augment."""


@dataclass(frozen=True)
class Augment:
    """What happens to a training photograph, in timm's terms."""

    scale: tuple[float, float] = (0.35, 1.0)
    """Smallest and largest share of the area that a random crop keeps."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of a top-bottom flip."""
    color_jitter: float = 0.4
    """Strength of random brightness, contrast and saturation."""
    smoothing: float = 0.1
    """Label smoothing."""


@dataclass(frozen=True)
class Optim:
    """AdamW on a cosine schedule with a linear warm-up, updated every step."""

    lr: float = 1e-3
    """Peak learning rate for a batch of 512; scaled linearly by the batch (the reference's rule)."""
    weight_decay: float = 0.025
    """Of weights; norms and biases have none (the reference: 0.025 for S1)."""
    warmup_epochs: int = 1
    """Epochs of linear rise to the peak."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    min_lr: float = 1e-5
    """Learning rate of the last step."""
    clip_grad: float = 0.02
    """Adaptive gradient clipping: largest ratio of a gradient's norm to its weight's (the reference: 0.02)."""


@dataclass(frozen=True)
class Recipe:
    """A training run from scratch."""

    model: str = "shvit_s1"
    """A name that timm knows."""
    img_size: int = 224
    """Height and width in pixels."""
    epochs: int = 300
    """Passes over the training photographs."""
    batch_size: int = 256
    """Photographs in a step."""
    ema_decay: float = 0.999
    """Of the averaged weights for each step, with timm's warm-up."""
    seed: int = 0
    """Of weights, order and augmentation."""
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: `optim.lr` per 512 photographs of a batch."""
        return self.optim.lr * self.batch_size / 512

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, as YAML holds them."""
        plain = asdict(self)
        plain["data"]["root"] = None if self.data.root is None else str(self.data.root)
        plain["augment"]["scale"] = list(self.augment.scale)
        return plain


def differences(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two recipes' `as_dict` differ, as dotted names with both values."""
    found = []
    for name in sorted(first.keys() | second.keys()):
        a, b = first.get(name), second.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} ({a} and {b})")
    return found
