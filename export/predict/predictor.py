"""The public `Predictor`: predictions for batches as data engines give them, in whichever process they run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np
import torch
from PIL import Image

from shvit.errors import InputError, refuse, some
from shvit.files import is_there, sha256
from shvit.train.data.eval_loader import BLANK
from shvit.train.data.images import MAX_BYTES, open_image, to_rgb
from shvit.train.data.locations import check_path
from shvit.weights.resolve import Log, Weights, find_weights, resolve_weights

from ..backends.registry import artifact_sha256
from .job import predict_batch
from .loading import BEGINNING, Batch, Item
from .models import Features, LoadedModel, open_artifact, open_checkpoint
from .outputs import Columns

if TYPE_CHECKING:
    import datasets
    import pandas

DEFAULT_WEIGHTS = "shvit_s4.in1k"
PIXELS = ("image", "bytes", "content")
"""Columns of images: the usual name, and what Ray's `read_binary_files` and Spark's `binaryFile` call them."""
PATH = "path"
MAX_OPEN = 4  # models that a process keeps
Frame = TypeVar("Frame", dict[str, Any], "pandas.DataFrame")


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Predictions for batches of images: a callable for Ray Data, Spark, Hugging Face datasets, or a loop of your own.

    It holds its arguments and the hash of the file that they name, and is pickled as these. Each process that calls it
    opens the file once, and refuses one with another hash. Without a checkpoint, an artifact or a model, the published
    weights shvit_s4.in1k are taken.

    Args:
        checkpoint: weights in any layout, the folder of a run, or a name of `shvit weights list`.
        artifact: a file of `shvit export`, in place of a checkpoint.
        model: a name that timm knows; by default the checkpoint's own model.
        pretrained: take the model's published weights in place of a checkpoint.
        ema: take the checkpoint's EMA weights.
        top: number of classes for each image, the most probable first; 5 by default, or all where there are fewer.
        features: give embeddings in place of classes: "pooled", what the classifier is given, or "maps", one for each
            stage.
        img_size: input height and width in pixels; those that the model was trained for by default.

    Raises:
        InputError: arguments exclude each other, or no such file is there.
    """

    checkpoint: str | Path | None = None
    artifact: str | Path | None = None
    model: str | None = None
    pretrained: bool = False
    ema: bool = False
    top: int | None = None
    features: Features | None = None
    img_size: int | None = None
    sha256: str | None = field(init=False, default=None)
    """Hash of the file; None for weights with a published name, whose hash is checked when they are downloaded."""

    def __post_init__(self) -> None:
        self._check()
        for name in ("checkpoint", "artifact"):
            given = getattr(self, name)
            if given is not None:  # absolute: a process elsewhere has another working directory
                object.__setattr__(self, name, str(Path(given).absolute() if is_there(given) else given))
        object.__setattr__(self, "sha256", self._digest())

    def _check(self) -> None:
        if self.artifact is not None:
            refuse(f"{self.artifact} holds its model and weights", model=self.model, checkpoint=self.checkpoint,
                   pretrained=self.pretrained, ema=self.ema)  # fmt: skip
        elif self.checkpoint is None and not self.pretrained:
            if self.model is not None:
                raise InputError(f"--model {self.model}: with which weights? give --checkpoint, or --pretrained")
            refuse("without a checkpoint there are no EMA weights", ema=self.ema)
        if self.top is not None and self.top < 1:
            raise InputError(f"--top {self.top} is out of range; choose 1 or more")
        if self.features is not None:
            refuse("features have no classes", top=self.top)
            if self.features not in get_args(Features):
                raise InputError(f"--features {self.features}: choose from {', '.join(get_args(Features))}")

    def _digest(self) -> str | None:
        if self.artifact is not None:
            return artifact_sha256(Path(self.artifact))
        if self.checkpoint is None or not is_there(self.checkpoint):
            return None
        return sha256(find_weights(self.checkpoint)[0])

    def open(self, log: Log = lambda line: None) -> LoadedModel:
        """Return the model, newly opened.

        Args:
            log: called with a line about what is done that was not asked for.

        Raises:
            InputError: its file cannot be used, is not the one that was there when this object was made, or has fewer
                than `top` classes.
            CheckFailed: an artifact is not the one that its certificate describes.
        """
        if self.sha256 is not None and self._digest() != self.sha256:
            raise InputError(f"{self.artifact or self.checkpoint}: is another file here than where it was named first "
                             "(their hashes differ); give all processes the same one")  # fmt: skip
        model = self._open(log)
        if self.top is not None and self.top > len(model.classes):
            raise InputError(f"--top {self.top}: the model has {len(model.classes)} classes; choose 1 to "
                             f"{len(model.classes)}")  # fmt: skip
        return model

    def _open(self, log: Log) -> LoadedModel:
        if self.artifact is None:
            return open_checkpoint(self._weights(log), self.img_size, self.features, log)
        model = open_artifact(Path(self.artifact), self.features)
        if self.img_size not in (None, model.spec.img_size):
            raise InputError(f"{self.artifact} takes {model.spec.img_size} px; leave out --img-size {self.img_size}")
        return model

    def _weights(self, log: Log) -> Weights:
        if self.checkpoint is not None or self.pretrained:
            return resolve_weights(self.model, self.checkpoint, self.ema, self.pretrained, log)
        try:
            return resolve_weights(None, DEFAULT_WEIGHTS, log=log)
        except InputError as error:
            raise InputError(f"{error}; offline, give weights that are here, as --checkpoint or --artifact") from error

    def count_classes(self, model: LoadedModel) -> int:
        """Return the number of classes that each image is given; 0 for features."""
        return 0 if self.features else self.top or min(5, len(model.classes))

    # --- batches ------------------------------------------------------------------------------------------------------

    def __call__(self, batch: Frame) -> Frame:
        """Return a batch with `labels` and `probabilities`, or each array of features, and `error`.

        Args:
            batch: a dict (or another mapping) of columns, which are arrays or lists, or a pandas DataFrame. Images are
                in the column `image`, `bytes` or `content`: PIL images, uint8 (H, W, C) or (H, W), the bytes of files,
                or dicts of `bytes` or `path`; without such a column, in the files that `path` names.

        Returns:
            A dict or a DataFrame, with the other columns of the batch, and without that of the images. `error` is None,
            or why an image cannot be read, and then the others are None. Features are float32 (B, …) in a dict, with
            NaN in place of None; in a DataFrame, each is flat.

        Raises:
            InputError: there is no such column, or as `open`.
        """
        columns = batch if isinstance(batch, Mapping) else {name: batch[name] for name in batch}
        source = next((name for name in (*PIXELS, PATH) if name in columns), None)
        if source is None:
            raise InputError(f"the batch has the columns {some(list(columns))}, and none of images; name it one of "
                             f"{', '.join((*PIXELS, PATH))}")  # fmt: skip
        predicted = self._predict(list(columns[source]))
        if isinstance(batch, Mapping):
            return {**{name: batch[name] for name in batch if name not in PIXELS}, **predicted}
        return batch.drop(columns=[name for name in PIXELS if name in batch]).assign(**_flat(predicted))

    def map_in_pandas(self, frames: Iterable["pandas.DataFrame"]) -> Iterator["pandas.DataFrame"]:
        """Yield the predictions for each DataFrame; a function for Spark's `mapInPandas`."""
        return map(self, frames)

    def output_features(self, features: "datasets.Features") -> "datasets.Features":
        """Return the types of a Hugging Face dataset with its predictions, for the argument `features` of its `map`.

        Without them `datasets` takes the types from the first 1,000 images, of which no `error` may have any.

        Args:
            features: those of the dataset, `dataset.features`.
        """
        import datasets

        model = _opened(self)
        text, number = datasets.Value("string"), datasets.Value("float32")
        added = {name: _array_of(shape) for name, shape in model.shapes.items()} or {
            "labels": datasets.List(text),
            "probabilities": datasets.List(number),
        }
        return datasets.Features({**features, **added, "error": text})

    def _predict(self, images: Sequence[Any]) -> dict[str, Any]:
        """Return the new columns for images."""
        model = _opened(self)
        columns = Columns(self.count_classes(model), False, model.shapes)
        records, arrays = predict_batch(model, _prepare(model, images), columns.top) if len(images) else ([], b"")
        names = ("labels", "probabilities") if columns.top else ()
        rows = np.frombuffer(arrays, columns.dtype) if columns.shapes else {}
        return {
            **{name: [record.get(name) for record in records] for name in names},
            **{name: np.array(rows[name]) for name in columns.shapes},
            "error": [record.get("error") for record in records],
        }


@lru_cache(maxsize=MAX_OPEN)
def _opened(predictor: Predictor) -> LoadedModel:
    """Return the predictor's model, opened once in a process."""
    return predictor.open()


def _array_of(shape: tuple[int, ...]) -> Any:
    import datasets

    kinds = {2: datasets.Array2D, 3: datasets.Array3D, 4: datasets.Array4D}
    return kinds[len(shape)](shape, "float32") if len(shape) > 1 else datasets.List(datasets.Value("float32"), *shape)


def _flat(predicted: dict[str, Any]) -> dict[str, Any]:
    """Return columns for a DataFrame: arrays as a list of flat ones, None for images that could not be read."""
    return {
        name: [None if error else row.reshape(-1) for row, error in zip(values, predicted["error"], strict=True)]
        if isinstance(values, np.ndarray) else values
        for name, values in predicted.items()
    }  # fmt: skip


# --- images -----------------------------------------------------------------------------------------------------------


def _prepare(model: LoadedModel, images: Sequence[Any]) -> Batch:
    """Return images as the model wants them; those that cannot be read have a problem, and are black."""
    transform = model.spec.transform(normalize=False)
    items, pixels = [], []
    for image in images:
        try:
            read, problem = _read(image), ""
        except InputError as error:
            read, problem = BLANK, str(error)
        items.append(Item(BEGINNING, NAME, problem))
        pixels.append(transform(read))
    return Batch(items, torch.stack(pixels))


NAME = "image"  # in messages, from which it is then removed


def _read(image: Any) -> Image.Image:
    """Return an image, in any of the forms in which batches hold one, in RGB.

    Raises:
        InputError: as `open_image`, or there is no image.
    """
    if isinstance(image, Mapping):
        content = image.get("bytes")
        return _read(image.get("path") if content is None else content)
    if isinstance(image, Image.Image):
        return to_rgb(image, NAME)
    if isinstance(image, bytes | bytearray | memoryview):
        if len(image) > MAX_BYTES:
            raise InputError(f"{NAME}: {len(image) / 1e9:.1f} GB is too large for an image; remove or replace it")
        return open_image(BytesIO(image), NAME)
    if isinstance(image, str | Path):
        check_path(Path(image), "the path")
        return open_image(Path(image), NAME)
    if isinstance(image, np.ndarray):
        return to_rgb(_from_array(image), NAME)
    if image is None or image != image:  # pandas has NaN in place of None
        raise InputError(f"{NAME}: there is none")
    raise InputError(f"{NAME}: is of type {type(image).__name__}; give a PIL image, an array, or the bytes of a file")


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise InputError(f"{NAME}: an array of {pixels.dtype} {pixels.shape}, and images are of uint8 (H, W, C), with "
                         "1, 3 or 4 channels")  # fmt: skip
    return Image.fromarray(np.ascontiguousarray(pixels))
