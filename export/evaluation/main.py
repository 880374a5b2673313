"""The command `shvit eval`; see shvit/cli.py for how it is called."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from shvit import terminal
from shvit.certificate import read_origin
from shvit.checkpoint import holds_ema
from shvit.documents import to_json
from shvit.errors import InputError, refuse, some
from shvit.files import atomic_write, check_output_folder
from shvit.img_size import ImgSize
from shvit.train.evaluate import Predict
from shvit.weights.resolve import Weights, resolve_weights

from ..backends.backend import Artifact
from ..backends.registry import load_artifact, refuse_changed, torch_predict
from ..guards import check_apart, check_own, rows_that_fit
from ..labels import known_classes, match_classes, refuse_unknown
from ..spec import Spec, open_weights
from .report import PLOTS, Case, plot_name, report

console = terminal.console()
TABLE_OPTIONS = ("file_column", "label_columns", "label_separator")


@dataclass(frozen=True)
class Eval:
    """Measure the accuracy of a checkpoint or an exported file on a folder of class folders, or by a table of labels.

    Classes are matched by name to those that the checkpoint's run, or the file, knows. For labels of which an image has
    any number it is the mean average precision, for values the coefficient of determination and mean errors.
    """

    data: str
    """A folder of class folders, or one that holds them under val/, or a tar of one.
    Also a folder of WebDataset shards, a name that timm knows, such as torch/cifar10, or `elpv` (the demo's images)."""
    labels: Annotated[Path | None, tyro.conf.arg(name="data.labels")] = None
    """A table of labels, .csv, .tsv or .parquet, of the images in the folder --data."""
    file_column: Annotated[str | None, tyro.conf.arg(name="data.file-column")] = None
    """Column of file names in the table; by default one with a usual name."""
    label_columns: Annotated[tuple[str, ...], tyro.conf.arg(name="data.label-columns")] = ()
    """Column of labels in the table, or a column for each class; by default as in training."""
    label_separator: Annotated[str | None, tyro.conf.arg(name="data.label-separator")] = None
    """Separator of several labels in one cell; by default | or ; or a comma, whichever occurs."""
    split: str | None = None
    """Split name, for sharded or named datasets and tables with a column of splits; validation by default."""
    checkpoint: Path | None = None
    """Weights in any layout, or a name of `shvit weights list`.
    For a run's last.pt both the weights and EMA weights are evaluated."""
    model: str | None = None
    """A name that timm knows; by default the checkpoint's own model."""
    pretrained: bool = False
    """Take the model's published weights in place of a checkpoint."""
    ema: bool = False
    """Evaluate the checkpoint's EMA weights alone."""
    artifact: Path | None = None
    """An .onnx, .tflite or .pte file, .xml, .mlpackage or .param of `shvit export`, in place of a checkpoint."""
    img_size: ImgSize | None = None
    """Input size in pixels, as 224 or HEIGHTxWIDTH.
    By default the size that the checkpoint was trained for, or the model's own."""
    skip_unknown_classes: bool = False
    """Skip and count images of classes that the model does not know; by default they are an error."""
    all_images: bool = False
    """Evaluate on every image of a folder that has class folders alone, even those that the run was trained on."""
    batch_size: int = 32
    """Batch size."""
    workers: int = 0
    """Number of processes that read images."""
    max_corrupt: int = 10
    """Number of damaged images that are reported and skipped; one more ends the evaluation."""
    output: Path | None = None
    """A folder for accuracy.json and a confusion matrix."""

    def run(self) -> dict[str, Any]:
        from shvit.train.data.eval_dataset import has_one_part, takes_split
        from shvit.train.data.eval_loader import check_loader
        from shvit.train.data.splits import check_outside

        check_loader(self.batch_size, self.workers, self.max_corrupt)
        check_output_folder(self.output)
        check_own(self.output, "accuracy.json", b'"model"', PLOTS)
        check_apart(self.output, checkpoint=self.checkpoint, artifact=self.artifact)
        if not self.data:
            raise InputError("--data is empty; give a folder of class folders, a tar or a name that timm knows")
        check_outside(self.output, Path(self.data))
        if self.labels is None:
            refuse("there is no --data.labels", **{f"data.{name}": getattr(self, name) for name in TABLE_OPTIONS})
            if not takes_split(self.data):
                refuse(f"{self.data} is not a dataset with splits of its own", split=self.split)
        if self.labels is None and not has_one_part(self.data):
            refuse(f"{self.data} has a part of its own to evaluate on", all_images=self.all_images)
        predict, spec, transform, known, weights = self._predict()
        trained_on = None if self.all_images else self._trained_on(weights)
        dataset = self._dataset(spec, trained_on)
        console.print(f"{self.data}: {dataset.part}")
        dataset, classes, index = self._with_classes(dataset, known, spec)
        kind = "weights" if weights is not None else "artifact"
        evaluated = (transform, dataset, classes, index)
        result = {"model": spec.model, **self._evaluate(kind, predict, spec, *evaluated)}
        if weights is not None and weights.checkpoint and not self.ema and holds_ema(weights.checkpoint):
            averaged = torch_predict(open_weights(replace(weights, ema=True), spec.img_size)[0])
            result["ema"] = self._evaluate("EMA weights", averaged, spec, *evaluated)
        if self.output is not None:
            with atomic_write(self.output / "accuracy.json") as partial:
                partial.write_text(to_json({**result, "classes": classes}, indent=2) + "\n")
        return result

    def _dataset(self, spec: Spec, trained_on: Any) -> Any:
        """Return the images to evaluate on."""
        from shvit.train.data.eval_dataset import open_eval_dataset
        from shvit.train.labels.splits import open_labeled

        if self.labels is None:
            if spec.task != "classification":
                raise InputError(f"{spec.model} was trained for {spec.task}, and folders do not tell its labels; give "
                                 "--data.labels, a table of files and labels")  # fmt: skip
            return open_eval_dataset(self.data, self.split or "validation", trained_on, spec.pixels)
        columns = {name: getattr(self, name) for name in TABLE_OPTIONS}
        trained = (self.split, trained_on, spec.pixels)
        return open_labeled(self.labels, Path(self.data), spec.task, *trained, **columns)

    def _with_classes(self, dataset: Any, known: tuple[str, ...], spec: Spec) -> tuple[Any, list[str], Any]:
        """Return the dataset, the model's classes, and where the dataset's are class indices, the model's for each."""
        from shvit.train.labels.images import LabeledImages

        if spec.task == "regression":
            return dataset, list(known) or dataset.classes, None
        classes, index = self._match(dataset.classes, known, spec)
        if not isinstance(dataset, LabeledImages):
            return dataset, classes, index
        places = list(range(len(classes))) if index is None else index
        if left_out := [name for name, place in zip(dataset.classes, places, strict=True) if place < 0]:
            console.print(f"{self.data}: labels that the model does not know are left out: {some(left_out)}")
        return dataset.reordered(places, classes), classes, None

    def _match(self, names: list[str], known: tuple[str, ...], spec: Spec) -> tuple[list[str], list[int] | None]:
        """Return the model's classes and, for each of the dataset's, the model's index; None where they are the same.

        Raise InputError where the dataset has other classes than the model.
        """
        if known and names:
            match = match_classes(names, known)
            if len(match.unknown) == len(names):
                refuse_unknown(match, known, self.data, "give the folder that holds them")
            if not self.skip_unknown_classes:
                refuse_unknown(match, known, self.data, "leave their images out with --skip-unknown-classes")
            if match.missing:
                console.print(f"{self.data}: {len(match.missing)} of the model's {len(known)} classes are not in it "
                              f"({some(match.missing)}); accuracy is that of the others")  # fmt: skip
            return list(known), list(match.index)
        refuse("nothing tells the names of the model's classes", skip_unknown_classes=self.skip_unknown_classes)
        classes = list(known) or names or [str(i) for i in range(spec.num_classes)]
        if len(classes) != spec.num_classes:
            raise InputError(f"{self.data} has {len(classes)} classes and the model {spec.num_classes}; evaluate on "
                             "the classes that it was trained for")  # fmt: skip
        if names:
            console.print(f"nothing tells the names of the model's classes; {self.data}'s are taken for them in order: "
                          f"{some(classes)}")  # fmt: skip
        return classes, None

    def _evaluate(
        self,
        kind: str,
        predict: Predict,
        spec: Spec,
        transform: Any,
        dataset: Any,
        classes: list[str],
        index: list[int] | None,
    ) -> dict[str, Any]:
        """Print and return the figures; plot them if there is a folder for that."""
        from shvit.train.data.eval_loader import eval_loader

        loader = eval_loader(dataset, transform, rows_that_fit(self.batch_size, spec), self.workers, self.max_corrupt)
        batches = loader if index is None else Renumbered(loader, index)

        def rest() -> str:
            left_out = getattr(batches, "skipped", 0)
            unknown = f"; {left_out} of classes that the model does not know are left out" if left_out else ""
            return unknown + (f"; {loader.damaged} damaged ones are left out" if loader.damaged else "")

        suffix = "_ema" if kind == "EMA weights" else ""
        plot = None if self.output is None else self.output / plot_name(spec, suffix)
        figures = report(Case(kind, predict, spec, batches, classes, rest), console, plot)
        return {**figures, "left_out": getattr(batches, "skipped", 0), "damaged": loader.damaged}

    def _predict(self) -> tuple[Predict, Spec, Any, tuple[str, ...], Weights | None]:
        """Return the function to logits, its spec, its transform, known names of classes, and the weights, if any."""
        if self.artifact is None:
            if self.checkpoint is None and not self.pretrained:
                raise InputError("nothing trained to evaluate; give --checkpoint, --artifact, or --model and "
                                 "--pretrained")  # fmt: skip
            weights = resolve_weights(self.model, self.checkpoint, self.ema, self.pretrained, console.print)
            model, spec = open_weights(weights, self.img_size, log=console.print)
            return torch_predict(model), spec, spec.transform(), known_classes(weights, spec, console.print), weights
        refuse(f"{self.artifact} holds its model and weights", model=self.model, checkpoint=self.checkpoint,
               pretrained=self.pretrained, ema=self.ema)  # fmt: skip
        refuse_changed(self.artifact)
        artifact = load_artifact(self.artifact)
        spec = artifact.spec
        if spec.output_kind == "features":
            raise InputError(f"{self.artifact} gives feature maps, which have no accuracy; export it with logits")
        if self.img_size not in (None, spec.img_size):
            raise InputError(f"{self.artifact} takes {spec.img_size} px; leave out --img-size {self.img_size}")
        known = tuple(artifact.labels) if len(artifact.labels) == spec.num_classes else ()
        return _to_logits(artifact), spec, spec.transform(normalize=False), known, None

    def _trained_on(self, weights: Weights | None) -> Any:
        """Return the images that the weights were trained on, where their run, they or the certificate name them."""
        from shvit.train.data.eval_dataset import TrainedOn, read_trained_on

        if weights is None:
            origin = read_origin(self.artifact)  # type: ignore[arg-type]
            return TrainedOn.from_weights(origin.data if origin else None)
        beside = None if weights.checkpoint is None else read_trained_on(weights.checkpoint)
        return beside or TrainedOn.from_weights(weights.info.data if weights.info else None)


class Renumbered:
    """Batches whose class indices are the model's: `index` of the dataset's. Negative ones are counted in `skipped`."""

    def __init__(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], index: list[int]):
        self.batches = batches
        self.index = torch.tensor(index)
        self.skipped = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, targets in self.batches:
            if targets.max() >= len(self.index):
                raise InputError(f"an image of class {int(targets.max())}, and the dataset names "
                                 f"{len(self.index)} classes, counted from 0; fix the dataset")  # fmt: skip
            renumbered = self.index[targets.clamp_min(0)].where(targets >= 0, targets)
            self.skipped += int(((renumbered < 0) & (targets >= 0)).sum())
            yield images, renumbered


def _to_logits(artifact: Artifact) -> Predict:
    """Return a function to the artifact's logits, or values; for probabilities to what gives these."""
    if artifact.spec.output_kind != "probabilities":
        return artifact
    if artifact.spec.task == "multi_label":
        return lambda pixels: artifact(pixels).double().logit(eps=1e-15)
    return lambda pixels: artifact(pixels).clamp_min(1e-30).log()
