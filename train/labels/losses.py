"""The loss of the labels for each task; timm's and PyTorch's, where they have it."""

from timm.loss import create_classification_loss
from timm.loss.class_weights import compute_class_weights
from torch import nn

from ..recipe import Recipe
from .balance import ClassWeightedCrossEntropy, balanced_class_weight
from .statistics import LabelStatistics


def create_criterion(recipe: Recipe, statistics: LabelStatistics) -> nn.Module:
    """Create the loss of a batch's outputs and targets, averaged over images, for the recipe's task."""
    if recipe.task == "regression":
        return nn.SmoothL1Loss()  # of values in standard deviations
    if recipe.task == "multi_label":
        return _multi_label(recipe, statistics)
    smoothing = recipe.augment.smoothing
    if recipe.class_weight is None:
        soft = recipe.mixes or statistics.dense
        return create_classification_loss(smoothing=smoothing, soft_targets=soft)
    assert statistics.class_counts is not None
    return ClassWeightedCrossEntropy(balanced_class_weight(statistics.class_counts), smoothing)


def _multi_label(recipe: Recipe, statistics: LabelStatistics) -> nn.Module:
    """Create timm's loss of independent labels, averaged over them too; timm's asymmetric loss is else their sum."""
    weight = None
    if statistics.class_counts is not None:
        _, weight = compute_class_weights(statistics.class_counts, statistics.images, "neg_pos")
    return create_classification_loss(
        recipe.multi_label_loss, multi_label=True, pos_weight=weight, asl_reduction="mean"
    )
