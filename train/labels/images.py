"""Images whose targets are vectors: proportions of classes, labels, or a value."""

from collections.abc import Sequence

import numpy as np

from shvit.errors import InputError
from shvit.weights.run_info import Task

from ..data.datasets import Images
from ..data.image_folders import Files, TarFiles
from ..data.pixels.formats import Decoded


class LabeledImages(Images):
    """Images whose targets are float32 vectors: item i is (image, (targets,)).

    Args:
        source: reader of the files.
        classes: names of the targets: classes, labels, or one value.
        labels: float32 (images of `source`, targets).
        task: what the targets are; for classification proportions of the classes.
        others: the target of a class that is not among `classes`; NaN where nothing is known of it.
    """

    def __init__(
        self,
        source: Files | TarFiles,
        classes: Sequence[str],
        labels: np.ndarray,
        task: Task,
        indices: Sequence[int] | None = None,
        part: str = "all images",
        others: float = 0.0,
    ):
        super().__init__(source, classes, indices, part)
        self.labels = labels
        self.task = task
        self.others = others

    def __getitem__(self, index: int) -> tuple[Decoded, np.ndarray]:  # type: ignore[override]
        image, _ = super().__getitem__(index)
        return image, self.labels[self.indices[index]]

    @property
    def blank_target(self) -> np.ndarray:
        """The mean of all targets, which teaches nothing that the others do not."""
        return self.chosen.mean(0)

    @property
    def ignored_target(self) -> np.ndarray:
        """Nothing known of any target."""
        return np.full(len(self.classes), np.nan, np.float32)

    def check_target(self, index: int, target: np.ndarray) -> None:
        """Targets were checked when the table was read."""

    @property
    def targets(self) -> None:
        """None: no image has one class."""
        return None

    @property
    def chosen(self) -> np.ndarray:
        """The labels of these images, (images, targets)."""
        return self.labels[list(self.indices)]

    @property
    def class_counts(self) -> list[int]:
        """Number of images that have each label; of proportions, their sum, rounded."""
        return np.nansum(self.chosen, axis=0).round().astype(int).tolist()

    def describe(self, index: int) -> str:
        """Return the labels of an item, for the identity of the images."""
        return " ".join(f"{value:.9g}" for value in self.labels[self.indices[index]])

    def reordered(self, index: Sequence[int], classes: Sequence[str]) -> "LabeledImages":
        """Return the images with the targets of a model's classes.

        Args:
            index: for each of `self.classes` the place among `classes`, or -1 to leave it out.

        Raises:
            InputError: a class is to be left out, and images have proportions of it.
        """
        if self.task == "classification" and min(index) < 0:
            name = self.classes[list(index).index(-1)]
            raise InputError(f"images have proportions of {name}, which the model does not know, so that it cannot be "
                             "left out; take its column and these images out of the table")  # fmt: skip
        labels = np.full((len(self.labels), len(classes)), self.others, np.float32)
        for old, new in enumerate(index):
            if new >= 0:
                labels[:, new] = self.labels[:, old]
        return self._with(classes, labels, self.indices, self.part)

    def subset(self, indices: Sequence[int], part: str) -> "LabeledImages":
        """Return other items of the same source."""
        return self._with(self.classes, self.labels, indices, part)

    def _with(self, classes: Sequence[str], labels: np.ndarray, indices: Sequence[int], part: str) -> "LabeledImages":
        images = LabeledImages(self.source, classes, labels, self.task, indices, part, self.others)
        return images.read_as(self.pixels)
