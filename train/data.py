"""Photographs from folders, split without leaks, and the loaders that feed them."""

import hashlib
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from shvit.errors import InputError

from .recipe import Recipe

MAX_PIXELS = 100_000_000  # decoding one takes 300 MB; more is a mistake or an attack
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
Split = Literal["train", "val"]
Sample = tuple[Path, int]


def open_image(path: Path) -> Image.Image:
    """A photograph as RGB.

    Raises:
        InputError: the file, which is named, is no photograph, damaged, or larger than `MAX_PIXELS`.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{path}: {image.width}×{image.height} pixels are more than the {MAX_PIXELS:,} allowed"
                )
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable photograph ({error}); remove or replace it") from error


class Photographs(Dataset):
    """Photographs with their classes: item i is (RGB image, or what `transform` makes of it; class index).

    Files are read when an item is asked for; a damaged one raises InputError and is named.
    """

    def __init__(self, samples: Sequence[Sample], classes: Sequence[str]):
        self.samples = list(samples)
        self.classes = list(classes)
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        image = open_image(path)
        return (self.transform(image) if self.transform else image), target


# --- which photographs ------------------------------------------------------------------------------------------------


def open_dataset(root: Path | None, split: Split) -> Photographs:
    """The training or the held-out photographs.

    Args:
        root: a folder with train/ and val/ (or validation/) of class folders; or of class folders alone, of which
            about every tenth photograph, chosen by a hash of its file name, is held out; None for `elpv`.

    Raises:
        InputError: no such folder, no photographs, an empty class, or classes that differ between the splits.
    """
    if root is None:
        return elpv(split)
    training, held_out = root / "train", _validation_folder(root)
    if training.is_dir() != (held_out is not None):
        found = "train/ but neither val/ nor validation/" if held_out is None else f"{held_out.name}/ but no train/"
        raise InputError(f"{root} holds {found}; give both, or class folders alone")
    if held_out is not None:
        datasets = {"train": _scan(training), "val": _scan(held_out)}
        if datasets["train"].classes != datasets["val"].classes:
            unequal = sorted(set(datasets["train"].classes) ^ set(datasets["val"].classes))
            raise InputError(
                f"{root}: classes in only one of {training.name}/ and {held_out.name}/: {', '.join(unequal)}"
            )
        return datasets[split]
    everything = _scan(root)
    samples = [sample for sample in everything.samples if _is_held_out(sample[0].name) == (split == "val")]
    if not samples:
        raise InputError(f"{root}: {len(everything)} photographs are too few to hold some out; give train/ and val/")
    return Photographs(samples, everything.classes)


def open_eval_dataset(root: Path | None) -> Photographs:
    """All photographs below `root`/val, `root`/validation or else `root` itself; None for `elpv`'s held-out ones."""
    return elpv("val") if root is None else _scan(_validation_folder(root) or root)


def _validation_folder(root: Path) -> Path | None:
    return next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)


def _is_held_out(name: str) -> bool:
    """About every tenth name, the same on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] < 256 / 10


def _scan(root: Path) -> Photographs:
    """Class folders, in alphabetical order, and every photograph in them and below."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise InputError(f"{root}: no class folders in it; put each class's photographs into a folder of their own")
    samples: list[Sample] = []
    for target, folder in enumerate(folders):
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"{folder}: an empty class; remove the folder or put photographs into it")
        samples += [(path, target) for path in found]
    return Photographs(samples, [folder.name for folder in folders])


MODULE = 60  # cells: 6×10


def elpv(split: Split) -> Photographs:
    """2,624 electroluminescence photographs of solar cells, mono- or polycrystalline (PyPI package elpv-dataset).

    Photographs of cells from one module are alike, so a module must not stand on both sides of the split. The
    package does not name modules, but numbers cells module after module, and a module's cells are of one type. Its
    list of types has ten runs: 60, 300, 180, 360, 714, 530, 72, 180, 48 and 180 cells. Modules have 60 cells as a rule:
    in the runs that are multiples of 60 the photographs' brightness profile jumps at every 60th cell. Held out are the
    last module of each of these runs that has three or more, and the run of 72 cells, a module of its own: 132 mono
    and 240 poly cells. The other runs, where modules' borders are not certain, are for training alone.

    Source: Deitsch et al., 2019, https://github.com/zae-bayern/elpv-dataset; images CC BY-NC-SA 4.0.
    """
    import elpv_dataset

    folder = Path(elpv_dataset.__file__).parent / "data"
    classes = ["mono", "poly"]
    cells = []
    for line in (folder / "labels.csv").read_text().splitlines():
        name, _defect_probability, kind = line.split()
        cells.append((folder / name, classes.index(kind)))
    chosen: list[Sample] = []
    for _, group in groupby(cells, key=lambda cell: cell[1]):
        run = list(group)
        held_out = MODULE if len(run) % MODULE == 0 and len(run) >= 3 * MODULE else len(run) if len(run) == 72 else 0
        border = len(run) - held_out
        chosen += run[border:] if split == "val" else run[:border]
    return Photographs(chosen, classes)


# --- loaders ----------------------------------------------------------------------------------------------------------


def train_loader(dataset: Photographs, recipe: Recipe, mean: Sequence[float], std: Sequence[float]) -> DataLoader:
    """timm's training loader: shuffled batches of (float32 (B, 3, H, W), int64 (B,)), the last short one left out."""
    from timm.data import create_loader

    augment = recipe.augment
    return create_loader(
        dataset,  # type: ignore[arg-type]  # any map-style dataset with a `transform` will do
        input_size=(3, recipe.img_size, recipe.img_size),
        batch_size=min(recipe.batch_size, len(dataset)),
        is_training=True,
        use_prefetcher=False,
        scale=augment.scale,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        interpolation="bilinear",
        mean=tuple(mean),
        std=tuple(std),
        num_workers=recipe.data.workers,
        pin_memory=False,
        persistent_workers=False,  # fresh workers draw from the epoch's seed alone
    )


def eval_loader(
    dataset: Photographs, transform: Callable[[Image.Image], torch.Tensor], batch_size: int, workers: int = 0
) -> DataLoader:
    """Every photograph once, in order: batches of (what `transform` makes, int64 (B,))."""
    prepared = Photographs(dataset.samples, dataset.classes)
    prepared.transform = transform
    return DataLoader(prepared, batch_size, num_workers=workers)
