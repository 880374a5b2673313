"""Errors of predicted values."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from shvit.errors import printable
from shvit.files import atomic_write

from .classification import Predict
from .scores import Scores, collect


@dataclass(frozen=True)
class RegressionEvaluation:
    """Errors over a set of images, each counted once, in the unit of the values."""

    r2: float
    """Coefficient of determination: 1 for no error, 0 for errors like those of the mean value."""
    mae: float
    """Mean absolute error."""
    rmse: float
    """Root mean square error."""
    n: int
    """Images."""
    loss: float
    """Mean smooth L1 loss of values in standard deviations of these images' values."""


@dataclass(frozen=True)
class ValueScores:
    """The scores of an evaluation of values."""

    scores: Scores

    def across(self, world: object) -> "ValueScores":
        """Return the scores of all processes."""
        return ValueScores(self.scores.across(world))  # type: ignore[arg-type]

    def evaluation(self) -> RegressionEvaluation:
        """Return the errors.

        Raises:
            InputError: nothing was evaluated, or outputs are not finite.
        """
        from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

        scores = self.scores.checked()
        predicted, values = scores.outputs[:, 0].double(), scores.targets[:, 0].double()
        deviation = values.std(correction=0).clamp_min(1e-12)
        pair = values.numpy(), predicted.numpy()
        return RegressionEvaluation(
            r2=float(r2_score(*pair)) if len(values) > 1 else 0.0,
            mae=float(mean_absolute_error(*pair)),
            rmse=float(root_mean_squared_error(*pair)),
            n=len(values),
            loss=F.smooth_l1_loss(predicted / deviation, values / deviation).item(),
        )


def score_values(
    predict: Predict,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num_targets: int = 1,
    device: torch.device | str = "cpu",
) -> ValueScores:
    """Run every batch through `predict`, which gives values in their unit; see `collect`."""
    return ValueScores(collect(predict, batches, num_targets, device))


def plot_values(totals: ValueScores, name: str, path: Path, title: str) -> None:
    """Draw predicted over true values as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from sklearn.metrics import PredictionErrorDisplay

    scores = totals.scores.checked()
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    PredictionErrorDisplay.from_predictions(
        scores.targets[:, 0].numpy(), scores.outputs[:, 0].numpy(), kind="actual_vs_predicted", ax=axis, subsample=5000,
        random_state=0, scatter_kwargs={"s": 8, "alpha": 0.4},
    )  # fmt: skip
    label = printable(name)[:60].replace("$", r"\$")
    axis.set_xlabel(f"predicted {label}")
    axis.set_ylabel(f"true {label}")
    axis.set_title(title, fontsize=10)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
