"""A trained detector: created from a config, its weights loaded safely, and run on images."""

import copy
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from mmengine.config import Config
from torch import nn
from torch.overrides import TorchFunctionMode

from shvit.checkpoint import load_strictly, read_state_dict
from shvit.errors import InputError, first_line
from shvit.shvit import rename_reference_keys

from .parsing.config import innermost, quiet

if TYPE_CHECKING:
    from mmdet.models.detectors import BaseDetector
    from mmdet.structures import DetDataSample

PADDING = (124, 116, 104)
"""RGB of the border around an image at a fixed size: ImageNet's mean, about 0 after normalization."""

STEP = 32
"""Detectors pad images to a multiple of this many pixels."""

MAX_IMG_SIZE = 4096
MAX_NUMBERS = 1 << 29
"""Limit of a detector's parameters and buffers: 2 GB, three times the largest of MMDetection's that are built here."""
CREATING = {torch.empty, torch.zeros, torch.ones, torch.full}


@dataclass(frozen=True)
class Detections:
    """Detections on one image, best first, in the image's pixels."""

    boxes: torch.Tensor
    """float32 (n, 4): left, top, right, bottom."""
    scores: torch.Tensor
    """float32 (n,), from 0 to 1."""
    labels: torch.Tensor
    """int64 (n,): class indices."""
    masks: torch.Tensor | None
    """bool (n, H, W); None for a detector without masks."""

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> "Detections":
        """Return the detections with at least this score."""
        keep = self.scores >= score
        masks = None if self.masks is None else self.masks[keep]
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], masks)


class PreparedImage(TypedDict):
    """An image as a detector takes it, which `preparation` makes of a file."""

    inputs: torch.Tensor
    """uint8 (3, H, W) in BGR."""
    data_samples: "DetDataSample"
    """The image's sizes, before and after it was resized."""


Detect = Callable[[PreparedImage], Detections]


# --- models -----------------------------------------------------------------------------------------------------------


def create_detector(config: Config) -> "BaseDetector":
    """Return a config's detector in eval mode, with random weights; raise InputError if its parts do not fit."""
    from mmdet.registry import MODELS

    config = copy.deepcopy(config)
    config.model.setdefault("train_cfg", None)
    forget_initial_weights(config)
    try:
        with quiet(), _BoundedSizes(config.filename):
            model = MODELS.build(config.model)
        model.eval()
    except InputError:
        raise
    except Exception as error:  # of many types, from constructors of mmdet's
        raise InputError(f"{config.filename}: no detector can be built ({first_line(error)})") from error
    _check_neck(model, config)
    return model


class _BoundedSizes(TorchFunctionMode):
    """A limit of `MAX_NUMBERS` on the tensors created in a block, which holds before their memory is filled."""

    def __init__(self, name: str | None):
        super().__init__()
        self.name = name
        self.numbers = 0

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in CREATING:
            self.numbers += result.numel()
            if self.numbers > MAX_NUMBERS:
                raise InputError(f"{self.name}: the detector has more than the {MAX_NUMBERS:,} parameters allowed")
        return result


@torch.no_grad()
def _check_neck(model: "BaseDetector", config: Config) -> None:
    """Raise InputError where the neck expects other feature maps than the backbone returns."""
    expected = list(getattr(getattr(model, "neck", None), "in_channels", []))
    with suppress(RuntimeError, AssertionError):  # of a backbone that takes no image as small as this
        given = [each.shape[1] for each in model.backbone(torch.zeros(1, 3, 64, 64))]
        if expected and given != expected:
            raise InputError(
                f"{config.filename}: the backbone gives feature maps of {given} channels and model.neck.in_channels is "
                f"{expected}; give the neck the backbone's"
            )


def forget_initial_weights(config: Config) -> None:
    """Remove the backbone's initial weights from a config: all of its parameters come from elsewhere."""
    config.model.backbone.init_cfg = None
    if config.model.backbone.get("pretrained"):
        config.model.backbone.pretrained = False


def load_detector(config: Config, checkpoint: Path) -> "BaseDetector":
    """Return a config's detector in eval mode, with a checkpoint's weights.

    Args:
        checkpoint: of this detector, by MMDetection 2 or 3, with the reference's names of SHViT's parameters or ours.

    Raises:
        InputError: as `create_detector` and `read_state_dict`; or the parameters differ, which are named.
    """
    model = create_detector(config)
    load_detector_weights(model, checkpoint)
    return model


def load_detector_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load a detector's weights, strictly; raises as `load_detector`."""
    with torch.serialization.safe_globals(log_types()):
        state_dict = read_state_dict(checkpoint)
    if all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    prefix = "backbone."
    backbone = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    others = {name: value for name, value in state_dict.items() if not name.startswith((prefix, "data_preprocessor."))}
    renamed = {prefix + name: value for name, value in rename_reference_keys(backbone).items()}
    load_strictly(model, {**renamed, **others}, checkpoint, heads=())


def log_types() -> list[Any]:
    """Return the types besides tensors that MMEngine writes into a checkpoint: logged histories, as NumPy arrays."""
    import numpy as np
    from mmengine.logging.history_buffer import HistoryBuffer

    kinds = [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    core = np._core if hasattr(np, "_core") else np.core
    arrays = [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype, *kinds]
    return [HistoryBuffer, (_statistic, "builtins.getattr"), *arrays]


def _statistic(owner: type, name: str) -> Callable[..., float]:
    """Return a method of HistoryBuffer: all that a logged history needs of Python's getattr."""
    from mmengine.logging.history_buffer import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"getattr of {name!r} is not allowed")
    return getattr(owner, name)


# --- images ------------------------------------------------------------------------------------------------------


def fixed_pipeline(img_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return transforms to one size: the image as large as fits with its aspect kept, at the top left, and a border.

    Args:
        img_size: height and width in pixels.
    """
    height, width = img_size
    blue_first = tuple(reversed(PADDING))
    return [
        {"type": "LoadImage"},
        {"type": "Resize", "scale": (width, height), "keep_ratio": True},
        {"type": "Border", "size": (width, height), "pad_val": {"img": blue_first}},
        {"type": "PackDetInputs", "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")},
    ]


def own_pipeline(config: Config) -> list[Any]:
    """Return the config's own transforms for testing, without those that load annotations."""
    pipeline = innermost(config.test_dataloader.dataset).pipeline
    steps = [step for step in pipeline if step["type"].rpartition(".")[2] != "LoadAnnotations"]
    return [{**step, "type": "LoadImage"} if step["type"] == "LoadImageFromFile" else step for step in steps]


def preparation(pipeline: Sequence[Any]) -> Callable[[Path], PreparedImage]:
    """Return a function that prepares an image file for a detector, and raises InputError for an unusable one."""
    from mmdet.registry import TRANSFORMS

    from .plugin.transforms import NamedImages

    transforms = NamedImages([TRANSFORMS.build(step) for step in pipeline])

    def prepare(path: Path) -> PreparedImage:
        image = transforms({"img_path": str(path), "img_id": 0})
        if image is None:
            raise InputError(f"{path}: the pipeline drops it; take out the transform that filters images")
        return cast(PreparedImage, image)

    return prepare


def check_img_size(sides: Sequence[int]) -> tuple[int, int]:
    """Return (height, width), given one or two numbers; raise InputError unless multiples of `STEP` in range."""
    if len(sides) not in (1, 2):
        raise InputError(f"--img-size takes one number, or height and width, not {len(sides)}")
    height, width = sides[0], sides[-1]
    for side in (height, width):
        if not STEP <= side <= MAX_IMG_SIZE or side % STEP:
            raise InputError(f"--img-size {side} cannot be; choose a multiple of {STEP} from {STEP} to {MAX_IMG_SIZE}")
    return height, width


# --- detection --------------------------------------------------------------------------------------------------------


def torch_detect(model: "BaseDetector") -> Detect:
    """Return a function that detects with MMDetection's own code."""

    def detect(image: PreparedImage) -> Detections:
        batch = {"inputs": [image["inputs"]], "data_samples": [image["data_samples"].clone()]}
        with torch.inference_mode():
            result = model.test_step(batch)[0].pred_instances.cpu()
        order = result.scores.argsort(descending=True, stable=True)
        masks = result.masks[order].bool() if "masks" in result else None
        return Detections(result.bboxes[order].float(), result.scores[order], result.labels[order], masks)

    return detect


def paste(masks: torch.Tensor, boxes: torch.Tensor, shape: tuple[int, int], threshold: float) -> torch.Tensor:
    """Return masks (n, h, w) of probabilities inside their boxes as bool (n, height, width) of the whole image."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    pasted = torch.zeros(len(boxes), *shape, dtype=torch.bool)
    for index in range(len(boxes)):
        part, (rows, columns) = _do_paste_mask(masks[index, None, None], boxes[index, None], *shape)
        pasted[index, rows, columns] = part[0] >= threshold
    return pasted
