"""Images whose targets are vectors: proportions of classes, labels, or a value."""

from collections.abc import Sequence

import numpy as np

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
    """

    def __init__(
        self,
        source: Files | TarFiles,
        classes: Sequence[str],
        labels: np.ndarray,
        task: Task,
        indices: Sequence[int] | None = None,
        part: str = "all images",
    ):
        super().__init__(source, classes, indices, part)
        self.labels = labels
        self.task = task

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
        return self.chosen.sum(0).round().astype(int).tolist()

    def describe(self, index: int) -> str:
        """Return the labels of an item, for the identity of the images."""
        return " ".join(f"{value:.9g}" for value in self.labels[self.indices[index]])

    def reordered(self, index: Sequence[int], classes: Sequence[str]) -> "LabeledImages":
        """Return the images with other classes' targets, NaN for those that these images do not tell.

        Args:
            index: for each of `self.classes` the place among `classes`, or -1 to leave it out.
        """
        labels = np.full((len(self.labels), len(classes)), np.nan, np.float32)
        for old, new in enumerate(index):
            if new >= 0:
                labels[:, new] = self.labels[:, old]
        return LabeledImages(self.source, classes, labels, self.task, self.indices, self.part).read_as(self.pixels)

    def subset(self, indices: Sequence[int], part: str) -> "LabeledImages":
        """Return other items of the same source."""
        return LabeledImages(self.source, self.classes, self.labels, self.task, indices, part).read_as(self.pixels)
