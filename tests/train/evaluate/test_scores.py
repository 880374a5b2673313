"""Average precision, thresholds and errors of values, against their definitions written out in NumPy."""

import numpy as np
import pytest
import torch

from shvit.errors import InputError
from shvit.train.distributed import World
from shvit.train.evaluate.multi_label import LabelScores, best_thresholds, plot_precision_recall, score_labels
from shvit.train.evaluate.regression import plot_values, score_values
from shvit.train.evaluate.scores import Scores


def table(outputs):
    """A model that gives the rows of a table, whose numbers are its images."""
    rows = torch.tensor(outputs)
    return lambda images: rows[images[:, 0].long()]


def batches(targets, size=3):
    images, targets = torch.arange(float(len(targets)))[:, None], torch.tensor(targets, dtype=torch.float32)
    return list(zip(images.split(size), targets.split(size), strict=True))


def average_precision(truth, scores):
    """Mean over the images with the label of the precision at the place of each, from the highest score down."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    truth = np.asarray(truth)[order]
    return np.mean([truth[: place + 1].mean() for place in np.flatnonzero(truth)])


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    targets = (rng.uniform(size=(120, 3)) < [0.5, 0.3, 0.0]).astype(np.float32)
    return (targets + rng.normal(size=(120, 3))).astype(np.float32), targets


def test_map_is_the_mean_over_labels_that_images_have(scored):
    outputs, targets = scored
    result = score_labels(table(outputs), batches(targets), 3).evaluation()
    expected = [average_precision(targets[:, place], outputs[:, place]) for place in (0, 1)]
    assert result.average_precision == pytest.approx([100 * expected[0], 100 * expected[1], 0])
    assert result.map == pytest.approx(100 * np.mean(expected))
    assert result.positives == tuple(targets.sum(0).astype(int))
    assert result.n == 120
    predicted = outputs >= 0  # a probability of 0.5
    f1 = 2 * (predicted & (targets == 1)).sum() / (predicted.sum() + targets.sum())
    assert result.micro_f1 == pytest.approx(100 * f1)
    p = 1 / (1 + np.exp(-outputs.astype(np.float64)))
    assert result.loss == pytest.approx(-np.mean(np.where(targets == 1, np.log(p), np.log(1 - p))))


def test_thresholds_are_those_of_the_highest_f1(scored):
    outputs, targets = scored
    columns = [(targets[:, place], 1 / (1 + np.exp(-outputs[:, place].astype(np.float64)))) for place in range(3)]

    def f1(truth, probabilities, threshold):
        predicted = probabilities >= threshold
        return 2 * (predicted & (truth == 1)).sum() / max(predicted.sum() + truth.sum(), 1)

    thresholds = best_thresholds(columns)
    for (truth, probabilities), threshold in zip(columns[:2], thresholds[:2], strict=True):
        best = max(f1(truth, probabilities, each) for each in probabilities)
        assert f1(truth, probabilities, threshold) == pytest.approx(best)
        assert threshold not in probabilities  # halfway, so that rounding turns no image of these
    truth, probabilities = (np.concatenate(each) for each in zip(*columns, strict=True))
    best = max(f1(truth, probabilities, each) for each in probabilities)
    assert f1(truth, probabilities, thresholds[2]) == pytest.approx(best)  # too few images: that of all labels


def test_thresholds_decide_precision_and_recall():
    outputs = [[2.0], [1.0], [-1.0], [-2.0]]
    targets = [[1.0], [0.0], [1.0], [0.0]]
    result = score_labels(table(outputs), batches(targets), 1, thresholds=(0.2,)).evaluation()
    assert (result.precision, result.recall) == (pytest.approx([200 / 3]), pytest.approx([100]))


def test_targets_that_are_not_known_do_not_count(scored):
    outputs, targets = scored
    partly = targets.copy()
    partly[::2, 1] = np.nan
    partly[7] = np.nan  # a damaged image
    result = score_labels(table(outputs), batches(partly), 3).evaluation()
    known = ~np.isnan(partly[:, 1])
    assert result.n == 119
    assert result.average_precision[1] == pytest.approx(100 * average_precision(targets[known, 1], outputs[known, 1]))


def test_scores_of_two_processes_are_joined(scored):
    outputs, targets = scored
    halves = [score_labels(table(outputs), batches(targets)[part], 3) for part in (slice(0, 7), slice(7, None))]

    class TwoProcesses(World):
        def gather(self, value):
            return [value, (halves[1].scores.outputs, halves[1].scores.targets)]

    joined = halves[0].across(TwoProcesses(0, 2, torch.device("cpu"))).evaluation()
    assert joined == score_labels(table(outputs), batches(targets), 3).evaluation()


def test_errors_of_values():
    result = score_values(table([[1.0], [2.0], [4.0], [5.0]]), batches([[1.0], [2.0], [3.0], [np.nan]])).evaluation()
    assert (result.n, result.mae, result.rmse, result.r2) == (
        3, pytest.approx(1 / 3), pytest.approx(np.sqrt(1 / 3)), pytest.approx(0.5)
    )  # fmt: skip
    assert result.loss == pytest.approx((1 / np.sqrt(2 / 3) - 0.5) / 3)


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        ([[1.0], [np.nan]], [[1.0], [0.0]], "outputs are not finite for 1 of 2 images"),
        ([[1.0], [0.0]], [[np.nan], [np.nan]], "no image to evaluate on could be read"),
        ([[1.0], [0.0]], [[0.0], [0.0]], "no image to evaluate on has any of the model's labels"),
        ([[1.0], [0.0]], [[0.0, 1.0], [0.0, 1.0]], r"targets of shape \(2,\), and the model has 1 outputs"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(outputs, targets, message):
    with pytest.raises(InputError, match=message):
        score_labels(table(outputs), batches(targets), 1).evaluation()


def test_plots_are_drawn(scored, tmp_path):
    outputs, targets = (torch.from_numpy(each) for each in scored)
    plot_precision_recall(LabelScores(Scores(outputs, targets)), ["a", "$b", "c"], tmp_path / "pr.png", "title")
    totals = score_values(lambda images: images, [(torch.rand(9, 1), torch.rand(9, 1))])
    plot_values(totals, "size in $", tmp_path / "values.png", "title")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("pr.png", "values.png"))
