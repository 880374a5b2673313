"""Curves of a run."""

import json
from pathlib import Path
from typing import Any

from shvit.errors import InputError
from shvit.files import write_whole

PANELS = {
    "loss": {"train_loss": "training, as trained", "val_loss": "held out", "ema_loss": "averaged weights"},
    "held-out top-1, %": {"top1": "weights", "ema_top1": "averaged weights"},
    "learning rate": {"lr": "last step of the epoch"},
    "gradient norm": {"grad_norm": "mean before clipping"},
}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run folder's metrics.jsonl.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / "metrics.jsonl"
    keys = {"epoch", *(key for lines in PANELS.values() for key in lines)}
    try:
        log = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the --output of a run that finished an epoch") from error
    except ValueError as error:
        raise InputError(f"{path}: not a readable log ({error})") from error
    if not log or not all(isinstance(entry, dict) and keys <= entry.keys() for entry in log):
        raise InputError(f"{path}: not the log of a run; its lines have {', '.join(sorted(keys))}")
    return log


def plot_curves(log: list[dict[str, Any]], path: Path) -> None:
    """Loss, accuracy, learning rate and gradient norm over epochs; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3), layout="constrained")
    epochs = [entry["epoch"] for entry in log]
    for axis, (title, lines) in zip(axes, PANELS.items(), strict=True):
        for key, label in lines.items():
            axis.plot(epochs, [entry[key] for entry in log], marker="o", markersize=3, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    with write_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
