"""The report of an evaluation for each task: what is printed, drawn and returned."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shvit import terminal
from shvit.errors import InputError
from shvit.train.evaluate import Predict, count, plot_confusion
from shvit.train.evaluate.multi_label import MultiLabelEvaluation, plot_precision_recall, score_labels
from shvit.train.evaluate.regression import plot_values, score_values

from ..spec import Spec

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
MAX_CLASSES_PRINTED = 50
MAX_CLASSES_COUNTED = 50_000  # the matrix of their confusions has 20 GB; ImageNet-21k has 21,841


@dataclass(frozen=True)
class Case:
    """What is evaluated on which images, and what they are called."""

    kind: str
    """What is evaluated, for the printed line."""
    predict: Predict
    spec: Spec
    batches: Batches
    classes: Sequence[str]
    rest: Callable[[], str]
    """Returns what the line says of images that were left out; called after the evaluation."""

    @property
    def title(self) -> str:
        return f"{self.spec.model}, {self.kind}"


def report(case: Case, console: Console, plot: Path | None) -> dict[str, Any]:
    """Evaluate a function to outputs by its task, print its figures, draw them, and return them.

    Args:
        plot: a PNG to draw to; None for none.
    """
    return REPORTS[case.spec.task](case, console, plot)


def plot_name(spec: Spec, suffix: str = "") -> str:
    """Return the name of a task's plot."""
    names = {"classification": "confusion", "multi_label": "precision_recall", "regression": "values"}
    return f"{names[spec.task]}{suffix}.png"


PLOTS = ("confusion.png", "confusion_ema.png", "precision_recall.png", "precision_recall_ema.png", "values.png",
         "values_ema.png")  # fmt: skip


def _classification(case: Case, console: Console, plot: Path | None) -> dict[str, Any]:
    spec, classes = case.spec, case.classes
    if spec.num_classes > MAX_CLASSES_COUNTED:
        raise InputError(f"{spec.num_classes:,} classes are more than the {MAX_CLASSES_COUNTED:,} whose "
                         "confusions can be counted; evaluate a model with fewer")  # fmt: skip
    counts = count(case.predict, case.batches, spec.num_classes)
    result = counts.evaluation()
    top5 = f", top-5 {result.top5:.2f} %" if spec.num_classes > 5 else ""
    console.print(f"{case.kind}: top-1 {result.top1:.2f} %{top5} on {result.n} images{case.rest()}")
    if len(classes) <= MAX_CLASSES_PRINTED:
        table = Table("class", *terminal.right_aligned("images", "top-1 %"))
        seen = counts.confusion.sum(1).tolist()
        for name, images, top1 in zip(classes, seen, result.per_class, strict=True):
            table.add_row(name, str(images), f"{top1:.1f}" if images else "")
        console.print(table)
    console.print(f"balanced top-1 {result.balanced_top1:.2f} %, the mean of the classes' top-1")
    if plot is not None:
        plot_confusion(counts, classes, plot, f"{case.title}: top-1 {result.top1:.2f} %")
    return asdict(result)


def _multi_label(case: Case, console: Console, plot: Path | None) -> dict[str, Any]:
    spec, classes = case.spec, case.classes
    totals = score_labels(case.predict, case.batches, spec.num_classes, thresholds=spec.thresholds)
    result = totals.evaluation()
    chosen = "the thresholds of its run" if spec.thresholds else "a probability of 0.5"
    console.print(f"{case.kind}: mAP {result.map:.2f} %, micro F1 {result.micro_f1:.2f} % from {chosen} on, on "
                  f"{result.n} images{case.rest()}")  # fmt: skip
    if len(classes) <= MAX_CLASSES_PRINTED:
        console.print(_label_table(result, classes, spec.thresholds))
    if plot is not None:
        plot_precision_recall(totals, classes, plot, f"{case.title}: mAP {result.map:.2f} %")
    return asdict(result)


def _label_table(result: MultiLabelEvaluation, classes: Sequence[str], thresholds: Sequence[float]) -> Table:
    columns = ("images", "AP %", "threshold", "precision %", "recall %")
    table = Table("label", *terminal.right_aligned(*columns))
    rows = zip(classes, result.positives, result.average_precision, thresholds or (0.5,) * len(classes),
               result.precision, result.recall, strict=True)  # fmt: skip
    for name, images, average, threshold, precision, recall in rows:
        figures = (f"{average:.1f}", f"{threshold:.2f}", f"{precision:.1f}", f"{recall:.1f}") if images else ("",) * 4
        table.add_row(name, str(images), *figures)
    return table


def _regression(case: Case, console: Console, plot: Path | None) -> dict[str, Any]:
    name = case.classes[0]
    totals = score_values(case.predict, case.batches)
    result = totals.evaluation()
    console.print(f"{case.kind}: R² {result.r2:.4f}, mean absolute error {result.mae:.4g}, root mean square error "
                  f"{result.rmse:.4g} of {name} on {result.n} images{case.rest()}")  # fmt: skip
    if plot is not None:
        plot_values(totals, name, plot, f"{case.title}: R² {result.r2:.4f}")
    return asdict(result)


REPORTS = {"classification": _classification, "multi_label": _multi_label, "regression": _regression}
