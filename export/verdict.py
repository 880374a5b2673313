"""The difference of two sets of outputs, and the verdict on it: passed, refused or undecided.

Every error is a share of the *spread* of the model's outputs: the root mean square, over the images, of an output's
distance from the mean output, where an output is all numbers that one image gives (logits, probabilities, a feature
map) and distance is Euclidean. It is one number for a whole set of images, so that no image is judged by its own
margin, and it means the same for one output or 21 thousand classes: a file that ignores its input is off by 1.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import torch

from shvit.errors import CheckFailed

from .spec import Precision

Verdict = Literal["passed", "refused", "undecided"]

TINY = torch.finfo(torch.float64).tiny
MAX_DB = 200.0
MIN_EVIDENCE = 0.1
"""Least spread, as a share of the outputs' own root mean square, that lets errors be told from rounding: random
SHViTs have 0.001 to 0.003, trained ones above 0.5 on images of their classes."""
FULL_EVIDENCE = 0.25
"""With less, errors may be a large share of the spread because that is small: images of one class alone had 0.18, and
two classes of which one is 2 % of the images have 0.28 by that alone."""
MIN_IMAGES = 8  # fewer images are no evidence
SIGMAS = 3.0  # a decision is one that errors of the bound's size, if normal, turn in one case of a thousand at most
CONFIDENCE = 0.95
FAR = 2.0  # no image may be off by so many times what the rare far ones may exceed


@dataclass(frozen=True)
class Tolerance:
    """Bounds that an artifact must keep to."""

    snr_db: float
    """Least signal to noise: power of the spread over the mean power of the errors; few images are asked whether it can
    be that."""
    max_rel_error: float  # largest error of one image, as a share of the spread
    top1_agreement: float
    """Percent of the model's decisions that stay; of few decisions a binomial interval is asked whether it can be that.
    """
    far_images: float = 0.0
    """Percent of images that may be off by more than `max_rel_error`, up to twice it; a binomial interval here too."""


# The bounds lie between what sound files and files with one deliberate defect have: docs/explanation/certificates.md.
INT8 = Tolerance(snr_db=26.0, max_rel_error=0.4, top1_agreement=98.5, far_images=0.1)
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(snr_db=60.0, max_rel_error=1e-2, top1_agreement=100.0),
    "fp16": Tolerance(snr_db=34.0, max_rel_error=0.2, top1_agreement=99.5),
    "bf16": Tolerance(snr_db=22.0, max_rel_error=0.4, top1_agreement=98.5, far_images=0.1),
    "int8": INT8,
    "w8a8": INT8,
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Errors of an artifact's outputs, the worst of all outputs and sizes; what else `compare` gives is for `judge`."""

    max_abs_error: float  # largest difference of two logits (or values of a feature map)
    median_rel_error: float
    """Median, 90th and 99th percentile and largest of the images' errors, as shares of the outputs' spread over all
    images."""
    p90_rel_error: float
    p99_rel_error: float
    max_rel_error: float
    far_images: int  # images with an error above the tolerance's
    snr_db: float  # power of that spread over the mean power of the errors, in dB; at most 200
    snr_high_db: float  # upper end of the one-sided 95 % interval: what it may be over all images of this kind
    evidence: float  # the spread as a share of the outputs' size: how far the images tell a sound file from another
    cosine: float  # lowest cosine of the two outputs for one image
    top1_agreement: float | None  # percent of images with the same highest class; None where none of them is true
    top5_agreement: float | None
    """Percent of the model's five highest classes that are among the artifact's; None as before."""
    changed: int
    """Images with another highest class; of a multi-label model, pairs of an image and a label whose probability is on
    the other side of the label's threshold."""
    decisions: int  # images, or pairs, on which the model is surer than the tolerance lets rounding move it
    changed_decisions: int  # decisions among the changed ones; other changes are near-ties


Figure = float | None


def compare(
    reference: torch.Tensor,
    output: torch.Tensor,
    tolerance: Tolerance,
    probabilities: bool = False,
    thresholds: torch.Tensor | None = None,
) -> dict[str, Figure]:
    """Return figures of one output's errors over a set of images.

    Args:
        reference: the model's, (n, classes) or (n, C, H, W).
        output: the artifact's, of the same shape.
        probabilities: what rounding moves in them is between the highest two, not spread over all classes.
        thresholds: of a multi-label model's probabilities, those from which its labels are predicted, (labels,).

    Returns:
        spread, evidence: the scale of all errors, and its share of the outputs' root mean square.
        max_abs_error: the largest difference of two numbers.
        median_rel_error, p90_rel_error, p99_rel_error, max_rel_error: of the images' errors, as shares of the spread.
        worst_image: the index of the last of these.
        far_images: images with an error above the tolerance's `max_rel_error`.
        snr_db: power of the spread over the errors' mean power, at most 200.
        snr_high_db: the upper end of its one-sided 95 % interval: what it may be over all images of this kind.
        size_snr_db: the same for the outputs' own power in place of the spread's.
        cosine: the lowest of an image's two outputs.
        top1_agreement, top5_agreement: percent of the images with the same highest class, percent of the model's five
            highest that are among the artifact's; None where no class is chosen.
        changed: images with another highest class; with `thresholds`, pairs of an image and a label on another side.
        decisions: images on which the model is surer of its highest class than the tolerance lets rounding move it; or
            pairs whose probability is that far from the label's threshold.
        changed_decisions: the changed ones among the decisions.

    Raises:
        CheckFailed: the shapes differ, or the output is not finite.
    """
    if reference.shape != output.shape:
        shapes = f"{tuple(output.shape)}, and its model {tuple(reference.shape)}"
        raise CheckFailed(f"the artifact gives outputs of shape {shapes}", {"output_shape": list(output.shape)})
    if not torch.isfinite(output).all():
        raise CheckFailed("the artifact gives NaN or infinite outputs", {"finite": False})
    classes = reference.shape[1] if reference.dim() == 2 else 0
    reference, output = reference.double().flatten(1), output.double().flatten(1)
    size = reference.square().sum(1).mean().sqrt().item()
    distances = (reference - reference.mean(0)).square().sum(1).sqrt()  # (n,)
    spread = distances.square().mean().sqrt().item()
    errors = (reference - output).square().sum(1).sqrt()  # (n,)
    power = errors.square().mean().item()
    shares = errors / max(spread, TINY)
    quantiles = shares.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
    allowed = 10 ** (-tolerance.snr_db / 20) * spread
    return {
        "spread": spread,
        "evidence": spread / size if size else 0.0,
        "max_abs_error": (reference - output).abs().max().item(),
        **dict(zip(("median_rel_error", "p90_rel_error", "p99_rel_error"), map(_finite, quantiles), strict=True)),
        "max_rel_error": _finite(shares.max().item()),
        "worst_image": int(shares.argmax()),
        "far_images": int((shares > tolerance.max_rel_error).sum()),
        "snr_db": _db(spread**2, power),
        "snr_high_db": min(_db(spread**2, power) + _margin_db(distances.square(), errors.square()), MAX_DB),
        "size_snr_db": _db(size**2, power),
        "cosine": torch.cosine_similarity(reference, output, eps=TINY).min().item(),
        **(
            _label_decisions(reference, output, thresholds, allowed)
            if thresholds is not None
            else _decisions(reference, output, allowed, probabilities)
            if classes > 1
            else NO_DECISIONS
        ),
    }


NO_DECISIONS: dict[str, Figure] = {
    **dict.fromkeys(("top1_agreement", "top5_agreement")),
    **dict.fromkeys(("changed", "decisions", "changed_decisions"), 0),
}


def _decisions(reference: torch.Tensor, output: torch.Tensor, allowed: float, probabilities: bool) -> dict[str, Figure]:
    """Return the figures of highest classes.

    Args:
        allowed: the tolerance's error of an image, a root mean square.
    """
    movable = SIGMAS * math.sqrt(2) * allowed / math.sqrt(2 if probabilities else reference.shape[1])
    top = min(5, reference.shape[1])
    ranked, highest = reference.topk(top), output.topk(top).indices
    sure = ranked.values[:, 0] - ranked.values[:, 1] > movable
    changed = output.argmax(1) != reference.argmax(1)
    return {
        "top1_agreement": 100 * (~changed).double().mean().item(),
        "top5_agreement": 100 * (ranked.indices[:, :, None] == highest[:, None]).any(2).double().mean().item(),
        "changed": int(changed.sum()),
        "decisions": int(sure.sum()),
        "changed_decisions": int((changed & sure).sum()),
    }


def _label_decisions(
    reference: torch.Tensor, output: torch.Tensor, thresholds: torch.Tensor, allowed: float
) -> dict[str, Figure]:
    """Return the figures of labels, each on one side of its threshold.

    The sigmoid moves a probability p by p(1 - p) of what its logit moves, a quarter at most. So an image's error is
    that of the labels that the model is unsure of, as many as (4p(1 - p))² adds up to, and is spread over these.

    Args:
        allowed: the tolerance's error of an image, a root mean square.
    """
    unsure = (4 * reference * (1 - reference)).square().sum(1).mean().item()
    movable = SIGMAS * allowed / math.sqrt(max(unsure, TINY))
    sure = (reference - thresholds).abs() > movable
    changed = (output >= thresholds) != (reference >= thresholds)
    return {
        **NO_DECISIONS,
        "changed": int(changed.sum()),
        "decisions": int(sure.sum()),
        "changed_decisions": int((changed & sure).sum()),
    }


def accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Return the percentage of labeled images whose highest class is the right one."""
    known = labels >= 0
    if outputs.dim() != 2 or not known.any():
        return None
    return 100 * (outputs.argmax(1) == labels)[known].double().mean().item()


def snr_db(reference: torch.Tensor, output: torch.Tensor) -> float:
    """Return the power of `reference` over that of the difference, in dB, at most 200."""
    reference, output = reference.double(), output.double()
    return _db(reference.square().sum().item(), (reference - output).square().sum().item())


def _db(signal: float, noise: float) -> float:
    if noise == 0 or not math.isfinite(noise):
        return MAX_DB if noise == 0 else -MAX_DB
    return max(min(10 * math.log10(max(signal, TINY) / noise), MAX_DB), -MAX_DB)


def _margin_db(signal: torch.Tensor, noise: torch.Tensor) -> float:
    """Return how far the ratio of two means over the same images, (n,), may be above its true value, in dB.

    It is the delta method's one-sided 95 % bound for the logarithm of the ratio.
    """
    if len(signal) < 2 or not signal.any() or not noise.any():
        return 0.0
    deviation = (signal / signal.mean() - noise / noise.mean()).std().item() / math.sqrt(len(signal))
    return 10 / math.log(10) * NormalDist().inv_cdf(CONFIDENCE) * deviation


def _finite(share: float) -> float:
    """Return the share, a large number where it is infinite, of which JSON has none: a share of no spread at all."""
    return min(share, 1e12)


def judge(figures: Mapping[str, Any], tolerance: Tolerance, images: int) -> tuple[Verdict, list[str]]:
    """Return the verdict on the figures of `compare`, and the reasons where it is not a pass.

    Without evidence, errors are held against the outputs' own size: what is wrong even so is refused, and the rest is
    undecided. So are errors that are large beside a small spread alone.
    """
    evidence = figures["evidence"]
    undecided = lack_of_evidence(evidence, images)
    if undecided:
        if figures["size_snr_db"] < tolerance.snr_db:
            return "refused", [f"{figures['size_snr_db']:.1f} dB below the outputs' own size "
                               f"(at least {tolerance.snr_db:g})"]  # fmt: skip
        return "undecided", [undecided]
    reasons = _too_far(figures, tolerance, images)
    if reasons and evidence < FULL_EVIDENCE and not _too_far(_beside_size(figures), tolerance, images):
        return "undecided", [f"{reasons[0]}, but the model's outputs differ little between these images, by "
                             f"{100 * evidence:.2g} % of their size; give images of all classes"]  # fmt: skip
    return ("refused" if reasons else "passed"), reasons


def _beside_size(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures as shares of the outputs' size in place of their spread."""
    high = figures["snr_high_db"] + figures["size_snr_db"] - figures["snr_db"]
    return {**figures, "snr_high_db": high, "max_rel_error": figures["max_rel_error"] * figures["evidence"]}


def _too_far(figures: Mapping[str, Any], tolerance: Tolerance, images: int) -> list[str]:
    """Return which of the tolerance's bounds the figures exceed, each as a sentence."""
    reasons, far = [], int(figures["far_images"])
    if figures["snr_high_db"] < tolerance.snr_db:
        reasons.append(f"signal to noise {figures['snr_db']:.1f} dB, granting chance {figures['snr_high_db']:.1f} "
                       f"(at least {tolerance.snr_db:g})")  # fmt: skip
    if figures["max_rel_error"] > FAR * tolerance.max_rel_error:
        reasons.append(f"an image is off by {figures['max_rel_error']:.1e} of the outputs' spread "
                       f"(at most {FAR * tolerance.max_rel_error:g})")  # fmt: skip
    elif figures["max_rel_error"] > tolerance.max_rel_error and far > allowed_failures(tolerance.far_images, images):
        reasons.append(f"{far} of {images} images off by up to {figures['max_rel_error']:.1e} of the outputs' spread "
                       f"(at most {tolerance.max_rel_error:g})")  # fmt: skip
    changed, decisions = int(figures["changed_decisions"]), int(figures["decisions"])
    if changed > allowed_failures(100 - tolerance.top1_agreement, decisions):
        reasons.append(f"{changed} of {decisions} decisions changed (at most {100 - tolerance.top1_agreement:g} %)")
    return reasons


def lack_of_evidence(evidence: float, images: int) -> str:
    """Return why a set of images can't tell a sound file from another; empty where it can."""
    if images < MIN_IMAGES:
        return f"{images} {'image is' if images == 1 else 'images are'} too few, {MIN_IMAGES} are needed"
    if evidence < MIN_EVIDENCE:
        return (f"the model's outputs hardly differ between these images, by {100 * evidence:.2g} % of "
                f"their size (at least {100 * MIN_EVIDENCE:g})")  # fmt: skip
    return ""


def allowed_failures(percent: float, trials: int) -> int:
    """Return the largest number of failures whose true rate can still be that many percent."""
    return bisect_right(range(1, trials + 1), percent / 100, key=lambda count: lowest_rate(count, trials))


def lowest_rate(count: int, trials: int) -> float:
    """Return the lower end of the one-sided Clopper-Pearson interval of a rate, given `count` of `trials`."""
    from scipy.special import betaincinv  # as scipy.stats.beta.ppf, whose import takes a second

    return float(betaincinv(count, trials - count + 1, 1 - CONFIDENCE)) if count else 0.0


def worst_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the worst: refused if one is, else undecided if one is."""
    order: tuple[Verdict, ...] = ("refused", "undecided", "passed")
    return next(each for each in order if each in verdicts)


def worst_figures(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the least favorable of each figure over several outputs and sizes."""
    lowest = {"evidence", "spread", "snr_db", "snr_high_db", "size_snr_db", "cosine"}
    lowest |= {"top1_agreement", "top5_agreement", "decisions"}
    worst = max(outputs, key=lambda each: each["max_rel_error"])
    known = (key for key, value in outputs[0].items() if value is not None)
    figures = {
        **dict.fromkeys(outputs[0]),
        **{key: (min if key in lowest else max)(each[key] for each in outputs) for key in known},
    }
    return {**figures, "worst_image": worst["worst_image"]}
