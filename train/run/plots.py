"""Training curves."""

import math
from pathlib import Path
from typing import Any

from shvit.files import atomic_write

from ..evaluate.tasks import figures_of

LOSS = {"train_loss": "training", "val_loss": "validation", "ema_loss": "validation, EMA weights"}
STEPS = {
    "learning rate": {"lr": "last step of the epoch"},
    "gradient norm": {"grad_norm": "mean before clipping"},
}


def plot_curves(log: list[dict[str, Any]], path: Path) -> None:
    """Draw loss, the task's best figure, learning rate and gradient norm over epochs as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figures = figures_of(log)
    best = {figures.best: "weights", f"ema_{figures.best}": "EMA weights"}
    panels = {"loss": LOSS, figures.title: best, **STEPS}
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    epochs = [entry["epoch"] for entry in log]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for key, label in lines.items():
            axis.plot(
                epochs,
                [math.nan if entry[key] is None else entry[key] for entry in log],
                marker="o",
                markersize=3,
                label=label,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
