"""The error figures against numpy, and what must fail."""

import json

import numpy as np
import pytest
import torch

from shvit.errors import CheckFailed, InputError
from shvit.export.photographs import find_photographs
from shvit.export.verify import compare


def test_figures_are_those_of_numpy():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((6, 10))
    b = a + 1e-3 * rng.standard_normal((6, 10))
    figures = compare(torch.from_numpy(a), torch.from_numpy(b))
    assert figures["max_abs_error"] == pytest.approx(np.abs(a - b).max())
    assert figures["max_rel_error"] == pytest.approx((np.abs(a - b).max(1) / np.ptp(a, axis=1)).max())
    assert figures["snr_db"] == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
    assert figures["top1_agreement"] == 100
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert figures["cosine"] == pytest.approx(cosines.min())


def test_agreement_counts_photographs():
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    output = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert compare(reference, output)["top1_agreement"] == 75


def test_agreement_of_five_counts_the_classes_that_both_have():
    reference = torch.arange(10.0)[None]
    output = reference.clone()
    output[0, 0] = 100  # takes the place of class 5
    assert compare(reference, output)["top5_agreement"] == 80
    assert compare(reference, output)["top1_agreement"] == 0
    assert compare(reference[:, :3], output[:, :3])["top5_agreement"] == 100


def test_identical_logits_give_a_finite_figure_that_json_can_hold():
    for logits in (torch.randn(3, 4), torch.zeros(3, 4)):
        figures = compare(logits, logits)
        assert figures["snr_db"] == 200
        assert figures["max_rel_error"] == 0
        json.dumps(figures, allow_nan=False)
    json.dumps(compare(torch.zeros(3, 4), torch.ones(3, 4)), allow_nan=False)


def test_nan_and_wrong_shapes_fail():
    logits = torch.randn(3, 4)
    with pytest.raises(CheckFailed, match="NaN"):
        compare(logits, torch.full_like(logits, torch.nan))
    with pytest.raises(CheckFailed, match="shape"):
        compare(logits, logits[:, :3])


def test_default_photographs_are_scikit_images(tmp_path):
    names = {photograph.path.name for photograph in find_photographs(None)}
    assert {"astronaut.png", "coffee.png", "chelsea.png"} <= names
    with pytest.raises(InputError, match="no photographs"):
        find_photographs(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_photographs(tmp_path / "nowhere")
