"""Training and validation images of folders, tars and timm's datasets, split without leaks."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from timm.data.readers.reader import Reader
from torch.utils.data import Dataset

from shvit.errors import InputError, first_line
from shvit.files import is_folder
from shvit.weights.run_info import same_name

from ..recipe import Data
from .groups import count_copies, count_duplicates, group_keys, in_validation
from .image_folders import Files, Listing, Sample, TarFiles, class_reader, describe_skipped
from .images import open_image
from .locations import check_path
from .pixels.formats import RGB, Decoded, PixelFormat
from .splits import as_listing, check_nesting, class_names, find_parts, may_be_split
from .splits import check_outside as check_outside
from .streams import IGNORED, HubImages, Split, Stream, check_named, create_named, numbered

Self = TypeVar("Self", bound="Images")


class Images(Dataset):
    """Images with their classes: item i is (image, class index), an RGB image unless `pixels` says otherwise.

    A file is read when its item is requested; a damaged one raises InputError with its name.

    Args:
        source: a reader of timm, or any sequence of (file or image, class index).
        classes: names, by class index.
        indices: the items of `source` to use; None for all.
        part: what messages call these images, as a part of the user's data.
    """

    def __init__(
        self, source: Any, classes: Sequence[str], indices: Sequence[int] | None = None, part: str = "all images"
    ):
        self.source = source
        self.classes = list(classes)
        self.part = part
        self.indices = range(len(source)) if indices is None else indices
        self.pixels = RGB

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Decoded, int]:
        file, target = self.fetch(index)
        read = self.pixels.convert if isinstance(file, Image.Image) else self.pixels.open
        return read(file, self.name(index)), target

    def fetch(self, index: int) -> tuple[Any, int]:
        """Return an item's file, which is not read yet, or its image where another library opens it; and its class."""
        place = self.indices[index]  # whose IndexError ends an iteration
        try:
            return self.source[place]
        except InputError:
            raise
        except Exception as error:  # each of timm's readers and torchvision's datasets has its own
            raise InputError(f"{self.name(index)}: cannot be read ({first_line(error)})") from error

    def read_as(self: Self, pixels: PixelFormat) -> Self:
        """Return the same images, decoded in a format."""
        images = copy(self)
        images.pixels = pixels
        return images

    @property
    def blank_target(self) -> "int | np.ndarray":
        """The target of a black image in place of a damaged one."""
        return 0

    @property
    def ignored_target(self) -> "int | np.ndarray":
        """The target of an image that does not count."""
        return IGNORED

    def check_target(self, index: int, target: Any) -> None:
        """Raise InputError for a class index that no class has."""
        if not 0 <= target < (len(self.classes) or target + 1):
            raise InputError(
                f"{self.name(index)}: of class {target}, and there are {len(self.classes)}, counted from 0"
            )

    def describe(self, index: int) -> str:
        """Return the class of an item of a folder or a tar, for the identity of the images."""
        return same_name(self.classes[self.source.samples[self.indices[index]][1]])

    def name(self, index: int) -> str:
        """Return what messages call an item."""
        if isinstance(self.source, Reader):
            return self.source.filename(self.indices[index])
        return f"{type(self.source).__name__}[{self.indices[index]}]"

    @property
    def samples(self) -> list[Sample]:
        """(name, class index) of every item."""
        if isinstance(self.source, Files | TarFiles):
            return [self.source.samples[i] for i in self.indices]
        return [(Path(self.name(i)), int(self.source[self.indices[i]][1])) for i in range(len(self))]

    @property
    def targets(self) -> list[int] | None:
        """Class index of every item, without reading an image; None where the source does not list them."""
        if isinstance(self.source, Files | TarFiles):
            return [self.source.samples[i][1] for i in self.indices]
        listed = getattr(self.source, "targets", None)  # of Hugging Face's datasets, and most of torchvision's
        known = np.asarray([] if listed is None else listed)
        return known[self.indices].tolist() if known.ndim == 1 and np.issubdtype(known.dtype, np.integer) else None

    @property
    def class_counts(self) -> list[int]:
        """Number of images of each class, of a folder or a tar."""
        counts = Counter(self.targets)
        return [counts[index] for index in range(len(self.classes))]

    def shard(self, num_shards: int, index: int) -> "Images":
        """Return item `index` and every `num_shards`-th after it, as one process's images."""
        return self.subset(self.indices[index::num_shards], self.part)

    def subset(self, indices: Sequence[int], part: str) -> "Images":
        """Return other items of the same source."""
        return Images(self.source, self.classes, indices, part).read_as(self.pixels)


# --- folders and tars -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """Training images, validation images, and notes on them for the user."""

    train: Images
    val: Images
    notes: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """Return what identifies these images: their number and a hash of their names."""
        return {"train": identity(self.train), "val": identity(self.val)}

    def read_as(self, pixels: PixelFormat) -> "Splits":
        """Return the same images, decoded in a format."""
        return replace(self, train=self.train.read_as(pixels), val=self.val.read_as(pixels))


def open_splits(data: Data, in_chans: int = 3) -> Splits:
    """Open the training and validation images of a recipe; not for streams.

    Args:
        in_chans: number of channels that images have, by which files are chosen.

    Raises:
        InputError: as `open_dataset` and `open_named`.
    """
    if data.name:
        return Splits(open_named(data, "train"), open_named(data, "val"))
    return _splits_of(data.root, data.group, in_chans)


def open_dataset(root: Path | None, split: Split, group: str | None = None) -> Images:
    """Open the training or the validation images of a folder or a tar.

    Args:
        root: a folder with train/ and val/ (also Training/, validation/, valid/; test/ where there is no val/) of class
            folders, or .tar files of these names; or a folder or a tar of class folders alone, of which about every
            tenth image, chosen by a hash of its name below the class folder or of its group, is kept for validation;
            None for `elpv`.
        group: see `groups.group_keys`.

    Raises:
        InputError: no such folder, no images, only one class, an empty class, or classes only in validation.
    """
    splits = _splits_of(root, group)
    return splits.train if split == "train" else splits.val


def _splits_of(root: Path | None, group: str | None, in_chans: int = 3) -> Splits:
    if root is None:
        return Splits(elpv("train"), elpv("val"))
    check_path(root, "--data.root")
    parts = find_parts(root, in_chans)
    if parts.whole is not None:
        return _split(as_listing(parts.whole, in_chans), parts.notes, group)
    if parts.train is None or parts.val is None:
        part, missing = (parts.train, "neither val/ nor validation/") if parts.train else (parts.val, "no train/")
        assert part is not None
        name = part.name if isinstance(part, Path) else part.label
        hint = (
            f", or --data.root {root / name} to keep a tenth of it for validation"
            if parts.train and is_folder(root)
            else ""
        )
        if other := next(filter(may_be_split, parts.others), None):
            hint = f"; if {other} is the other split, rename it to {'val' if parts.train else 'train'}{hint}"
        raise InputError(f"{root} holds {name} but {missing}; give both, or only class folders{hint}")
    training, validation = as_listing(parts.train, in_chans), as_listing(parts.val, in_chans)
    classes = class_names(training)
    trained = set(map(same_name, classes))
    if unknown := [name for name in validation.classes if same_name(name) not in trained]:
        splits = " and ".join(
            part.label.removeprefix(f"{root}/") + ("" if part.members is not None else "/")
            for part in (training, validation)
        )
        raise InputError(f"{root}: classes in only one of {splits}: {', '.join(unknown)}{_nearly(unknown, classes)}")
    if not validation.names:
        raise InputError(f"{validation.label}: no images to validate with")
    notes = [*parts.notes, *_listing_notes(training, classes), *_listing_notes(validation, classes)]
    readers = class_reader(training, classes), class_reader(validation, classes)
    if copies := count_copies(*readers, group):
        notes.append(f"{copies} validation images are copies of training images, by their names")
    return _with_missing_classes(Images(readers[0], classes), Images(readers[1], classes), notes)


def _nearly(unknown: Sequence[str], classes: Sequence[str]) -> str:
    """Return a hint if a class differs from one of `classes` only by letter case or blanks."""
    known = {same_name(name).casefold().strip(): name for name in classes}
    for name in unknown:
        if close := known.get(same_name(name).casefold().strip()):
            return f"; {name!r} and {close!r} differ only in letter case or blanks; give both one name"
    return ""


def _split(listing: Listing, notes: Sequence[str], group: str | None) -> Splits:
    """Split class folders: about every tenth group of images is kept for validation."""
    classes = class_names(listing)
    reader = class_reader(listing, classes)
    keys = group_keys(reader.names, group)
    chosen = {key: in_validation(key) for key in set(keys)}
    parts = [[i for i, key in enumerate(keys) if chosen[key] == wanted] for wanted in (False, True)]
    if not all(parts):
        raise InputError(f"{listing.label}: {len(keys)} images in {len(chosen)} groups are too few to keep some "
                         "for validation; give train/ and val/, or groups by --data.group")  # fmt: skip
    if keys != reader.names:
        how = "by --data.group" if group else "copies stay with their original"
        notes = (*notes, f"{len(keys)} images are in {len(chosen)} groups, none of which is on both sides: {how}")
    training, validation = (Images(reader, classes, part) for part in parts)
    return _with_missing_classes(training, validation, (*notes, *_listing_notes(listing, classes)))


def _listing_notes(listing: Listing, classes: Sequence[str]) -> Iterator[str]:
    if listing.skipped:
        yield f"{listing.label}: {describe_skipped(listing.skipped)}"
    if listing.loose:
        yield f"{listing.label}: {listing.loose} images beside the class folders are skipped"
    if nested := check_nesting(listing, classes):
        yield f"{listing.label}: {nested}"


def _with_missing_classes(training: Images, validation: Images, notes: Sequence[str]) -> Splits:
    """Return the two splits, with a note on classes without a validation image."""
    counts = validation.class_counts
    if missing := [name for name, count in zip(validation.classes, counts, strict=True) if not count]:
        notes = (*notes, f"without a validation image: {', '.join(missing[:10])}" + (
            f" and {len(missing) - 10} more classes" if len(missing) > 10 else ""
        ))  # fmt: skip
    return Splits(training, validation, tuple(notes))


def duplicates_note(splits: Splits) -> str | None:
    """Return a note on validation images that are training images too; reads files."""
    if not all(isinstance(part.source, Files | TarFiles) for part in (splits.train, splits.val)):
        return None
    duplicates, compared = count_duplicates(
        splits.train.source, splits.train.indices, splits.val.source, splits.val.indices
    )
    return f"{duplicates} of {compared} validation images are in training too, byte for byte" if duplicates else None


def any_readable(dataset: Images, indices: Iterable[int]) -> bool:
    """Return whether any of these images can be read, stopping at the first that can."""
    for index in indices:
        with suppress(InputError):
            return bool(dataset[index])
    return False


def check_class_of(dataset: Images | None, index: int) -> None:
    """Check that other images of a damaged image's class can be read, in a folder or a tar.

    Raises:
        InputError: none of them can, so that the class would not be learned.
    """
    if dataset is None or not isinstance(dataset.source, Files | TarFiles):
        return
    targets = dataset.targets
    if targets is None:  # labels of which an image has any number
        return
    alike = [other for other, target in enumerate(targets) if target == targets[index]]
    if not any_readable(dataset, alike):
        raise InputError(f"none of the {len(alike)} training images of {dataset.classes[targets[index]]} can be "
                         f"read, such as {dataset.name(index)}; replace them, or remove the class")  # fmt: skip


def identity(dataset: "Images | Stream") -> dict[str, Any]:
    """Return what identifies a dataset's images: `count`, and for folders and tars `names_sha256`."""
    if isinstance(dataset, Stream) or not isinstance(dataset.source, Files | TarFiles):
        return {"count": len(dataset)}
    names = sorted(f"{dataset.describe(place)}/{dataset.source.names[i]}\n" for place, i in enumerate(dataset.indices))
    content = "".join(names).encode(errors="surrogateescape")  # file names need not be UTF-8
    return {"count": len(names), "names_sha256": hashlib.sha256(content).hexdigest()}


# --- named datasets ---------------------------------------------------------------------------------------------------


def open_named(data: Data, split: Split) -> Images:
    """Open a named dataset with random access to its images.

    Raises:
        InputError: the name or location is not allowed, the dataset cannot be opened, or a package is missing.
    """
    name = check_named(data, split)
    dataset = create_named(data, name)
    if hasattr(dataset, "loader"):  # torchvision's datasets of files
        dataset.loader = _open_path
    source = getattr(dataset, "reader", dataset)
    known = getattr(source, "class_to_idx", None) or getattr(dataset, "class_to_idx", None) or {}
    classes = sorted(known, key=known.__getitem__)
    if data.name.startswith("hfds/"):
        source = HubImages(source, data.name)
    return Images(source, classes or numbered(data))


def _open_path(path: str) -> Image.Image:
    return open_image(Path(path))


MODULE = 60  # cells: 6×10


def elpv(split: Split) -> Images:
    """Open 2,624 electroluminescence images of solar cells, mono- or polycrystalline (PyPI package elpv-dataset).

    Images of cells from one module are alike, so a module must not be on both sides of the split. The
    package does not name modules, but numbers cells module after module, and a module's cells are of one type. Its
    list of types has ten runs: 60, 300, 180, 360, 714, 530, 72, 180, 48 and 180 cells. Modules have 60 cells as a rule:
    in the runs that are multiples of 60 the images' brightness profile jumps at every 60th cell. The validation
    images are the last module of each of these runs that has three or more, and the run of 72 cells, a module of its
    own: 132 mono and 240 poly cells. The other runs, where modules' borders are not certain, are for training.

    Source: Deitsch et al., 2019, https://github.com/zae-bayern/elpv-dataset; images CC BY-NC-SA 4.0.
    """
    import elpv_dataset

    folder = Path(elpv_dataset.__file__).parent / "data"
    classes = ["mono", "poly"]
    cells = []
    for line in (folder / "labels.csv").read_text().splitlines():
        name, _defect_probability, class_name = line.split()
        cells.append((folder / name, classes.index(class_name)))
    chosen: list[Sample] = []
    for _, group in groupby(cells, key=lambda cell: cell[1]):
        run = list(group)
        count = MODULE if len(run) % MODULE == 0 and len(run) >= 3 * MODULE else len(run) if len(run) == 72 else 0
        border = len(run) - count
        chosen += run[border:] if split == "val" else run[:border]
    return Images(Files(chosen), classes)
