"""Which images: folders, tars and timm's datasets, split without leaks, and unusable ones named."""

import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.readers.reader import Reader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from shvit import terminal
from shvit.documents import load_yaml
from shvit.errors import InputError, first_line
from shvit.files import is_file, is_folder
from shvit.weights.run_info import same_name

from .folders import Files, Listing, Sample, TarFiles, class_reader, describe_skipped
from .images import open_image, to_rgb
from .locations import NAMED, check_path
from .recipe import Data
from .shards import has_info
from .splits import (
    as_listing,
    check_nesting,
    class_names,
    count_copies,
    count_duplicates,
    find_parts,
    group_keys,
    is_held_out,
    may_be_split,
)
from .splits import check_outside as check_outside
from .streams import IGNORED, HubImages, Split, Stream, check_named, create_named, is_stream, numbered, open_stream


class Images(Dataset):
    """Images with their classes: item i is (RGB image, class index).

    Files are read when an item is asked for; a damaged one raises InputError and is named.

    Args:
        source: a reader of timm's, or anything whose items are (file or image, class index).
        classes: names, by class index.
        indices: the items of `source` that are taken; all where None.
        part: what messages call them, as a part of what the user named.
    """

    def __init__(
        self, source: Any, classes: Sequence[str], indices: Sequence[int] | None = None, part: str = "all images"
    ):
        self.source = source
        self.classes = list(classes)
        self.part = part
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        place = self.indices[index]  # whose IndexError ends an iteration
        try:
            file, target = self.source[place]
        except InputError:
            raise
        except Exception as error:  # each of timm's readers and torchvision's datasets has its own
            raise InputError(f"{self.name(index)}: cannot be read ({first_line(error)})") from error
        read = to_rgb if isinstance(file, Image.Image) else open_image
        return read(file, self.name(index)), target

    def name(self, index: int) -> str:
        """What messages call an item."""
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
    def class_counts(self) -> list[int]:
        """Images of each class, of a folder or a tar."""
        counts = Counter(target for _, target in self.samples)
        return [counts[index] for index in range(len(self.classes))]

    def every(self, step: int, start: int) -> "Images":
        """Item `start` and every `step`-th after it: one process's share."""
        return Images(self.source, self.classes, self.indices[start::step])


# --- folders and tars -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """What is trained on, what it is validated with, and what there is to say of them."""

    train: Images
    val: Images
    notes: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What tells these images from others: how many there are, and a hash of their names."""
        return {"train": identity(self.train), "val": identity(self.val)}


def open_splits(data: Data) -> Splits:
    """The training and the validation images of a recipe; not for streams.

    Raises:
        InputError: as `open_dataset` and `open_named`.
    """
    if data.name:
        return Splits(open_named(data, "train"), open_named(data, "val"))
    return _splits_of(data.root, data.group)


def open_dataset(root: Path | None, split: Split, group: str | None = None) -> Images:
    """The training or the validation images.

    Args:
        root: a folder with train/ and val/ (also Training/, validation/, valid/; test/ where there is no val/) of class
            folders, or .tar files of these names; or a folder or a tar of class folders alone, of which about every
            tenth image, chosen by a hash of its name below the class folder or its group, is kept for validation; None
            for `elpv`.
        group: see `folders.group_keys`.

    Raises:
        InputError: no such folder, no images, one class alone, an empty class, or classes in validation alone.
    """
    splits = _splits_of(root, group)
    return splits.train if split == "train" else splits.val


def _splits_of(root: Path | None, group: str | None) -> Splits:
    if root is None:
        return Splits(elpv("train"), elpv("val"))
    check_path(root, "--data.root")
    parts = find_parts(root)
    if parts.whole is not None:
        return _split(as_listing(parts.whole), parts.notes, group)
    if parts.train is None or parts.val is None:
        found, missing = (parts.train, "neither val/ nor validation/") if parts.train else (parts.val, "no train/")
        assert found is not None
        name = found.name if isinstance(found, Path) else found.label
        hint = f", or --data.root {root / name} to keep a tenth of it" if parts.train and is_folder(root) else ""
        if other := next(filter(may_be_split, parts.others), None):
            hint = f"; if {other} is the other one, rename it to {'val' if parts.train else 'train'}{hint}"
        raise InputError(f"{root} holds {name} but {missing}; give both, or class folders alone{hint}")
    training, validation = as_listing(parts.train), as_listing(parts.val)
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
    return _noted(Images(readers[0], classes), Images(readers[1], classes), notes)


def _nearly(unknown: Sequence[str], classes: Sequence[str]) -> str:
    """A hint where a class differs from one of `classes` by letter case or blanks alone."""
    known = {same_name(name).casefold().strip(): name for name in classes}
    for name in unknown:
        if close := known.get(same_name(name).casefold().strip()):
            return f"; {name!r} and {close!r} differ in letter case or blanks alone, so give both one name"
    return ""


def _split(listing: Listing, notes: Sequence[str], group: str | None) -> Splits:
    """Class folders alone: about every tenth group of images is kept for validation."""
    classes = class_names(listing)
    reader = class_reader(listing, classes)
    keys = group_keys(reader.names, group)
    held_out = {key: is_held_out(key) for key in set(keys)}
    parts = [[i for i, key in enumerate(keys) if held_out[key] == wanted] for wanted in (False, True)]
    if not all(parts):
        raise InputError(f"{listing.label}: {len(keys)} images in {len(held_out)} groups are too few to hold some "
                         "out; give train/ and val/, or groups by --data.group")  # fmt: skip
    if keys != reader.names:
        how = "by --data.group" if group else "copies stay with their original"
        notes = (*notes, f"{len(keys)} images are in {len(held_out)} groups, none of which is on both sides: {how}")
    training, validation = (Images(reader, classes, part) for part in parts)
    return _noted(training, validation, (*notes, *_listing_notes(listing, classes)))


def _listing_notes(listing: Listing, classes: Sequence[str]) -> Iterator[str]:
    if listing.skipped:
        yield f"{listing.label}: {describe_skipped(listing.skipped)}"
    if listing.loose:
        yield f"{listing.label}: {listing.loose} images beside the class folders are left out"
    if nested := check_nesting(listing, classes):
        yield f"{listing.label}: {nested}"


def _noted(training: Images, validation: Images, notes: Sequence[str]) -> Splits:
    """With what the two say of each other."""
    counts = validation.class_counts
    if missing := [name for name, count in zip(validation.classes, counts, strict=True) if not count]:
        notes = (*notes, f"without a validation image: {', '.join(missing[:10])}" + (
            f" and {len(missing) - 10} more classes" if len(missing) > 10 else ""
        ))  # fmt: skip
    return Splits(training, validation, tuple(notes))


def duplicates_note(splits: Splits) -> str | None:
    """What is to be said of validation images that are among the training images too; reads files."""
    if not all(isinstance(part.source, Files | TarFiles) for part in (splits.train, splits.val)):
        return None
    found, looked_at = count_duplicates(
        splits.train.source, splits.train.indices, splits.val.source, splits.val.indices
    )
    return f"{found} of {looked_at} validation images are in training too, byte for byte" if found else None


def any_readable(dataset: Images, indices: Iterable[int]) -> bool:
    """Whether one of these images can be read; the first that can ends the search."""
    for index in indices:
        with suppress(InputError):
            return bool(dataset[index])
    return False


def check_class_of(dataset: Images | None, index: int) -> None:
    """For a damaged image of a folder or a tar: whether others of its class can be read.

    Raises:
        InputError: none can, so that the class would not be learned.
    """
    if dataset is None or not isinstance(dataset.source, Files | TarFiles):
        return
    targets = [dataset.source.samples[place][1] for place in dataset.indices]
    alike = [other for other, target in enumerate(targets) if target == targets[index]]
    if not any_readable(dataset, alike):
        raise InputError(f"none of the {len(alike)} training images of {dataset.classes[targets[index]]} can be "
                         f"read, {dataset.name(index)} for one; replace them, or remove the class")  # fmt: skip


def identity(dataset: "Images | Stream") -> dict[str, Any]:
    """What tells a dataset's images from others: `count`, and of folders and tars `names_sha256`."""
    if isinstance(dataset, Stream) or not isinstance(dataset.source, Files | TarFiles):
        return {"count": len(dataset)}
    source, classes = dataset.source, list(map(same_name, dataset.classes))
    names = sorted(f"{classes[source.samples[i][1]]}/{source.names[i]}\n" for i in dataset.indices)
    content = "".join(names).encode(errors="surrogateescape")  # file names need not be UTF-8
    return {"count": len(names), "names_sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class TrainedOn:
    """The images of a run, as its recipe.yaml or its weights tell them."""

    images: Mapping[str, Any]
    """`Splits.identity`."""
    group: str | None
    root: Path | None
    """None where weights alone tell."""

    @property
    def count(self) -> int:
        """How many images the run had, on both sides of its split."""
        parts = (self.images.get(part) for part in ("train", "val"))
        return sum(part.get("count", 0) for part in parts if isinstance(part, Mapping))

    @classmethod
    def from_weights(cls, data: Mapping[str, Any] | None) -> "TrainedOn | None":
        """From what a run writes into its weights, `RunInfo.data`; None where that does not tell the images."""
        if data is None or not all(isinstance(data.get(part), Mapping) for part in ("train", "val")):
            return None
        group = data.get("group")
        return cls(data, group if isinstance(group, str) else None, None)


def read_trained_on(checkpoint: Path) -> TrainedOn | None:
    """The images of the run in whose folder a checkpoint is; None if there is none, or it does not tell them."""
    try:
        path = checkpoint.parent / "recipe.yaml"
        if not is_file(path):
            return None
        record = load_yaml(path)
        data, images = record["recipe"]["data"], record["data"]
        told = TrainedOn.from_weights({**images, "group": data["group"]})
        return replace(told, root=Path(data["root"])) if told else None
    except (InputError, KeyError, TypeError):
        return None


def open_eval_dataset(
    data: str | Path, split: str = "validation", trained_on: TrainedOn | None = None
) -> "Images | Stream":
    """The images to evaluate on; which part of `data` they are is told by their `part`.

    Args:
        data: a folder of class folders or its val (or validation) subfolder, a tar of one, a folder of WebDataset
            shards with an _info.json, `elpv` for that dataset's held-out ones, or a name such as torch/cifar10 or
            hfds/beans that timm knows, which is looked for in the working directory or its library's cache.
        split: of shards and of a dataset with a name.
        trained_on: the images of the run whose weights are evaluated. Of its own folder of class folders alone, the
            part that it kept for validation is taken; all of the folder where None.
    """
    root, data = Path(data), str(data)
    if data == "elpv":
        return elpv("val")
    if data.startswith(NAMED):
        prefix, _, rest = data.partition("/")
        if prefix == "wds":
            return open_stream(Data(name="wds/", root=Path(rest), val_split=split), "val")
        named = Data(name=data, root=Path() if prefix == "torch" else None, val_split=split)
        return open_stream(named, "val") if is_stream(named) else open_named(named, "val")
    if takes_split(data):
        return open_stream(Data(name="wds/", root=root, val_split=split), "val")
    parts = find_parts(root)
    if parts.train is not None and parts.val is None:
        raise InputError(f"{root} holds training images and no val/; give the folder of class folders itself")
    listing = as_listing(parts.val or parts.whole or root)
    if not listing.classes:
        raise InputError(f"{root}: no class folders in it; put each class's images into a folder of their own")
    everything = Images(class_reader(listing, listing.classes), listing.classes)
    if parts.val is not None:
        everything.part = f"its {listing.label.removeprefix(f'{root}/')}"
    elif trained_on is not None:
        return _unseen(everything, listing, trained_on)
    return everything


def has_one_part(data: str | Path) -> bool:
    """Whether `open_eval_dataset` takes all images of it, or those that a run kept: a folder or tar without val/."""
    return not (str(data) == "elpv" or takes_split(data)) and find_parts(Path(data)).val is None


def takes_split(data: str | Path) -> bool:
    """Whether `open_eval_dataset` looks at its `split`: the data are shards, or a dataset with a name."""
    root = Path(data)
    return str(data).startswith(NAMED) or (is_folder(root) and has_info(root))


def _unseen(everything: Images, listing: Listing, trained_on: TrainedOn) -> Images:
    """Of a run's own folder without splits, the part that the run kept for validation."""
    found = identity(everything)
    if found == trained_on.images["train"]:
        everything.part = "images that this run was trained on"
    if found in (trained_on.images["train"], trained_on.images["val"]):
        return everything
    keys = group_keys(everything.source.names, trained_on.group)
    held_out = [i for i, key in enumerate(keys) if is_held_out(key)]
    source, classes = everything.source, everything.classes
    validation = Images(source, classes, held_out, "the part that this run kept for validation")
    own_folder = trained_on.root is not None and trained_on.root.resolve() == listing.root.resolve()
    grown = trained_on.count != len(everything)
    if held_out and (identity(validation) == trained_on.images["val"] or (own_folder and grown)):
        return validation
    everything.part = (
        "images most of which this run was trained on, as it split them otherwise"
        if own_folder and not grown
        else "all images; which of them this run was trained on, if any, is not known"
    )
    return everything


# --- datasets with a name ---------------------------------------------------------------------------------------------


def open_named(data: Data, split: Split) -> Images:
    """A dataset with a name whose items can be asked for in any order.

    Raises:
        InputError: its name or location is not allowed, it cannot be opened, or a package for it is missing.
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
    """2,624 electroluminescence images of solar cells, mono- or polycrystalline (PyPI package elpv-dataset).

    Images of cells from one module are alike, so a module must not stand on both sides of the split. The
    package does not name modules, but numbers cells module after module, and a module's cells are of one type. Its
    list of types has ten runs: 60, 300, 180, 360, 714, 530, 72, 180, 48 and 180 cells. Modules have 60 cells as a rule:
    in the runs that are multiples of 60 the images' brightness profile jumps at every 60th cell. Held out are the
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
    return Images(Files(chosen), classes)


# --- for evaluation ---------------------------------------------------------------------------------------------------

Prepare = Callable[[Image.Image], torch.Tensor]
PreparedItem = tuple[torch.Tensor, int, str, int]
"""(what `transform` makes of the image, class index, why it could not be read, images missing with it)."""
BLANK = Image.new("RGB", (8, 8))
MAX_CORRUPT = 10  # damaged images that an evaluation leaves out


class Prepared(Dataset):
    """Items, prepared for an evaluation; damaged ones too, which have the class `IGNORED`."""

    def __init__(self, dataset: Images, transform: Prepare):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> PreparedItem:
        try:
            image, target = self.dataset[index]
        except InputError as error:
            return self.transform(BLANK), IGNORED, str(error), 0
        return self.transform(image), target, "", 0


class PreparedStream(IterableDataset):
    """A stream's items, as `Prepared` gives them."""

    def __init__(self, stream: Stream, transform: Prepare):
        self.stream = stream
        self.transform = transform

    def __iter__(self) -> Iterator[PreparedItem]:
        for image, target, problem, missing in self.stream.reads():
            yield self.transform(image or BLANK), target, problem, missing


class EvalBatches:
    """Batches of (images, int64 class indices), each image once; one that cannot be read has the class `IGNORED`.

    Each problem is reported. After a pass, `damaged` and `missing` are how many images could not be read, and how many
    of those that were announced, by shards say, are not there.

    Args:
        loader: of `Prepared` or `PreparedStream`.
        announced: how many images there are said to be; 0 where that is not known.
        max_corrupt: how many may be damaged; any number where None.
        max_missing: how many may be missing.
        report: called with each problem.
    """

    def __init__(
        self,
        loader: DataLoader,
        announced: int,
        max_corrupt: int | None,
        max_missing: int,
        report: Callable[[str], None],
    ):
        self.loader = loader
        self.announced = announced
        self.max_corrupt, self.max_missing = max_corrupt, max_missing
        self.report = report
        self.damaged = self.missing = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.damaged = self.missing = good = 0
        for images, targets, problems, missing in self.loader:
            for problem, count in zip(problems, missing.tolist(), strict=True):
                good += not problem
                if problem:
                    self.report(f"{problem}: not counted")
                    self.missing += count
                    self.damaged += not count
                    self._check(problem)
            yield images, targets
        if (rest := self.announced - good - self.damaged - self.missing) > 0:
            self.missing += rest
            self._check("the data end before")

    def _check(self, problem: str) -> None:
        if self.missing > self.max_missing:
            raise InputError(f"{self.missing} of {self.announced or 'all'} announced images are missing "
                             f"({problem}); complete the data, or correct what announces them")  # fmt: skip
        if self.max_corrupt is not None and self.damaged > self.max_corrupt:
            raise InputError(f"{self.damaged} damaged images, and {self.max_corrupt} are allowed; replace or remove "
                             f"them, or allow more with --max-corrupt; one of them: {problem}")  # fmt: skip


def check_loader(batch_size: int, workers: int, max_corrupt: int) -> None:
    """Check the options of an evaluation's loader.

    Raises:
        InputError: one is out of range, or there are more workers than this machine has use for.
    """
    for name, value, lowest, highest in (
        ("batch-size", batch_size, 1, 1_000_000), ("workers", workers, 0, max_workers()),
        ("max-corrupt", max_corrupt, 0, 10**9),
    ):  # fmt: skip
        if not lowest <= value <= highest:
            raise InputError(f"--{name} {value} is out of range; choose {lowest} to {highest}")


def max_workers() -> int:
    """The highest number of a loader's processes that is taken for meant."""
    return max(64, 4 * (os.cpu_count() or 1))


def eval_loader(
    dataset: Images | Stream,
    transform: Prepare,
    batch_size: int,
    workers: int = 0,
    max_corrupt: int | None = MAX_CORRUPT,
    max_missing: int = 0,
    report: Callable[[str], None] = terminal.report,
) -> EvalBatches:
    """Every image once, in order: batches of (what `transform` makes, int64 (B,)); see `EvalBatches`."""
    if isinstance(dataset, Stream):
        dataset.reader.set_loader_cfg(num_workers=workers)
        streamed = PreparedStream(dataset, transform)
        loader = DataLoader(streamed, batch_size, num_workers=workers, worker_init_fn=ignore_interrupt)
        return EvalBatches(loader, dataset.announced, max_corrupt, max_missing, report)
    loader = DataLoader(
        Prepared(dataset, transform), batch_size, num_workers=workers, worker_init_fn=ignore_interrupt,
        persistent_workers=workers > 0,
    )  # fmt: skip
    return EvalBatches(loader, len(dataset), max_corrupt, max_missing, report)


def ignore_interrupt(worker: int) -> None:
    """For a loader's workers: Ctrl-C is for the process that they serve, and that ends them by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
