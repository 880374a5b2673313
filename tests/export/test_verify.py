"""The figures of errors against NumPy and SciPy, and what they mean."""

import itertools
import json

import numpy as np
import pytest
import torch

from shvit.errors import CheckFailed, InputError
from shvit.export.images import sample_images, spread
from shvit.export.verdict import (
    MIN_EVIDENCE,
    TOLERANCES,
    Tolerance,
    compare,
    judge,
    lowest_rate,
    worst_figures,
    worst_verdict,
)

FP32, INT8 = TOLERANCES["fp32"], TOLERANCES["int8"]


def logits(images: int, classes: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    return 3 * torch.randn(images, classes, generator=torch.Generator().manual_seed(seed)).double() + offset


def noisy(reference: torch.Tensor, db: float, seed: int = 1) -> torch.Tensor:
    """With normal errors of a power so far below that of the spread."""
    spread = (reference - reference.mean(0)).square().mean().sqrt()
    errors = torch.randn(reference.shape, generator=torch.Generator().manual_seed(seed)).double()
    return reference + errors * spread * 10 ** (-db / 20)


def verdict(reference: torch.Tensor, output: torch.Tensor, tolerance: Tolerance, probabilities: bool = False) -> str:
    return judge(compare(reference, output, tolerance, probabilities), tolerance, len(reference))[0]


def test_figures_are_those_of_numpy():
    import scipy.stats  # a second, for two of these tests

    rng = np.random.default_rng(0)
    a = rng.standard_normal((60, 10)) + 5
    b = a + 1e-3 * rng.standard_normal((60, 10))
    figures = compare(torch.from_numpy(a), torch.from_numpy(b), FP32)
    errors = np.linalg.norm(a - b, axis=1)
    scale = np.sqrt(np.mean(np.linalg.norm(a - a.mean(0), axis=1) ** 2))
    assert figures["spread"] == pytest.approx(scale)
    assert figures["evidence"] == pytest.approx(scale / np.sqrt(np.mean(np.linalg.norm(a, axis=1) ** 2)))
    assert figures["max_abs_error"] == pytest.approx(np.abs(a - b).max())
    assert figures["max_rel_error"] == pytest.approx(errors.max() / scale)
    assert figures["worst_image"] == errors.argmax()
    for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert figures[f"{name}_rel_error"] == pytest.approx(np.quantile(errors, share) / scale)
    assert figures["snr_db"] == pytest.approx(10 * np.log10(scale**2 / np.mean(errors**2)))
    assert figures["size_snr_db"] == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
    logarithms = np.linalg.norm(a - a.mean(0), axis=1) ** 2 / scale**2 - errors**2 / np.mean(errors**2)
    higher = 10 * np.log10(np.e) * scipy.stats.norm.ppf(0.95) * logarithms.std(ddof=1) / np.sqrt(60)
    assert figures["snr_high_db"] == pytest.approx(figures["snr_db"] + higher)
    assert figures["far_images"] == np.sum(errors > 0.01 * scale) == 0
    assert figures["top1_agreement"] == 100
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert figures["cosine"] == pytest.approx(cosines.min())


def test_an_image_with_near_tie_is_not_judged_by_its_own_margin():
    """Two classes: an image whose logits are 0.0002 apart, and errors of a millionth."""
    reference = logits(26, 2)
    reference[7] = torch.tensor([1.0, 1.0002])
    output = reference + 1e-6 * torch.randn(26, 2, generator=torch.Generator().manual_seed(1))
    figures = compare(reference, output, FP32)
    assert figures["max_rel_error"] < 1e-5
    assert judge(figures, FP32, 26) == ("passed", [])


def test_agreement_counts_images():
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    output = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    figures = compare(reference, output, FP32)
    assert (figures["top1_agreement"], figures["changed"]) == (75, 1)


def test_agreement_of_five_counts_the_classes_that_both_have():
    reference = torch.arange(10.0)[None]
    output = reference.clone()
    output[0, 0] = 100  # takes the place of class 5
    assert compare(reference, output, FP32)["top5_agreement"] == 80
    assert compare(reference, output, FP32)["top1_agreement"] == 0
    assert compare(reference[:, :3], output[:, :3], FP32)["top5_agreement"] == 100


def test_near_ties_that_turn_are_reported_and_decisions_counted():
    reference = logits(200, 10)
    top = reference.topk(2).indices
    tie, sure = reference.clone(), reference.clone()
    for row in range(12):  # their margin becomes a hundredth of the spread
        tie[row, top[row, 0]] = tie[row, top[row, 1]] + 0.03
    turned = tie.clone()
    for row in range(12):
        turned[row, top[row, 1]] += 0.06
    figures = compare(tie, turned, INT8)
    assert (figures["changed"], figures["changed_decisions"]) == (12, 0)
    assert judge(figures, INT8, 200)[0] == "passed"
    for row in range(12):
        sure[row, top[row, 0]] = sure[row, top[row, 1]] + 3
    wrong = sure.clone()
    for row in range(12):
        wrong[row, top[row, 1]] += 3.5
    figures = compare(sure, wrong, INT8)
    assert figures["changed_decisions"] == 12
    assert "12 of" in " ".join(judge(figures, Tolerance(0, 10, 98.5), 200)[1])


def test_few_images_are_given_the_benefit_of_a_binomial_interval():
    import scipy.stats  # a second, for two of these tests

    for count, trials in ((1, 26), (2, 26), (9, 341), (1, 8)):
        interval = scipy.stats.binomtest(count, trials, alternative="greater").proportion_ci(0.95, "exact")
        assert lowest_rate(count, trials) == pytest.approx(interval.low)
    assert lowest_rate(0, 26) == 0
    figures = compare(logits(26, 10), logits(26, 10), INT8)
    loose = Tolerance(0, 10, 98.5)
    assert judge({**figures, "decisions": 26, "changed_decisions": 2}, loose, 26)[0] == "passed"
    assert judge({**figures, "decisions": 26, "changed_decisions": 3}, loose, 26)[0] == "refused"
    assert judge({**figures, "decisions": 26, "changed_decisions": 1}, FP32, 26)[0] == "refused"


@pytest.mark.parametrize("classes", [1, 2, 10, 1000, 21_000])
@pytest.mark.parametrize("images", [8, 26, 300])
def test_same_noise_means_the_same_for_any_number_of_classes_and_images(classes, images):
    if classes * images > 1_000_000:
        images = 40
    for precision, tolerance in TOLERANCES.items():
        reference = logits(images, classes)
        assert verdict(reference, noisy(reference, tolerance.snr_db + 4), tolerance) == "passed", precision
        less = 4 if classes * images > 200 else 16  # what is seen on a few numbers may be chance
        assert verdict(reference, noisy(reference, tolerance.snr_db - less), tolerance) == "refused", precision


def test_a_signal_to_noise_just_below_its_bound_is_refused_when_enough_images_show_it():
    for images, expected in ((8, "passed"), (20, "passed"), (2000, "refused")):
        reference = logits(images, 10)
        figures = compare(reference, noisy(reference, INT8.snr_db - 0.4), INT8)
        assert figures["snr_db"] < INT8.snr_db
        assert judge(figures, INT8, images)[0] == expected


def test_the_interval_holds_the_true_ratio_in_nineteen_cases_of_twenty():
    reference, few = logits(20_000, 10), 100
    output = reference + noisy(reference, 26) * 0.05 * torch.rand(20_000, 1, generator=torch.Generator().manual_seed(5))
    true = compare(reference, output, INT8)["snr_db"]
    drawn = [compare(a, b, INT8) for a, b in zip(reference.split(few), output.split(few), strict=True)]
    assert np.mean([each["snr_high_db"] > true for each in drawn]) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_probabilities_are_judged_as_their_logits(classes):
    reference = logits(300, classes)
    near, far = noisy(reference, 45), noisy(reference, 15)
    sides = [each.softmax(1) for each in (reference, near, far)]
    assert verdict(sides[0], sides[1], INT8, probabilities=True) == "passed"
    assert verdict(sides[0], sides[2], INT8, probabilities=True) == "refused"


def test_feature_maps_have_no_decisions():
    reference = torch.randn(12, 8, 4, 4)
    figures = compare(reference, reference + 1e-6, FP32)
    assert (figures["top1_agreement"], figures["decisions"]) == (None, 0)
    assert judge(figures, FP32, 12)[0] == "passed"
    assert verdict(reference, reference.flip(0), FP32) == "refused"


@pytest.mark.parametrize(
    ("images", "wrong", "share", "expected"),
    [(2000, 1, 0.9, "refused"), (2000, 1, 0.5, "passed"), (2000, 5, 0.5, "passed"), (2000, 6, 0.5, "refused"),
     (26, 1, 0.5, "refused"), (512, 1, 0.5, "passed")],
)  # fmt: skip
def test_few_of_many_images_may_be_far_off_in_int8_and_none_very_far(images, wrong, share, expected):
    reference = logits(images, 10)
    output = noisy(reference, 60)
    output[:wrong] += share * compare(reference, reference, INT8)["spread"] / np.sqrt(10)
    verdict, why = judge(compare(reference, output, INT8), INT8, images)
    assert verdict == expected
    if expected == "refused":
        assert ("an image is off by 9.0e-01" if share > 0.8 else f"{wrong} of {images} images off by up to") in why[0]


def test_no_image_may_be_far_off_in_float():
    for precision in ("fp32", "fp16"):
        tolerance, reference = TOLERANCES[precision], logits(2000, 10)
        output = noisy(reference, 90)
        output[7] += 1.2 * tolerance.max_rel_error * compare(reference, reference, tolerance)["spread"] / np.sqrt(10)
        assert verdict(reference, output, tolerance) == "refused"


def test_errors_large_beside_a_small_spread_alone_leave_a_file_undecided():
    """As of images of one class alone: 18 % of the outputs' size are between them."""
    reference = logits(26, 10, offset=15.0)
    figures = compare(reference, noisy(reference, 18), INT8)
    assert 0.15 < figures["evidence"] < 0.25
    state, why = judge(figures, INT8, 26)
    assert state == "undecided"
    assert "give images of all classes" in why[0]
    assert verdict(reference, noisy(reference, 40), INT8) == "passed"
    assert verdict(reference, noisy(reference, 5), INT8) == "refused"
    assert verdict(logits(26, 10, offset=5.0), noisy(logits(26, 10, offset=5.0), 18), INT8) == "refused"


def test_images_that_tell_nothing_are_no_evidence():
    """A file that ignores its input is within 1 % of a model whose outputs hardly differ."""
    for offset, images, expected in ((0.0, 26, "refused"), (300.0, 26, "undecided"), (0.0, 3, "undecided")):
        reference = logits(images, 10, offset=offset)
        constant = reference.mean(0).expand(images, -1)
        tolerance = Tolerance(35, 1e3, 0) if offset else INT8
        if images > 3:
            assert verdict(reference, constant, tolerance) == expected
        assert verdict(reference, noisy(reference, 100), FP32) == ("passed" if expected == "refused" else "undecided")
    blank = torch.ones(26, 10)
    state, why = judge(compare(blank, blank, FP32), FP32, 26)
    assert state == "undecided"
    assert "hardly differ" in why[0]
    assert compare(logits(26, 10), logits(26, 10), FP32)["evidence"] > 5 * MIN_EVIDENCE


def test_what_is_wrong_by_the_outputs_own_size_is_refused_without_evidence():
    reference = logits(26, 10, offset=3000.0)
    assert verdict(reference, 1.01 * reference, FP32) == "refused"
    assert verdict(reference, noisy(reference, 100), FP32) == "undecided"


def test_worst_of_several_outputs():
    good, bad = logits(26, 10), logits(26, 10, seed=3)
    figures = [compare(good, noisy(good, 90), FP32), compare(bad, noisy(bad, 50), FP32)]
    worst = worst_figures(figures)
    assert worst["snr_db"] == figures[1]["snr_db"]
    assert (worst["max_rel_error"], worst["worst_image"]) == (figures[1]["max_rel_error"], figures[1]["worst_image"])
    assert worst_verdict(["passed", "undecided"]) == "undecided"
    assert worst_verdict(["undecided", "refused", "passed"]) == "refused"


def test_identical_outputs_give_finite_figures_that_json_can_hold():
    for outputs in (torch.randn(9, 4), torch.zeros(9, 4)):
        figures = compare(outputs, outputs, FP32)
        assert figures["snr_db"] == 200
        assert figures["max_rel_error"] == 0
        json.dumps(figures, allow_nan=False)
    json.dumps(compare(torch.zeros(9, 4), torch.ones(9, 4), FP32), allow_nan=False)


def test_nan_and_wrong_shapes_fail():
    outputs = torch.randn(9, 4)
    with pytest.raises(CheckFailed, match="NaN"):
        compare(outputs, torch.full_like(outputs, torch.nan), FP32)
    with pytest.raises(CheckFailed, match="shape"):
        compare(outputs, outputs[:, :3], FP32)


@pytest.mark.parametrize(("count", "limit"), [(513, 512), (26, 8), (8, 26), (512, 512), (2600, 512), (1, 8)])
def test_spread_takes_as_many_as_it_may_from_first_to_last(count, limit):
    chosen = spread(range(count), limit)
    assert len(chosen) == len(set(chosen)) == min(count, limit)
    assert chosen[0] == 0
    assert chosen[-1] >= count - count / limit - 1
    distances = {b - a for a, b in itertools.pairwise(chosen)}
    assert not distances or max(distances) - min(distances) <= 1


def test_default_images_are_scikit_images(tmp_path):
    names = {image.path.name for image in sample_images(None)}
    assert {"astronaut.png", "coffee.png", "chelsea.png"} <= names
    with pytest.raises(InputError, match="no images"):
        sample_images(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        sample_images(tmp_path / "nowhere")
