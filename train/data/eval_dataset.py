"""Choice of the images to evaluate on: of a training run's own folder, those that it did not train on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shvit.documents import load_yaml
from shvit.errors import InputError
from shvit.files import is_file, is_folder

from ..recipe import Data
from .datasets import Images, elpv, identity, open_named
from .groups import group_keys, in_validation
from .image_folders import class_reader
from .locations import NAMED
from .pixels.formats import RGB, PixelFormat
from .shards import has_info
from .splits import as_listing, find_parts
from .splits import check_outside as check_outside
from .streams import Stream, is_stream, open_stream


@dataclass(frozen=True)
class TrainedOn:
    """The images of a run, as identified in its recipe.yaml or its weights."""

    images: Mapping[str, Any]
    """`Splits.identity`."""
    group: str | None
    root: Path | None
    """The run's folder of images; None where only the weights are known."""

    @property
    def count(self) -> int:
        """Number of images of the run, on both sides of its split."""
        parts = (self.images.get(part) for part in ("train", "val"))
        return sum(part.get("count", 0) for part in parts if isinstance(part, Mapping))

    @classmethod
    def from_weights(cls, data: Mapping[str, Any] | None) -> "TrainedOn | None":
        """Create it from `RunInfo.data`, which a run writes into its weights; None if that identifies no images."""
        if data is None or not all(isinstance(data.get(part), Mapping) for part in ("train", "val")):
            return None
        group = data.get("group")
        return cls(data, group if isinstance(group, str) else None, None)


def read_trained_on(checkpoint: Path) -> TrainedOn | None:
    """Read the images of the run in whose folder a checkpoint is; None if unknown."""
    try:
        path = checkpoint.parent / "recipe.yaml"
        if not is_file(path):
            return None
        record = load_yaml(path)
        data, images = record["recipe"]["data"], record["data"]
        trained_on = TrainedOn.from_weights({**images, "group": data["group"]})
        root = data["root"] or Path(data["labels"]).parent
        return replace(trained_on, root=Path(root)) if trained_on else None
    except (InputError, KeyError, TypeError):
        return None


def open_eval_dataset(
    data: str | Path, split: str = "validation", trained_on: TrainedOn | None = None, pixels: PixelFormat = RGB
) -> "Images | Stream":
    """Open the images to evaluate on; their `part` names the part of `data` that they are.

    Args:
        data: a folder of class folders or its val (or validation) subfolder, a tar of one, a folder of WebDataset
            shards with an _info.json, `elpv` for that dataset's validation images, or a name that timm knows, such as
            torch/cifar10 or hfds/beans, looked for in the working directory or its library's cache.
        split: split name, for sharded or named datasets.
        trained_on: the images of the run whose weights are evaluated. If `data` is its own folder without splits, the
            part that it kept for validation is used; None for all images.
        pixels: the format that images are decoded in.
    """
    opened = _open(Path(data), str(data), split, trained_on, pixels)
    return opened.read_as(pixels) if isinstance(opened, Images) else opened


def _open(root: Path, data: str, split: str, trained_on: TrainedOn | None, pixels: PixelFormat) -> "Images | Stream":
    if data == "elpv":
        return elpv("val")
    if not pixels.uses_pillow and takes_split(data):
        raise InputError(f"{data}: its images are in RGB, and the model takes {pixels}; give a folder of such files")
    if data.startswith(NAMED):
        prefix, _, rest = data.partition("/")
        if prefix == "wds":
            return open_stream(Data(name="wds/", root=Path(rest), val_split=split), "val")
        named = Data(name=data, root=Path() if prefix == "torch" else None, val_split=split)
        return open_stream(named, "val") if is_stream(named) else open_named(named, "val")
    if takes_split(data):
        return open_stream(Data(name="wds/", root=root, val_split=split), "val")
    parts = find_parts(root, pixels.in_chans)
    if parts.train is not None and parts.val is None:
        raise InputError(f"{root} holds training images but no val/; give the folder of class folders itself")
    listing = as_listing(parts.val or parts.whole or root, pixels.in_chans)
    if not listing.classes:
        raise InputError(f"{root}: no class folders in it; put each class's images into a folder of their own")
    everything = Images(class_reader(listing, listing.classes), listing.classes)
    if parts.val is not None:
        everything.part = f"its {listing.label.removeprefix(f'{root}/')}"
    else:
        return unseen_part(everything, listing.root, trained_on)
    return everything


def has_one_part(data: str | Path) -> bool:
    """Return whether data are a folder or tar without val/, which `open_eval_dataset` may use in part."""
    return not (str(data) == "elpv" or takes_split(data)) and find_parts(Path(data)).val is None


def takes_split(data: str | Path) -> bool:
    """Return whether the `split` of `open_eval_dataset` applies: the data are shards or a named dataset."""
    root = Path(data)
    return str(data).startswith(NAMED) or (is_folder(root) and has_info(root))


def unseen_part(everything: Images, root: Path, trained_on: TrainedOn | None) -> Images:
    """Return the part of a run's own images, without splits, that the run kept for validation; all of other images.

    Args:
        root: the folder of the images.
        trained_on: the images of the run; None where they are not known, or all are to be used.
    """
    if trained_on is None:
        return everything
    found = identity(everything)
    if found == trained_on.images["train"]:
        everything.part = "images that this run was trained on"
    if found in (trained_on.images["train"], trained_on.images["val"]):
        return everything
    keys = group_keys(everything.source.names, trained_on.group)
    kept = [i for i, key in enumerate(keys) if in_validation(key)]
    validation = everything.subset(kept, "the part that this run kept for validation")
    own_folder = trained_on.root is not None and trained_on.root.resolve() == root.resolve()
    grown = trained_on.count != len(everything)
    if kept and (identity(validation) == trained_on.images["val"] or (own_folder and grown)):
        return validation
    everything.part = (
        "images most of which this run was trained on, since it split them in another way"
        if own_folder and not grown
        else "all images; which of them this run was trained on, if any, is not known"
    )
    return everything
