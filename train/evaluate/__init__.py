"""Installed as `shvit.train.evaluate`: the figures of any function from images to outputs, for each task."""

from .classification import Counts, Evaluation, Predict, count, evaluate, plot_confusion

__all__ = ["Counts", "Evaluation", "Predict", "count", "evaluate", "plot_confusion"]
