"""Which photographs: folders, tars and timm's datasets, split without leaks, and unusable ones named."""

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import IterableImageDataset
from timm.data.readers.reader import Reader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from shvit.errors import InputError

from .images import open_image, to_rgb
from .recipe import Data

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
NAMED = ("wds/", "hfds/", "hfids/", "tfds/", "torch/")  # timm's prefixes of datasets that are no folder
Split = Literal["train", "val"]
Sample = tuple[Path, int]


COMMON = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
"""Suffixes of what is surely a photograph; a .tif may be anything."""


def photograph_files(folder: Path | None) -> list[Path]:
    """The photographs in a folder and below, sorted; those that scikit-image brings where None.

    Raises:
        InputError: the folder is not there or holds none.
    """
    if folder is None:
        import skimage

        folder = Path(skimage.__file__).parent / "data"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of photographs")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in COMMON)
    if not paths:
        raise InputError(f"{folder}: no photographs in it ({', '.join(sorted(COMMON))})")
    return paths


class Files(Reader):
    """Photographs by path, as one of timm's readers."""

    def __init__(self, samples: Sequence[Sample]):
        super().__init__()
        self.samples = list(samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return path.name if basename else str(path)


class Photographs(Dataset):
    """Photographs with their classes: item i is (RGB image, class index).

    Files are read when an item is asked for; a damaged one raises InputError and is named.

    Args:
        source: a reader of timm's, or anything whose items are (file or image, class index).
        classes: names, by class index.
        indices: the items of `source` that are taken; all where None.
    """

    def __init__(self, source: Any, classes: Sequence[str], indices: Sequence[int] | None = None):
        self.source = source
        self.classes = list(classes)
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.source[self.indices[index]]
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
        return [(Path(self.name(i)), int(self.source[self.indices[i]][1])) for i in range(len(self))]

    def every(self, step: int, start: int) -> "Photographs":
        """Item `start` and every `step`-th after it: one process's share."""
        return Photographs(self.source, self.classes, self.indices[start::step])


# --- which photographs ------------------------------------------------------------------------------------------------


def open_dataset(root: Path | None, split: Split) -> Photographs:
    """The training or the held-out photographs.

    Args:
        root: a folder with train/ and val/ (or validation/) of class folders, or .tar files of these names; or a folder
            or a tar of class folders alone, of which about every tenth photograph, chosen by a hash of its file name,
            is held out; None for `elpv`.

    Raises:
        InputError: no such folder, no photographs, an empty class, or classes that differ between the splits.
    """
    if root is None:
        return elpv(split)
    training, held_out = _split_of(root, ("train",)), _split_of(root, ("val", "validation"))
    if (training is None) != (held_out is None):
        found = f"{(training or held_out).name}"  # type: ignore[union-attr]
        missing = "neither val/ nor validation/" if held_out is None else "no train/"
        raise InputError(f"{root} holds {found} but {missing}; give both, or class folders alone")
    if training is not None and held_out is not None:
        datasets = {"train": _scan(training), "val": _scan(held_out)}
        if datasets["train"].classes != datasets["val"].classes:
            unequal = sorted(set(datasets["train"].classes) ^ set(datasets["val"].classes))
            splits = " and ".join(f"{path.name}{'/' if path.is_dir() else ''}" for path in (training, held_out))
            raise InputError(f"{root}: classes in only one of {splits}: {', '.join(unequal)}")
        return datasets[split]
    everything = _scan(root)
    names = (Path(everything.name(i)).name for i in range(len(everything)))
    chosen = [i for i, name in enumerate(names) if _is_held_out(name) == (split == "val")]
    if not chosen:
        raise InputError(f"{root}: {len(everything)} photographs are too few to hold some out; give train/ and val/")
    return Photographs(everything.source, everything.classes, chosen)


def open_eval_dataset(data: str | Path, split: str = "validation") -> "Photographs | Stream":
    """The photographs to evaluate on.

    Args:
        data: a folder of class folders or its val (or validation) subfolder, a tar of one, a folder of WebDataset
            shards with an _info.json, `elpv` for that dataset's held-out ones, or a name such as torch/cifar10 or
            hfds/beans that timm knows, which is looked for in the working directory or its library's cache.
        split: of shards and of a dataset with a name.
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
    if root.is_dir() and ((root / "_info.json").exists() or (root / "info.json").exists()):
        return open_stream(Data(name="wds/", root=root, val_split=split), "val")
    return _scan(_split_of(root, ("val", "validation")) or root)


def _split_of(root: Path, names: Sequence[str]) -> Path | None:
    """The folder or the tar of one split, or None."""
    candidates = [root / name for name in names]
    return next((path for path in candidates if path.is_dir()), None) or next(
        (tar for path in candidates if (tar := path.with_suffix(".tar")).is_file()), None
    )


def _is_held_out(name: str) -> bool:
    """About every tenth name, the same on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] < 256 / 10


def _scan(root: Path) -> Photographs:
    """Class folders, in alphabetical order, and every photograph in them and below; or a tar of such folders."""
    if root.is_file() and root.suffix == ".tar":
        return _scan_tar(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder" + (" (of files, a .tar is taken)" if root.is_file() else ""))
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise InputError(f"{root}: no class folders in it; put each class's photographs into a folder of their own")
    samples: list[Sample] = []
    for target, folder in enumerate(folders):
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"{folder}: an empty class; remove the folder or put photographs into it")
        samples += [(path, target) for path in found]
    return Photographs(Files(samples), [folder.name for folder in folders])


def _scan_tar(path: Path) -> Photographs:
    """A tar of class folders, by timm's reader, which orders classes as people count (class2 before class10)."""
    import tarfile

    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    try:
        # No cache of the index: it is a pickle. No cache of open files: processes would share their positions.
        reader = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: not a readable tar of class folders with photographs ({error})") from error
    return Photographs(reader, sorted(reader.class_name_to_idx, key=reader.class_name_to_idx.__getitem__))


# --- datasets with a name ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Photographs that are read from front to back, by one of timm's datasets; the classes' names by class index."""

    name: str
    dataset: IterableImageDataset
    classes: list[str]

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        """(RGB image, class index) of each photograph; `open_stream` has timm's reader leave images as they are."""
        for image, target in self.dataset:
            yield to_rgb(image, f"an image of {self.name}"), int(target)

    def __len__(self) -> int:
        """What the dataset says of itself."""
        return self.dataset.reader.num_samples


def is_stream(data: Data) -> bool:
    """Whether the dataset is read from front to back: WebDataset shards, Hugging Face streams, TensorFlow datasets."""
    return data.name.startswith(("wds/", "hfids/", "tfds/"))


def open_named(data: Data, split: Split) -> Photographs:
    """A dataset with a name whose items can be asked for in any order.

    Raises:
        InputError: it is not known, cannot be opened, or a package for it is missing.
    """
    dataset = _create_dataset(data, split)
    if hasattr(dataset, "loader"):  # torchvision's datasets of files
        dataset.loader = _open_path
    source = getattr(dataset, "reader", dataset)
    known = getattr(source, "class_to_idx", None) or getattr(dataset, "class_to_idx", None) or {}
    classes = sorted(known, key=known.__getitem__)
    return Photographs(source, classes or _numbered(data))


def _open_path(path: str) -> Image.Image:
    return open_image(Path(path))


def open_stream(data: Data, split: Split, is_training: bool = False, batch_size: int = 1, seed: int = 0) -> Stream:
    """A dataset that is read from front to back; each process and each of its workers gets its own shards.

    Args:
        batch_size: of one process, to which a training pass is rounded up.
        seed: of the shards' and the photographs' order.
    """
    decoded = {} if data.name.startswith("tfds/") else {"input_img_mode": ""}  # as they are in the file, for `to_rgb`
    dataset = _create_dataset(data, split, is_training=is_training, batch_size=batch_size, seed=seed, **decoded)
    known = getattr(dataset.reader, "class_to_idx", None) or {}
    return Stream(data.name, dataset, sorted(known, key=known.__getitem__) or _numbered(data))


def _numbered(data: Data) -> list[str]:
    return [str(i) for i in range(data.num_classes or 0)]


def _create_dataset(data: Data, split: Split, **options: Any) -> Any:
    from timm.data import create_dataset

    if not data.name.startswith(NAMED):
        raise InputError(f"data.name {data.name!r} is not known; it begins with one of {', '.join(NAMED)}")
    name = data.train_split if split == "train" else data.val_split
    root = None if data.root is None else str(data.root)
    with missing_packages_named(data.name):
        return create_dataset(data.name, root, split=name, **options)


@contextmanager
def missing_packages_named(name: str) -> Iterator[None]:
    """Turns what the libraries behind timm's readers raise into one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"{name}: needs the package {error.name}; install it with: pip install {error.name}"
        ) from error
    except InputError:
        raise
    except Exception as error:  # each library has its own
        first = (str(error).splitlines() or [""])[0][:300]
        raise InputError(f"{name}: cannot be opened ({type(error).__name__}: {first})") from error


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
    return Photographs(Files(chosen), classes)


# --- for evaluation ---------------------------------------------------------------------------------------------------


class Prepared(Dataset):
    """Items as (what `transform` makes of the photograph, class index); see `eval_loader` for `tolerant`."""

    def __init__(self, dataset: Photographs, transform: Callable[[Image.Image], torch.Tensor], tolerant: bool):
        self.dataset = dataset
        self.transform = transform
        self.tolerant = tolerant

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            image, target = self.dataset[index]
        except InputError:
            if not self.tolerant:
                raise
            image, target = Image.new("RGB", (8, 8)), IGNORED
        return self.transform(image), target


class PreparedStream(IterableDataset):
    """A stream's items as (what `transform` makes of the photograph, class index)."""

    def __init__(self, stream: Stream, transform: Callable[[Image.Image], torch.Tensor]):
        self.stream = stream
        self.transform = transform

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for image, target in self.stream:
            yield self.transform(image), target


IGNORED = -1
"""The class index of a photograph that does not count."""


def eval_loader(
    dataset: Photographs | Stream,
    transform: Callable[[Image.Image], torch.Tensor],
    batch_size: int,
    workers: int = 0,
    tolerant: bool = False,
) -> DataLoader:
    """Every photograph once, in order: batches of (what `transform` makes, int64 (B,)).

    Args:
        tolerant: give damaged photographs the class `IGNORED` rather than raise.
    """
    if isinstance(dataset, Stream):
        dataset.dataset.set_loader_cfg(num_workers=workers)
        streamed = PreparedStream(dataset, transform)
        return DataLoader(streamed, batch_size, num_workers=workers, worker_init_fn=ignore_interrupt)
    prepared = Prepared(dataset, transform, tolerant)
    return DataLoader(
        prepared, batch_size, num_workers=workers, worker_init_fn=ignore_interrupt, persistent_workers=workers > 0
    )


def ignore_interrupt(worker: int) -> None:
    """For a loader's workers: Ctrl-C is for the process that they serve, and that ends them by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
