"""Named datasets, above all those that are read sequentially: shards, Hugging Face streams, TensorFlow datasets."""

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from timm.data.readers.reader import Reader

from shvit.environment import advise
from shvit.errors import InputError, first_line

from ..recipe import Data
from .images import open_image, to_rgb
from .locations import SCHEME, check_dataset_name, check_path
from .shards import Lost, Sample, Shards, class_index

Split = Literal["train", "val"]
IGNORED = -1
"""Class index of an image that does not count."""


class Read(NamedTuple):
    """The result of reading an image of a stream."""

    image: Image.Image | None
    """The image in RGB; None if it could not be read."""
    target: int
    """Class index; negative for an image that does not count."""
    problem: str = ""
    """Why it could not be read."""
    missing: int = 0
    """Number of announced images that are missing from a shard; 0 for one damaged image."""


@dataclass(frozen=True)
class Stream:
    """Images that are read sequentially from a timm reader, and the names of their classes, by class index."""

    name: str
    reader: Any
    classes: list[str]
    part: str = "all images"

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        """Yield (RGB image, class index) of each image.

        Raises:
            InputError: an image cannot be read, or has an unknown class.
        """
        for read in self.reads():
            if read.image is None:
                raise InputError(read.problem)
            yield read.image, read.target

    def reads(self) -> Iterator[Read]:
        """Yield the result of reading each image; a damaged one does not end the stream.

        Raises:
            InputError: the stream itself cannot be read further, or an image has an unknown class.
        """
        with library_errors_named(self.name):
            for place, each in enumerate(self.reader):
                read = self._read(each, place)
                if self.classes and read.target >= len(self.classes):
                    raise InputError(f"{self.name}: an image of class {read.target}, and there are "
                                     f"{len(self.classes)}, counted from 0; correct --data.num-classes")  # fmt: skip
                yield read

    def _read(self, each: Any, place: int) -> Read:
        if isinstance(each, Lost):
            return Read(None, IGNORED, each.message, each.missing)
        try:
            if isinstance(each, Sample):
                return Read(open_image(io.BytesIO(each.image), each.name), each.target)
            image, target = each
            name = f"image {place} of {self.name}"
            try:
                index = class_index(target)
            except (ValueError, TypeError, OverflowError) as error:
                raise InputError(f"{name}: its class cannot be read ({first_line(error)})") from error
            return Read(_decode(image, name), index)
        except InputError as error:
            return Read(None, IGNORED, str(error))

    def __len__(self) -> int:
        """Return the number of images that the dataset announces."""
        return self.reader.num_samples

    @property
    def announced(self) -> int:
        """Expected number of images in one pass over all workers; 0 if unknown."""
        return self.reader.num_samples if isinstance(self.reader, Shards) and self.reader.is_single_pass else 0


def _decode(image: Any, name: str) -> Image.Image:
    """Decode an image of a Hugging Face stream: bytes, the path of a file, or an address of the hub."""
    if not isinstance(image, dict):
        return to_rgb(image, name)
    if image.get("bytes"):
        return open_image(io.BytesIO(image["bytes"]), name)
    path = str(image.get("path") or "")
    if not path.startswith("hf://"):
        if not path or SCHEME.match(path):
            raise InputError(f"{name}: neither an image nor a path ({path[:80]!r})")
        return open_image(Path(path))
    import datasets

    try:
        found = datasets.Image().decode_example(image)
    except Exception as error:  # each way to fetch a file has its own
        raise InputError(f"{name}: cannot be read ({first_line(error)})") from error
    return to_rgb(found, name)


class HubImages(Reader):
    """A Hugging Face dataset's encoded images; timm's reader would block on a FIFO that a row names.

    Args:
        reader: timm's reader.
        label: name of the dataset in messages.
    """

    def __init__(self, reader: Any, label: str):
        super().__init__()
        self.reader, self.label = reader, label

    def __getitem__(self, index: int) -> tuple[io.BytesIO | Path, int]:
        item = self.reader.dataset[index]
        image = item[self.reader.image_key] or {}
        target = self.reader._get_target(item)
        if image.get("bytes"):
            return io.BytesIO(image["bytes"]), target
        if not image.get("path"):
            raise InputError(f"{self.label}[{index}]: no image")
        return Path(image["path"]), target

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def targets(self) -> list[int]:
        """Class index of every item, without reading an image."""
        with library_errors_named(self.label):
            return list(self.reader.iter_targets())

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = (self.reader.dataset[index][self.reader.image_key] or {}).get("path")
        return f"{self.label}[{index}]" + (f" ({path})" if path else "")


def is_stream(data: Data) -> bool:
    """Return whether a dataset is read sequentially: WebDataset shards, Hugging Face streams, TensorFlow datasets."""
    return data.name.startswith(("wds/", "hfids/", "tfds/"))


def open_stream(data: Data, split: Split, is_training: bool = False, batch_size: int = 1, seed: int = 0) -> Stream:
    """Open a dataset that is read sequentially; each process and each of its workers reads its own shards.

    Args:
        batch_size: batch size of one process, to a multiple of which a training pass is rounded up.
        seed: random seed of the order of shards and images.

    Raises:
        InputError: the name or location is not allowed, the dataset cannot be opened, or a package is missing.
    """
    name = check_named(data, split)
    reader: Any
    if data.name.startswith("wds/"):
        if data.root is None:
            raise InputError("data.name wds/ has no folder of shards; give --data.root")
        reader = Shards(data.root, name, is_training, batch_size, seed)
    else:
        decoded = {} if data.name.startswith("tfds/") else {"input_img_mode": ""}  # encoded, as in the file
        options = {"is_training": is_training, "batch_size": batch_size, "seed": seed, **decoded}
        reader = create_named(data, name, **options).reader
        if data.name.startswith("hfids/"):
            _leave_encoded(reader)
    known = getattr(reader, "class_to_idx", None) or {}
    return Stream(data.name, reader, sorted(known, key=known.__getitem__) or numbered(data))


def _leave_encoded(reader: Any) -> None:
    """Have timm's reader of Hugging Face streams return encoded images, which are decoded here."""
    import datasets

    prepare = reader._lazy_init

    def prepare_encoded() -> None:
        prepare()
        reader.ds = reader.ds.cast_column(reader.input_key, datasets.Image(decode=False))

    reader._lazy_init = prepare_encoded


def check_named(data: Data, split: Split) -> str:
    """Return the split's name, after checking it, the dataset's name and its location."""
    name = data.train_split if split == "train" else data.val_split
    check_dataset_name(data.name, name)
    check_path(data.root, "data.root")
    return name


PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets"}
"""Packages that timm's readers import, by prefix."""


def create_named(data: Data, split: str, **options: Any) -> Any:
    """Create timm's dataset of a name.

    Raises:
        InputError: the dataset cannot be opened, or a package is missing.
    """
    from timm.data import create_dataset

    root = None if data.root is None else str(data.root)
    with library_errors_named(data.name):
        if package := PACKAGES.get(data.name.partition("/")[0]):
            importlib.import_module(package)  # else timm prints its own advice
        return create_dataset(data.name, root, split=split, trust_remote_code=False, **options)


def numbered(data: Data) -> list[str]:
    """Return the class indices as names, for classes without names."""
    return [str(i) for i in range(data.num_classes or 0)]


@contextmanager
def library_errors_named(name: str) -> Iterator[None]:
    """Turn the errors of the libraries behind timm's readers into InputErrors."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"{name}: {advise(error.name or '', ['train'])}") from error
    except InputError:
        raise
    except Exception as error:  # each library has its own
        raise InputError(f"{name}: cannot be opened ({type(error).__name__}: {first_line(error, 300)})") from error
