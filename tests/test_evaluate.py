"""Accuracy against counting by hand."""

import json
from dataclasses import asdict

import pytest
import torch

from shvit.train.evaluate import evaluate


def batches(targets, size):
    return [(part[:, None].float(), part) for part in torch.tensor(targets).split(size)]


def table_predict(logits):
    """Predicts from a table by the number that stands in the image."""
    return lambda images: torch.tensor(logits)[images[:, 0].long()]


def test_accuracies_are_those_counted_by_hand():
    # class 0 is always right, class 1 never, class 2 always
    logits = [[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 1.0, 9.0]]
    result = evaluate(table_predict(logits), batches([0, 0, 1, 2, 2, 2, 2], size=3), 3)
    assert result.n == 7
    assert result.top1 == pytest.approx(100 * 6 / 7)
    assert result.top5 == 100
    assert result.per_class == (100, 0, 100)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits)[[0, 0, 1, 2, 2, 2, 2]], torch.tensor([0, 0, 1, 2, 2, 2, 2])
    )
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)


def test_top5_looks_at_five_classes():
    logits = [[float(9 - column) for column in range(8)] for _ in range(8)]  # ranks classes 0, 1, 2 …
    result = evaluate(table_predict(logits), batches(list(range(8)), size=8), 8)
    assert result.top1 == pytest.approx(100 / 8)
    assert result.top5 == pytest.approx(100 * 5 / 8)


def test_a_class_without_photographs_leaves_valid_json():
    result = evaluate(table_predict([[1.0, 0.0, 0.0]]), batches([0], size=1), 3)
    json.dumps(asdict(result), allow_nan=False)
