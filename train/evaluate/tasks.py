"""What each task evaluates: its figures, and by which of them weights are chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from shvit.weights.run_info import BEST_FIGURES, Task

from .classification import count
from .multi_label import score_labels
from .regression import score_values

if TYPE_CHECKING:
    from ..distributed import World


class Evaluation(Protocol):
    """Figures over a set of images."""

    @property
    def n(self) -> int:
        """Images."""

    @property
    def loss(self) -> float:
        """Mean loss."""


class Totals(Protocol):
    """What an evaluation keeps of each image or of all, in one process."""

    def across(self, world: "World") -> "Totals":
        """Return those of all processes."""

    def evaluation(self) -> Evaluation:
        """Return the figures; raise InputError where there are none."""


@dataclass(frozen=True)
class TaskFigures:
    """The figures of a task."""

    task: Task
    logged: tuple[str, ...]
    """Figures of each evaluation beside the loss, by their names in the evaluation."""
    title: str
    """What the best figure is called on a plot."""
    form: str
    """How the best figure is written, for `str.format`."""
    totals: Callable[..., Totals]
    """From a function to outputs, batches, the number of outputs and a device to the totals."""

    @property
    def best(self) -> str:
        """The figure by which weights are chosen, the highest."""
        return BEST_FIGURES[self.task]

    def text(self, value: float) -> str:
        """Return the best figure as it is printed."""
        return self.form.format(value)


FIGURES: dict[Task, TaskFigures] = {
    each.task: each
    for each in (
        TaskFigures("classification", ("top1", "top5", "balanced_top1"), "validation top-1, %", "{:.2f} %", count),
        TaskFigures("multi_label", ("map", "micro_f1"), "validation mAP, %", "mAP {:.2f} %", score_labels),
        TaskFigures("regression", ("r2", "mae", "rmse"), "validation R²", "R² {:.4f}", score_values),
    )
}


def figures_of(log: Sequence[Mapping[str, Any]]) -> TaskFigures:
    """Return the figures of the task that a log with entries is of."""
    return next(each for each in FIGURES.values() if each.best in log[0])
