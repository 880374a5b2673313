"""Average precision of each label, and the probability from which it is predicted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from shvit.errors import InputError, printable
from shvit.files import atomic_write

from .classification import Predict
from .scores import Scores, collect

MIN_POSITIVES = 20
"""Images with a label, fewer of which choose no threshold of its own: it has the one that is best for all labels. F1 of
a label that was not learned is highest where every image is predicted to have it."""
MAX_DRAWN = 10  # labels with a curve of their own


@dataclass(frozen=True)
class MultiLabelEvaluation:
    """Figures over a set of images, each counted once. Percent."""

    map: float
    """Mean average precision: mean of `average_precision` over the labels that images have."""
    micro_f1: float
    """F1 over all labels of all images, predicted from a probability of 0.5, or from the given thresholds."""
    n: int
    """Images."""
    loss: float
    """Mean binary cross-entropy of a label, in nats."""
    average_precision: tuple[float, ...]
    """Of each label, as scikit-learn computes it; 0 for a label that no image has."""
    positives: tuple[int, ...]
    """Images with each label."""
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    best_thresholds: tuple[float, ...]
    """The probability of each label from which its F1 on these images is highest."""


@dataclass(frozen=True)
class LabelScores:
    """The scores of an evaluation of labels."""

    scores: Scores
    thresholds: tuple[float, ...] = ()
    """Probability from which each label is predicted; 0.5 where empty."""

    def across(self, world: object) -> "LabelScores":
        """Return the scores of all processes."""
        return LabelScores(self.scores.across(world), self.thresholds)  # type: ignore[arg-type]

    def evaluation(self) -> MultiLabelEvaluation:
        """Return the figures.

        Raises:
            InputError: nothing was evaluated, outputs are not finite, or no image has a label.
        """
        from sklearn.metrics import average_precision_score

        scores = self.scores.checked()
        known = ~scores.targets.isnan()
        loss = F.binary_cross_entropy_with_logits(scores.outputs.double()[known], scores.targets.double()[known])
        probabilities = scores.outputs.double().sigmoid().numpy()
        labels = scores.targets.numpy()
        columns = [_known(labels[:, place], probabilities[:, place]) for place in range(labels.shape[1])]
        positives = [int(truth.sum()) for truth, _ in columns]
        if not any(positives):
            raise InputError("no image to evaluate on has any of the model's labels; give images that have some")
        average = [float(average_precision_score(*each)) if count else 0.0
                   for each, count in zip(columns, positives, strict=True)]  # fmt: skip
        thresholds = self.thresholds or (0.5,) * len(columns)
        hits = np.array([_hits(*each, t) for each, t in zip(columns, thresholds, strict=True)])
        true, predicted = hits.T
        total = max(predicted.sum() + sum(positives), 1)
        return MultiLabelEvaluation(
            map=100 * float(np.mean([ap for ap, count in zip(average, positives, strict=True) if count])),
            micro_f1=float(100 * 2 * true.sum() / total),
            n=len(labels),
            loss=loss.item(),
            average_precision=tuple(100 * ap for ap in average),
            positives=tuple(positives),
            precision=tuple((100 * true / np.maximum(predicted, 1)).tolist()),
            recall=tuple((100 * true / np.maximum(positives, 1)).tolist()),
            best_thresholds=best_thresholds(columns),
        )


Column = tuple[np.ndarray, np.ndarray]
"""Truth (n,), 0 or 1, and probability (n,) of one label, of the images whose truth is known."""


def _known(truth: np.ndarray, probabilities: np.ndarray) -> Column:
    known = ~np.isnan(truth)
    return truth[known], probabilities[known]


def _hits(truth: np.ndarray, probabilities: np.ndarray, threshold: float) -> tuple[int, int]:
    """Return how many images are rightly predicted to have a label, and how many are predicted to."""
    predicted = probabilities >= threshold
    return int((truth[predicted] == 1).sum()), int(predicted.sum())


def best_thresholds(columns: Sequence[Column]) -> tuple[float, ...]:
    """Return the probability of each label from which its F1 is highest, halfway to the next lower one.

    A label with fewer than `MIN_POSITIVES` images has the threshold at which F1 over all labels is highest: its own
    would follow from a few images.
    """
    common: float | None = None
    found = []
    for truth, probabilities in columns:
        if truth.sum() >= MIN_POSITIVES:
            found.append(_best_threshold(truth, probabilities))
            continue
        if common is None:
            common = _best_threshold(*(np.concatenate(each) for each in zip(*columns, strict=True)))
        found.append(common)
    return tuple(found)


def _best_threshold(truth: np.ndarray, probabilities: np.ndarray) -> float:
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(truth, probabilities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = float(thresholds[f1[:-1].argmax()])
    lower = probabilities[probabilities < best]
    return (best + float(lower.max(initial=0.0))) / 2


def score_labels(
    predict: Predict,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num_targets: int,
    device: torch.device | str = "cpu",
    thresholds: tuple[float, ...] = (),
) -> LabelScores:
    """Run every batch through `predict`, which gives logits; see `collect`."""
    return LabelScores(collect(predict, batches, num_targets, device), thresholds)


def plot_precision_recall(totals: LabelScores, labels: Sequence[str], path: Path, title: str) -> None:
    """Draw precision over recall as a PNG: of all labels together, and of the ten that most images have."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from sklearn.metrics import PrecisionRecallDisplay

    scores = totals.scores.checked()
    truth, probabilities = scores.targets.numpy(), scores.outputs.double().sigmoid().numpy()
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    known = ~np.isnan(truth)
    PrecisionRecallDisplay.from_predictions(truth[known], probabilities[known], ax=axis, name="all labels",
                                            curve_kwargs={"color": "#1c2733", "linewidth": 2})  # fmt: skip
    frequent = sorted(range(len(labels)), key=lambda place: -np.nansum(truth[:, place]))[:MAX_DRAWN]
    for place in frequent:
        column = _known(truth[:, place], probabilities[:, place])
        if column[0].sum():
            name = printable(labels[place])[:40].replace("$", r"\$")
            PrecisionRecallDisplay.from_predictions(*column, ax=axis, name=f"{name} ({int(column[0].sum())})",
                                                    curve_kwargs={"linewidth": 1})  # fmt: skip
    axis.set_xlabel("recall")
    axis.set_ylabel("precision")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
