"""The commands info, eval, export, verify and demo; see shvit/cli.py for how they are called."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from rich.table import Table

from shvit import terminal
from shvit.certificate import certificate_path, check_unchanged
from shvit.checkpoint import holds_average
from shvit.errors import InputError
from shvit.files import write_whole
from shvit.train.evaluate import Predict

from .formats import SUFFIXES, Format, Options, Source, export, open_source_model
from .labels import find_labels
from .photographs import BUNDLED, MAX_CALIBRATION, find_photographs
from .runtimes import Artefact, artefact_files, open_artefact, torch_predict
from .spec import MAX_IMG_SIZE, Precision, Spec, open_model
from .verify import MAX_FLOAT_MACS, Certificate, Reference, artefact_sha256, certify, require

console = terminal.console()
MOST_CLASSES_PRINTED = 50


@dataclass(frozen=True)
class Info:
    """What a model costs, per stage, kind of layer and operator; for a SHViT also beside the designs it replaces."""

    model: tyro.conf.Positional[str]
    """A name that timm knows."""
    img_size: int | None = None
    """Input height and width in pixels; the model's own by default."""

    def run(self) -> dict[str, Any]:
        from .info import describe, tables

        description = describe(*open_model(self.model, None, self.img_size))
        for shown in tables(description):
            console.print(shown)
        return asdict(description)


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right")


@dataclass(frozen=True)
class Eval:
    """Top-1 and top-5 accuracy on a folder of class folders, of a checkpoint or of an exported file."""

    data: str
    """A folder of class folders, or one that holds them under val/; a tar of one; a folder of WebDataset shards; a name
    that timm knows, such as torch/cifar10; `elpv` for the demo's held-out photographs."""
    split: str = "validation"
    """Of shards and of a dataset with a name."""
    model: str = "shvit_s1"
    """A name that timm knows; not needed with an artefact."""
    checkpoint: Path | None = None
    """Its weights, in any layout; of a run's last.pt both the weights and their average are evaluated."""
    ema: bool = False
    """Take the checkpoint's averaged weights alone."""
    artefact: Path | None = None
    """An .onnx file, .xml or .mlpackage of `shvit export`, in place of a model and checkpoint."""
    img_size: int | None = None
    """Input height and width in pixels; the model's own by default."""
    all_images: bool = False
    """Evaluate on every image of a folder of class folders alone, those that the run was trained on too."""
    batch_size: int = 32
    """Images at a time."""
    workers: int = 0
    """Processes that read images."""
    output: Path | None = None
    """A folder for accuracy.json and a picture of what is taken for what."""

    def run(self) -> dict[str, Any]:
        from shvit.train.data import open_eval_dataset, read_trained_on

        if self.batch_size < 1 or self.workers < 0:
            raise InputError(f"--batch-size {self.batch_size} or --workers {self.workers} is below its lowest, 1 and 0")
        predict, spec, transform = self._predict()
        run = None if self.checkpoint is None or self.all_images else read_trained_on(self.checkpoint)
        dataset = open_eval_dataset(self.data, self.split, run)
        console.print(f"{self.data}: {dataset.part}")
        classes = dataset.classes or [str(i) for i in range(spec.num_classes)]
        if len(classes) != spec.num_classes:
            raise InputError(f"{self.data} has {len(classes)} classes and the model {spec.num_classes}; evaluate on "
                             "the classes that it was trained for")  # fmt: skip
        kind = "weights" if self.artefact is None else "artefact"
        result = {"model": spec.model, **self._evaluate(kind, predict, spec, transform, dataset, classes)}
        if self.checkpoint is not None and not self.ema and holds_average(self.checkpoint):
            averaged = torch_predict(open_model(self.model, self.checkpoint, self.img_size, ema=True)[0])
            result["ema"] = self._evaluate("averaged weights", averaged, spec, transform, dataset, classes)
        if self.output is not None:
            with write_whole(self.output / "accuracy.json") as partial:
                partial.write_text(json.dumps({**result, "classes": classes}, indent=2) + "\n")
        return result

    def _evaluate(
        self, kind: str, predict: Any, spec: Spec, transform: Any, dataset: Any, classes: list[str]
    ) -> dict[str, Any]:
        """Prints and returns the accuracy; draws it if there is a folder to draw into."""
        from shvit.train.data import eval_loader
        from shvit.train.evaluate import count, plot_confusion

        loader = eval_loader(dataset, transform, self.batch_size, self.workers)
        counts = count(predict, loader, spec.num_classes)
        result = counts.evaluation()
        top5 = f", top-5 {result.top5:.2f} %" if spec.num_classes > 5 else ""
        console.print(f"{kind}: top-1 {result.top1:.2f} %{top5} on {result.n} photographs")
        if len(classes) <= MOST_CLASSES_PRINTED:
            table = Table("class", _right("photographs"), _right("top-1 %"))
            seen = counts.confusion.sum(1).tolist()
            for name, photographs, top1 in zip(classes, seen, result.per_class, strict=True):
                table.add_row(name, str(photographs), f"{top1:.1f}" if photographs else "")
            console.print(table)
        if self.output is not None:
            name = "confusion_ema.png" if kind == "averaged weights" else "confusion.png"
            plot_confusion(counts, classes, self.output / name, f"{spec.model}, {kind}: top-1 {result.top1:.2f} %")
        return asdict(result)

    def _predict(self) -> tuple[Any, Spec, Any]:
        """From what the transform makes to logits, and that transform."""
        if self.artefact is None:
            if self.checkpoint is None:
                raise InputError("nothing trained to evaluate; give --checkpoint or --artefact")
            model, spec = open_model(self.model, self.checkpoint, self.img_size, self.ema)
            return torch_predict(model), spec, spec.transform()
        if self.checkpoint is not None:
            raise InputError("--artefact and --checkpoint exclude each other: an artefact holds its weights")
        artefact = open_artefact(self.artefact)
        spec = artefact.spec
        if spec.gives == "features":
            raise InputError(f"{self.artefact} gives feature maps, which have no accuracy; export it with logits")
        if self.img_size not in (None, spec.img_size):
            raise InputError(f"{self.artefact} takes {spec.img_size} px; leave out --img-size {self.img_size}")
        return _to_logits(artefact), spec, spec.transform(normalize=False)


def _to_logits(artefact: Artefact) -> Predict:
    """What the artefact gives, as logits: of probabilities their logarithm."""
    if artefact.spec.gives == "logits":
        return artefact
    return lambda pixels: artefact(pixels).clamp_min(1e-30).log()


@dataclass(frozen=True, kw_only=True)
class _FromModel:
    model: str
    """A name that timm knows."""
    checkpoint: Path | None = None
    """Its weights, in any layout; random ones by default, which is of use for timing alone."""
    ema: bool = False
    """Take the checkpoint's averaged weights."""
    img_size: int | None = None
    """Input height and width in pixels; the model's own by default."""
    images: Path | None = None
    """A folder of photographs to verify with, best the held-out ones in folders of their classes; scikit-image's
    bundled ones by default."""
    calibration: Path | None = None
    """A folder of training photographs from which 8-bit ranges are learnt; scikit-image's bundled ones by default."""
    labels: Path | None = None
    """A text file with the name of a class on each line; ImageNet's by default for 1000 classes."""

    def _source(self, outputs: str) -> Source:
        model, spec = open_source_model(self.model, self.checkpoint, self.img_size, self.ema, outputs)
        reference = Reference(
            model=model,
            spec=spec,
            photographs=find_photographs(self.images, spec.num_classes),
            image_source=str(self.images or BUNDLED),
            labels=[] if outputs == "features" else find_labels(self.labels, spec.num_classes),
            checkpoint=self.checkpoint,
        )
        return Source(reference, spec, find_photographs(self.calibration, most=MAX_CALIBRATION, part="train"))


@dataclass(frozen=True, kw_only=True)
class _Export(_FromModel):
    output: Path
    """The file to write; F.certificate.json is put beside it."""
    features: bool = False
    """Give feature maps, at strides 16, 32 and 64 of a SHViT, in place of logits."""
    softmax: bool = False
    """Give probabilities in place of logits."""

    kind: ClassVar[Format]

    def run(self) -> dict[str, Any]:
        if self.features and (self.softmax or self._classifies):
            raise InputError("--features gives no classes; leave out --softmax and --classifier")
        self._check_output()
        source = self._source(self._outputs)
        source = replace(source, spec=self._complete(source.spec))
        if self._classifies and not source.labels:
            raise InputError(f"--classifier needs names for the {source.spec.num_classes} classes; give --labels")
        certificate = export(self.kind, self.output, source, self._options())
        show(certificate)
        return {"artefact": str(self.output), "certificate": asdict(certificate)}

    @property
    def _outputs(self) -> str:
        return "features" if self.features else "probabilities" if self.softmax or self._classifies else "logits"

    @property
    def _classifies(self) -> bool:
        """Gives a label besides the probabilities."""
        return False

    def _complete(self, spec: Spec) -> Spec:
        """With what the format's own options say."""
        raise NotImplementedError

    def _options(self) -> Options:
        return Options()

    def _check_output(self) -> None:
        suffix = SUFFIXES[self.kind]
        if self.output.suffix != suffix:
            raise InputError(f"--output {self.output} must end in {suffix}")
        for path in (*artefact_files(self.output), certificate_path(self.output)):
            folder = path.suffix == ".mlpackage"
            if path.exists() and path.is_dir() != folder:
                raise InputError(f"{path}: is a {'file' if folder else 'folder'}; choose another name for --output")


@dataclass(frozen=True, kw_only=True)
class _ExportGraph(_Export):
    precision: Precision = "fp32"
    raw_pixels: bool = False
    """Take RGB pixels, uint8 (B, H, W, C), and normalise them inside; a normalised float32 (B, C, H, W) by default."""
    dynamic_batch: bool = False
    """Leave the batch size open; 1 by default."""

    def _complete(self, spec: Spec) -> Spec:
        return replace(spec, precision=self.precision, takes_pixels=self.raw_pixels)

    def _options(self) -> Options:
        return Options(dynamic_batch=self.dynamic_batch)


@dataclass(frozen=True, kw_only=True)
class ExportOnnx(_ExportGraph):
    """A verified ONNX file."""

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Of weights and arithmetic."""

    kind: ClassVar[Format] = "onnx"


@dataclass(frozen=True, kw_only=True)
class ExportOpenvino(_ExportGraph):
    """A verified OpenVINO IR, F.xml and F.bin."""

    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Of weights and arithmetic. fp16 halves the file, a CPU still computes in float32; bf16 also asks for its
    arithmetic."""

    kind: ClassVar[Format] = "openvino"


@dataclass(frozen=True, kw_only=True)
class ExportCoreml(_Export):
    """A verified Core ML package (ML Program, iOS 16; iOS 17 for w8a8), run here by our own evaluator."""

    precision: Literal["fp32", "fp16", "int8", "w8a8"] = "fp32"
    """Of weights and arithmetic; int8 of weights alone, which are half of fp16's size, w8a8 of activations too."""
    tensor_input: bool = False
    """Take a normalised float32 (1, C, H, W); an RGB image by default."""
    other_sizes: tuple[int, ...] = ()
    """Further heights and widths in pixels that the same package takes."""
    classifier: bool = False
    """A classifier with labels and their probabilities, as Vision and Xcode's preview want it."""

    kind: ClassVar[Format] = "coreml"

    @property
    def _classifies(self) -> bool:
        return self.classifier

    def _complete(self, spec: Spec) -> Spec:
        if self.other_sizes and self.precision == "w8a8":
            raise InputError("--precision w8a8 takes one size; leave out --other-sizes")
        for px in self.other_sizes:
            if not 1 <= px <= MAX_IMG_SIZE:
                raise InputError(f"--other-sizes {px} is out of range; choose 1 to {MAX_IMG_SIZE}")
        if spec.img_size in self.other_sizes or len(set(self.other_sizes)) < len(self.other_sizes):
            raise InputError(f"--other-sizes: give each size once, and not {spec.img_size}, which is the first")
        return replace(
            spec, precision=self.precision, takes_pixels=not self.tensor_input, other_sizes=tuple(self.other_sizes)
        )

    def _options(self) -> Options:
        return Options(classifier=self.classifier)


@dataclass(frozen=True, kw_only=True)
class ExportAll(_FromModel):
    """Every format in every precision, verified, and a table of what each one costs."""

    output: Path
    """A folder for the files, formats.md and formats.json."""

    def run(self) -> dict[str, Any]:
        from .table import export_all

        return export_all(self.output, self._source("logits"), console)


EXPORT = {"onnx": ExportOnnx, "openvino": ExportOpenvino, "coreml": ExportCoreml, "all": ExportAll}


@dataclass(frozen=True)
class Verify:
    """Compares an exported file with its certificate and, on photographs, its model; exit status 1 if it drifts."""

    artefact: tyro.conf.Positional[Path]
    """An .onnx file, .xml (with its .bin) or .mlpackage of `shvit export`."""
    model: str
    """The model it was made from."""
    checkpoint: Path | None = None
    """The weights it was made from."""
    ema: bool = False
    """Take the checkpoint's averaged weights."""
    images: Path | None = None
    """A folder of photographs; scikit-image's bundled ones by default."""
    runtime: Literal["auto", "coreml"] = "auto"
    """coreml: run a Core ML package in Core ML, on a Mac; in our own evaluator by default."""

    def run(self) -> dict[str, Any]:
        artefact = open_artefact(self.artefact, native=self.runtime == "coreml", rounded=True)
        check_unchanged(self.artefact, artefact_sha256(self.artefact))
        model, spec = open_source_model(
            self.model, self.checkpoint, artefact.spec.img_size, self.ema, artefact.spec.gives
        )
        reference = Reference(
            model=model,
            spec=spec,
            photographs=find_photographs(self.images, spec.num_classes),
            image_source=str(self.images or BUNDLED),
            checkpoint=self.checkpoint,
        )
        certificate = certify(artefact, reference)
        show(certificate)
        require(certificate)
        return asdict(certificate)


def show(certificate: Certificate) -> None:
    """Prints a certificate for people."""
    console.print(_headline(certificate))
    table = Table("figure", _right("value"), show_header=False)
    rows = [
        ("signal to noise", f"{certificate.snr_db:.1f} dB below the outputs' spread"),
        (
            "error of an image, of the spread",
            f"median {certificate.median_rel_error:.1e}, 99 % within {certificate.p99_rel_error:.1e}, "
            f"largest {certificate.max_rel_error:.1e} ({certificate.worst_image})",
        ),
        ("largest difference", f"{certificate.max_abs_error:.1e}"),
        ("top-1 / top-5 agreement", f"{certificate.top1_agreement:.1f} / {certificate.top5_agreement:.1f} %"),
    ]
    if certificate.changed:
        near_ties = certificate.changed - certificate.changed_decisions
        rows.append(("other top-1", f"{certificate.changed_decisions} decisions, {near_ties} near-ties"))
    if certificate.accuracy is not None:
        rows.append(("accuracy, model → file", f"{certificate.model_accuracy:.2f} → {certificate.accuracy:.2f} %"))
    if certificate.worst_layer is not None:
        rows.append(("worst layer", f"{certificate.worst_layer}, {certificate.worst_layer_snr_db:.1f} dB"))
    if largest := certificate.largest_values:
        rows.append(("largest values", ", ".join(f"{name} {value:.3g}" for name, value in largest.items())))
    if kept := certificate.spec.kept:
        rows.append(("not in int8", f"{', '.join(kept)}: {certificate.kept_macs:.1f} % of the multiplications"))
    rows.append(("weights", f"of {certificate.compared_layers} layers compared one by one"))
    rows.append(("preprocessing", f"within {certificate.grey_levels:.2g} grey levels of timm's"))
    rows.append(("weights' file", "none: random weights" if certificate.random_weights else "trained"))
    rows += [("note", note) for note in certificate.notes]
    rows.append(("size", f"{certificate.artefact_bytes / 1e6:.2f} MB"))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _headline(certificate: Certificate) -> str:
    """The verdict in a sentence, with what must not be overlooked."""
    random = " with random weights" if certificate.random_weights else ""
    compared = f"{certificate.images} photographs in {certificate.runtime}"
    if certificate.passed is None:
        return f"{certificate.artefact}{random} undecided: {'; '.join(certificate.reasons)}; give --images ({compared})"
    verdict = "gives its model's answers" if certificate.passed else "DRIFTS from its model"
    floats = ""
    if certificate.kept_macs > MAX_FLOAT_MACS:
        floats = (f"; {certificate.kept_macs:.0f} % of its multiplications are not in int8, without which it would "
                  "not keep to the bounds")  # fmt: skip
    return f"{certificate.artefact}{random} {verdict}: {compared}{floats}"


@dataclass(frozen=True)
class Demo:
    """Train, export, verify, evaluate and time on real photographs, offline; writes one page with pictures."""

    output: Path = Path("demo")
    """The folder for everything that is made; report.html is the page."""
    data: Path | None = None
    """Your own photographs, a folder of class folders; solar cells (PyPI package elpv-dataset) by default."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Training epochs; the recipe's by default."""

    def run(self) -> dict[str, Any]:
        from .demo import demo

        return demo(self.output, self.data, self.epochs)
