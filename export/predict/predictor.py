"""The public `Predictor`: predictions for batches as data engines give them, in whichever process they run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np

from shvit.errors import InputError, refuse, some
from shvit.files import is_there, sha256
from shvit.img_size import ImgSize, ImgSizeLike
from shvit.weights.manifest import read_manifest
from shvit.weights.resolve import Log, Weights, find_weights, resolve_weights

from ..backends.registry import artifact_sha256
from .batches import NewColumns, prepare_images
from .job import predict_batch
from .models import Features, LoadedModel, open_artifact, open_checkpoint
from .outputs import Columns

if TYPE_CHECKING:
    import datasets
    import pandas
    import pyarrow

DEFAULT_WEIGHTS = "shvit_s4.in1k"
PIXELS = ("image", "bytes", "content")
"""Columns of images: the usual name, and what Ray's `read_binary_files` and Spark's `binaryFile` call them."""
PATH = "path"
MAX_OPEN = 4  # models that a process keeps
Frame = TypeVar("Frame", dict[str, Any], "pandas.DataFrame", "pyarrow.Table")


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
        top: number of classes for each image, the most probable first; 5 by default, or all where there are fewer. Of a
            multi-label model, those labels by default whose probability reaches their threshold, which may be none.
        features: give embeddings in place of classes: "pooled", what the classifier is given, or "maps", one for each
            stage.
        img_size: input size in pixels, one number or (height, width); by default the one that the model was trained
            for.

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
    img_size: ImgSizeLike | None = None
    sha256: str | None = field(init=False, default=None)
    """Hash of the file; None for weights with a published name, whose hash is checked when they are downloaded."""

    def __post_init__(self) -> None:
        self._check()
        for name in ("checkpoint", "artifact"):
            given = getattr(self, name)
            if given is not None:  # absolute: a process elsewhere has another working directory
                object.__setattr__(self, name, str(Path(given).absolute() if is_there(given) else given))
        if self.img_size is not None:
            object.__setattr__(self, "img_size", ImgSize.of(self.img_size, "--img-size"))
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
        if self.checkpoint is None or (not is_there(self.checkpoint) and _is_published(self.checkpoint)):
            return None
        return sha256(find_weights(self.checkpoint)[0])

    def open(self, log: Log = lambda line: None) -> LoadedModel:
        """Return the model, newly opened.

        Args:
            log: called with a line about what is done that was not asked for.

        Raises:
            InputError: its file cannot be used, is not the one that was there when this object was made, has fewer
                than `top` classes, or is a regression's and `top` is given.
            CheckFailed: an artifact is not the one that its certificate describes.
        """
        if self.sha256 is not None and self._digest() != self.sha256:
            raise InputError(f"{self.artifact or self.checkpoint}: is another file here than where it was named first "
                             "(their hashes differ); give all processes the same one")  # fmt: skip
        model = self._open(log)
        if model.spec.task == "regression":
            refuse("the model predicts a value, and has no classes", top=self.top)
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
        """Return the number of classes that each image is given; 0 for labels, a value, and features."""
        if self.features or (self.top is None and model.spec.task != "classification"):
            return 0
        return self.top or min(5, len(model.classes))

    # --- batches ------------------------------------------------------------------------------------------------------

    def __call__(self, batch: Frame) -> Frame:
        """Return a batch with `labels` and `probabilities`, or `value`, or each array of features, and `error`.

        Args:
            batch: a dict (or another mapping) of columns, which are arrays or lists, a pandas DataFrame, or an Arrow
                table. Images are in the column `image`, `bytes` or `content`: PIL images, uint8 (H, W, C) or (H, W),
                the bytes of files, or dicts of `bytes` or `path`; without such a column, in the files that `path`
                names. For a model of other channels or types, arrays are as in its .npy files.

        Returns:
            The same kind of batch, with its other columns, and without that of the images. `error` is None, or why an
            image cannot be read, and then the others are None. Features are float32 (B, …) in a dict, with NaN in place
            of None; in a DataFrame and a table, each is flat.

        Raises:
            InputError: there is no such column, or as `open`.
        """
        names = _column_names(batch)
        source = next((name for name in (*PIXELS, PATH) if name in names), None)
        if source is None:
            raise InputError(f"the batch has the columns {some(names)}, and none of images; name it one of "
                             f"{', '.join((*PIXELS, PATH))}")  # fmt: skip
        images = batch[source].to_pylist() if _is_table(batch) else list(batch[source])
        new = self._predict(images)
        dropped = [name for name in names if name in PIXELS]
        if isinstance(batch, Mapping):
            return {**{name: batch[name] for name in names if name not in dropped}, **new.as_arrays()}
        if _is_table(batch):
            return new.append_to(batch.drop_columns(dropped))
        return batch.drop(columns=dropped).assign(**new.as_lists())

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

        text, number = datasets.Value("string"), datasets.Value("float32")
        types = {"labels": datasets.List(text), "probabilities": datasets.List(number), "value": number}
        columns = self._columns(opened_model(self))
        added = {name: _array_of(shape) for name, shape in columns.shapes.items()}
        added |= {name: types[name] for name in columns.predicted}
        return datasets.Features({**features, **added, "error": text})

    def _columns(self, model: LoadedModel) -> Columns:
        top = self.count_classes(model)
        return Columns(model.kind(top), top, False, model.shapes)

    def _predict(self, images: Sequence[Any]) -> NewColumns:
        model = opened_model(self)
        columns = self._columns(model)
        records, arrays = (
            predict_batch(model, prepare_images(images, model.spec), columns.top) if len(images) else ([], b"")
        )
        return NewColumns(columns, records, np.frombuffer(arrays, columns.dtype) if columns.shapes else None)


def _is_table(batch: object) -> bool:
    return hasattr(batch, "column_names")


def _column_names(batch: Any) -> list[str]:
    return list(batch.column_names if _is_table(batch) else batch)


def _is_published(name: str | Path) -> bool:
    return any(entry.name == str(name) for entry in read_manifest())


@lru_cache(maxsize=MAX_OPEN)
def opened_model(predictor: Predictor) -> LoadedModel:
    """Return the predictor's model, opened once in a process."""
    return predictor.open()


def _array_of(shape: tuple[int, ...]) -> Any:
    import datasets

    kinds = {2: datasets.Array2D, 3: datasets.Array3D, 4: datasets.Array4D}
    return kinds[len(shape)](shape, "float32") if len(shape) > 1 else datasets.List(datasets.Value("float32"), *shape)
