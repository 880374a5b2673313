"""Batches as data engines have them: the images that they hold, in any form, and predictions as their columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from shvit.errors import InputError
from shvit.train.data.images import MAX_BYTES
from shvit.train.data.locations import check_path
from shvit.train.data.pixels.formats import Decoded, PixelFormat

from ..spec import Spec
from .journal import Record
from .loading import BEGINNING, Batch, Item
from .outputs import Columns, feature_columns, predicted_fields

if TYPE_CHECKING:
    import pyarrow

NAME = "image"  # in messages, from which it is then removed


def prepare_images(images: Sequence[Any], spec: Spec) -> Batch:
    """Return images as a model wants them; those that cannot be read have a problem, and are black."""
    transform = spec.transform(normalize=False)
    items, pixels = [], []
    for image in images:
        try:
            read, problem = _read(image, spec.pixels), ""
        except InputError as error:
            read, problem = spec.pixels.blank, str(error)
        items.append(Item(BEGINNING, NAME, problem))
        pixels.append(transform(read))
    return Batch(items, torch.stack(pixels))


def _read(image: Any, pixels: PixelFormat) -> Decoded:
    """Decode an image, in any of the forms in which batches hold one.

    Raises:
        InputError: as `PixelFormat.open`, or there is no image.
    """
    if isinstance(image, Mapping):
        content = image.get("bytes")
        return _read(image.get("path") if content is None else content, pixels)
    if isinstance(image, Image.Image):
        return pixels.convert(image, NAME)
    if isinstance(image, bytes | bytearray | memoryview):
        if len(image) > MAX_BYTES:
            raise InputError(f"{NAME}: {len(image) / 1e9:.1f} GB is too large for an image; remove or replace it")
        return pixels.open(BytesIO(image), NAME)
    if isinstance(image, str | Path):
        check_path(Path(image), "the path")
        return pixels.open(Path(image), NAME)
    if isinstance(image, np.ndarray):
        return pixels.convert(_from_array(image) if pixels.uses_pillow else image, NAME)
    if image is None or isinstance(image, float):  # pandas has NaN in place of None
        raise InputError(f"{NAME}: there is none")
    raise InputError(f"{NAME}: is of type {type(image).__name__}; give a PIL image, an array, or the bytes of a file")


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise InputError(f"{NAME}: an array of {pixels.dtype} {pixels.shape}, and images are of uint8 (H, W, C), with "
                         "1, 3 or 4 channels")  # fmt: skip
    return Image.fromarray(np.ascontiguousarray(pixels))


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewColumns:
    """The predictions for a batch, as new columns of any kind of batch."""

    columns: Columns
    records: list[Record]
    rows: np.ndarray | None
    """Features: an array of structures, with a field for each of them."""

    def as_lists(self) -> dict[str, list[Any]]:
        """Return lists; those of features hold a flat array for each image, or None."""
        found = {name: [record.get(name) for record in self.records] for name in (*self.columns.predicted, "error")}
        flat = {
            name: [None if error else row.reshape(-1) for row, error in zip(rows, found["error"], strict=True)]
            for name, rows in self._features().items()
        }
        return {**flat, **found}

    def as_arrays(self) -> dict[str, Any]:
        """Return lists, and for each of the features an array (B, …)."""
        return {**self.as_lists(), **self._features()}

    def append_to(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """Return a table with the predictions, whose types do not depend on what the batch holds."""
        import pyarrow

        values: dict[str, Any] = self.as_lists()
        if self.rows is not None:
            damaged = np.array([error is not None for error in values["error"]], bool)
            values |= feature_columns(self.rows, damaged, self.columns)
        for each in predicted_fields(self.columns):
            value = values[each.name]
            table = table.append_column(each, pyarrow.array(value, each.type) if isinstance(value, list) else value)
        return table

    def _features(self) -> dict[str, np.ndarray]:
        return {} if self.rows is None else {name: np.array(self.rows[name]) for name in self.columns.shapes}
