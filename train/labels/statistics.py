"""What is known of the labels of all training images before training: class counts, mean and deviation of a value."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shvit.errors import InputError

from ..data.datasets import Images
from ..recipe import Recipe
from .images import LabeledImages


@dataclass(frozen=True)
class LabelStatistics:
    """Statistics of the labels of all training images."""

    images: int = 0
    class_counts: Sequence[int] | None = None
    """Images of each class, or with each label, where classes are balanced."""
    dense: bool = False
    """True if targets are vectors: proportions of classes, labels or a value."""
    mean: float = 0.0
    """Mean and standard deviation of a regression's value."""
    std: float = 1.0


def label_statistics(dataset: Images, recipe: Recipe) -> LabelStatistics:
    """Return what a recipe needs to know of the labels.

    Raises:
        InputError: classes cannot be balanced, or a regression's values are all the same.
    """
    n = len(dataset)
    if not isinstance(dataset, LabeledImages):
        return LabelStatistics(n, count_classes(dataset)[1] if recipe.balances else None)
    if recipe.task == "regression":
        values = dataset.chosen.astype(np.float64)
        if values.std() == 0:
            raise InputError(f"{dataset.classes[0]} is {values.flat[0]:g} for every training image, so that there is "
                             "nothing to learn; name another column with --data.label-columns")  # fmt: skip
        return LabelStatistics(n, dense=True, mean=float(values.mean()), std=float(values.std()))
    if recipe.task == "classification":
        if recipe.balances:
            raise InputError("--class-weight and --balanced-sampling count the images of each class, and these have "
                             "proportions of classes; leave these options out")  # fmt: skip
        return LabelStatistics(n, dense=True)
    counts = dataset.class_counts if recipe.balances else None
    if counts is not None:
        _check_counts(counts, dataset.classes)
    return LabelStatistics(n, counts, dense=True)


def count_classes(dataset: Images) -> tuple[list[int], list[int]]:
    """Return the class index of each image, and the number of images of each class.

    Raises:
        InputError: the dataset does not list the classes of its images, or has classes without an image.
    """
    targets = dataset.targets
    if targets is None:
        raise InputError("--class-weight and --balanced-sampling need the class of every image before training, and "
                         "this dataset does not list them; leave these options out")  # fmt: skip
    size = len(dataset.classes)
    place = next((place for place, target in enumerate(targets) if not 0 <= target < size), None)
    if place is not None:
        raise InputError(f"{dataset.name(place)}: of class {targets[place]}, and there are {size}, counted from 0; "
                         "correct it, or leave out --class-weight and --balanced-sampling")  # fmt: skip
    counts = np.bincount(targets, minlength=size).tolist()
    _check_counts(counts, dataset.classes)
    return targets, counts


def _check_counts(counts: Sequence[int], classes: Sequence[str]) -> None:
    if 0 in counts:
        raise InputError(f"no training image of {classes[list(counts).index(0)]}, so that it cannot be balanced; add "
                         "images of it, or leave out --class-weight and --balanced-sampling")  # fmt: skip
