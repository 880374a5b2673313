"""The commands info, eval, export, verify and demo; see shvit/cli.py for how they are called."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from rich.table import Table

from shvit import terminal
from shvit.certificate import Origin, certificate_path, read_certificate, read_origin
from shvit.checkpoint import holds_ema
from shvit.documents import to_json
from shvit.errors import CheckFailed, InputError, refuse, some
from shvit.files import atomic_write, check_output_folder, check_replaceable, is_file, sha256
from shvit.train.evaluate import Predict
from shvit.weights.resolve import Weights, find_weights, resolve_weights

from .backends.artifact import Artifact, artifact_files, open_artifact, refuse_changed, torch_predict
from .guards import check_apart, check_own, images_that_fit, rows_that_fit
from .images import BUNDLED, MAX_CALIBRATION, MAX_IMAGES, sample_images
from .labels import find_labels, match_classes, refuse_unknown
from .pipeline import LEARNING, SUFFIXES, Format, Options, Source, export, open_source_model
from .spec import MAX_IMG_SIZE, Precision, Spec, open_model, open_weights
from .summary import show
from .verify import Reference, certify, require

console = terminal.console()
MAX_CLASSES_PRINTED = 50
MAX_CLASSES_COUNTED = 50_000  # the matrix of their confusions has 20 GB; ImageNet-21k has 21,841


@dataclass(frozen=True)
class Info:
    """What a model costs, per stage, kind of layer and operator; for a SHViT also beside the designs it replaces."""

    model: tyro.conf.Positional[str]
    """A name that timm knows."""
    img_size: int | None = None
    """Input height and width in pixels; the model's own by default."""

    def run(self) -> dict[str, Any]:
        from .analysis.info import describe, tables

        description = describe(*open_model(self.model, None, self.img_size))
        for shown in tables(description):
            console.print(shown)
        return asdict(description)


def _right(name: str) -> Any:
    from rich.table import Column

    return Column(name, justify="right")


@dataclass(frozen=True)
class Eval:
    """Top-1 and top-5 accuracy on a folder of class folders, of a checkpoint or of an exported file.

    Class folders are matched by name to the classes that the checkpoint's run, or the file, knows.
    """

    data: str
    """A folder of class folders, or one that holds them under val/; a tar of one; a folder of WebDataset shards; a name
    that timm knows, such as torch/cifar10; `elpv` for the demo's held-out images."""
    split: str | None = None
    """Of shards and of a dataset with a name; validation by default."""
    checkpoint: Path | None = None
    """Weights in any layout, or a name of `shvit weights list`; of a run's last.pt both the weights and their average
    are evaluated."""
    model: str | None = None
    """A name that timm knows; by default the checkpoint's own model."""
    pretrained: bool = False
    """Take the model's published weights in place of a checkpoint."""
    ema: bool = False
    """Take the checkpoint's averaged weights alone."""
    artifact: Path | None = None
    """An .onnx file, .xml or .mlpackage of `shvit export`, in place of a model and checkpoint."""
    img_size: int | None = None
    """Input height and width in pixels; those that the checkpoint was trained for by default, or the model's own."""
    skip_unknown_classes: bool = False
    """Leave out and count images of classes that the model does not know, in place of refusing them."""
    all_images: bool = False
    """Evaluate on every image of a folder of class folders alone, those that the run was trained on too."""
    batch_size: int = 32
    """Images at a time."""
    workers: int = 0
    """Processes that read images."""
    max_corrupt: int = 10
    """Damaged images that are named and left out before the evaluation ends."""
    output: Path | None = None
    """A folder for accuracy.json and a picture of what is taken for what."""

    def run(self) -> dict[str, Any]:
        from shvit.train.data import check_loader, check_outside, has_one_part, open_eval_dataset, takes_split

        check_loader(self.batch_size, self.workers, self.max_corrupt)
        check_output_folder(self.output)
        check_own(self.output, "accuracy.json", b'"model"', ("confusion.png", "confusion_ema.png"))
        check_apart(self.output, checkpoint=self.checkpoint, artifact=self.artifact)
        if not self.data:
            raise InputError("--data is empty; give a folder of class folders, a tar or a name that timm knows")
        check_outside(self.output, Path(self.data))
        if not takes_split(self.data):
            refuse(f"{self.data} is no dataset with splits of its own", split=self.split)
        if not has_one_part(self.data):
            refuse(f"{self.data} has a part of its own to evaluate on", all_images=self.all_images)
        predict, spec, transform, known, weights = self._predict()
        trained_on = None if self.all_images else self._trained_on(weights)
        dataset = open_eval_dataset(self.data, self.split or "validation", trained_on)
        console.print(f"{self.data}: {dataset.part}")
        classes, index = self._match(dataset.classes, known, spec)
        kind = "weights" if weights is not None else "artifact"
        found = (transform, dataset, classes, index)
        result = {"model": spec.model, **self._evaluate(kind, predict, spec, *found)}
        if weights is not None and weights.checkpoint and not self.ema and holds_ema(weights.checkpoint):
            averaged = torch_predict(open_weights(replace(weights, ema=True), spec.img_size)[0])
            result["ema"] = self._evaluate("averaged weights", averaged, spec, *found)
        if self.output is not None:
            with atomic_write(self.output / "accuracy.json") as partial:
                partial.write_text(to_json({**result, "classes": classes}, indent=2) + "\n")
        return result

    def _match(self, found: list[str], known: tuple[str, ...], spec: Spec) -> tuple[list[str], list[int] | None]:
        """The model's classes, and of each of the dataset's the model's index; None where they are the same.

        Raises:
            InputError: the dataset has other classes than the model.
        """
        if known and found:
            match = match_classes(found, known)
            if len(match.unknown) == len(found):
                refuse_unknown(match, known, self.data, "give the folder that holds them")
            if not self.skip_unknown_classes:
                refuse_unknown(match, known, self.data, "leave their images out with --skip-unknown-classes")
            if match.missing:
                console.print(f"{self.data}: {len(match.missing)} of the model's {len(known)} classes are not in it "
                              f"({some(match.missing)}); accuracy is that of the others")  # fmt: skip
            return list(known), list(match.index)
        refuse("nothing tells the names of the model's classes", skip_unknown_classes=self.skip_unknown_classes)
        classes = list(known) or found or [str(i) for i in range(spec.num_classes)]
        if len(classes) != spec.num_classes:
            raise InputError(f"{self.data} has {len(classes)} classes and the model {spec.num_classes}; evaluate on "
                             "the classes that it was trained for")  # fmt: skip
        if found:
            console.print(f"nothing tells the names of the model's classes; {self.data}'s are taken for them in order: "
                          f"{some(classes)}")  # fmt: skip
        return classes, None

    def _evaluate(
        self,
        kind: str,
        predict: Any,
        spec: Spec,
        transform: Any,
        dataset: Any,
        classes: list[str],
        index: list[int] | None,
    ) -> dict[str, Any]:
        """Prints and returns the accuracy; draws it if there is a folder to draw into."""
        from shvit.train.data import eval_loader
        from shvit.train.evaluate import count, plot_confusion

        if spec.num_classes > MAX_CLASSES_COUNTED:
            raise InputError(f"{spec.num_classes:,} classes are more than the {MAX_CLASSES_COUNTED:,} whose "
                             "confusions can be counted; evaluate a model with fewer")  # fmt: skip
        loader = eval_loader(dataset, transform, rows_that_fit(self.batch_size, spec), self.workers, self.max_corrupt)
        batches = loader if index is None else Renumbered(loader, index)
        counts = count(predict, batches, spec.num_classes)
        result = counts.evaluation()
        left_out = getattr(batches, "left_out", 0)
        top5 = f", top-5 {result.top5:.2f} %" if spec.num_classes > 5 else ""
        rest = f"; {left_out} of classes that the model does not know are left out" if left_out else ""
        rest += f"; {loader.damaged} damaged ones are left out" if loader.damaged else ""
        console.print(f"{kind}: top-1 {result.top1:.2f} %{top5} on {result.n} images{rest}")
        if len(classes) <= MAX_CLASSES_PRINTED:
            table = Table("class", _right("images"), _right("top-1 %"))
            seen = counts.confusion.sum(1).tolist()
            for name, images, top1 in zip(classes, seen, result.per_class, strict=True):
                table.add_row(name, str(images), f"{top1:.1f}" if images else "")
            console.print(table)
        if self.output is not None:
            name = "confusion_ema.png" if kind == "averaged weights" else "confusion.png"
            plot_confusion(counts, classes, self.output / name, f"{spec.model}, {kind}: top-1 {result.top1:.2f} %")
        return {**asdict(result), "left_out": left_out, "damaged": loader.damaged}

    def _predict(self) -> tuple[Any, Spec, Any, tuple[str, ...], Weights | None]:
        """From what the transform makes to logits; that transform; known names of classes; the weights of no file."""
        if self.artifact is None:
            if self.checkpoint is None and not self.pretrained:
                raise InputError("nothing trained to evaluate; give --checkpoint, --artifact, or --model and "
                                 "--pretrained")  # fmt: skip
            weights = resolve_weights(self.model, self.checkpoint, self.ema, self.pretrained, console.print)
            model, spec = open_weights(weights, self.img_size, log=console.print)
            return torch_predict(model), spec, spec.transform(), known_classes(weights, spec), weights
        refuse(f"{self.artifact} holds its model and weights", model=self.model, checkpoint=self.checkpoint,
               pretrained=self.pretrained, ema=self.ema)  # fmt: skip
        refuse_changed(self.artifact)
        artifact = open_artifact(self.artifact)
        spec = artifact.spec
        if spec.output_kind == "features":
            raise InputError(f"{self.artifact} gives feature maps, which have no accuracy; export it with logits")
        if self.img_size not in (None, spec.img_size):
            raise InputError(f"{self.artifact} takes {spec.img_size} px; leave out --img-size {self.img_size}")
        known = tuple(artifact.labels) if len(artifact.labels) == spec.num_classes else ()
        return _to_logits(artifact), spec, spec.transform(normalize=False), known, None

    def _trained_on(self, weights: Weights | None) -> Any:
        """The images of the run that weights or file are of, where its folder, they or the certificate tell."""
        from shvit.train.data import TrainedOn, read_trained_on

        if weights is None:
            origin = read_origin(self.artifact)  # type: ignore[arg-type]
            return TrainedOn.from_weights(origin.data if origin else None)
        beside = None if weights.checkpoint is None else read_trained_on(weights.checkpoint)
        return beside or TrainedOn.from_weights(weights.info.data if weights.info else None)


class Renumbered:
    """Batches whose class indices are those of the model, for those of the dataset.

    Args:
        index: of each class of the dataset the model's; negative ones do not count, and are counted in `left_out`.
    """

    def __init__(self, batches: Any, index: list[int]):
        import torch

        self.batches = batches
        self.index = torch.tensor(index)
        self.left_out = 0

    def __iter__(self) -> Any:
        for images, targets in self.batches:
            if targets.max() >= len(self.index):
                raise InputError(f"an image of class {int(targets.max())}, and the dataset names "
                                 f"{len(self.index)} classes, counted from 0; mend the dataset")  # fmt: skip
            renumbered = self.index[targets.clamp_min(0)].where(targets >= 0, targets)
            self.left_out += int(((renumbered < 0) & (targets >= 0)).sum())
            yield images, renumbered


def known_classes(weights: Weights, spec: Spec) -> tuple[str, ...]:
    """The names of the classes, where they are known; says so if they are of another number than the model has."""
    if len(weights.classes) not in (0, spec.num_classes):
        console.print(f"{weights.name}: names {len(weights.classes)} classes, and the model has {spec.num_classes}; "
                      "the names are not used")  # fmt: skip
        return ()
    return weights.classes


def _to_logits(artifact: Artifact) -> Predict:
    """What the artifact gives, as logits: of probabilities their logarithm."""
    if artifact.spec.output_kind == "logits":
        return artifact
    return lambda pixels: artifact(pixels).clamp_min(1e-30).log()


@dataclass(frozen=True, kw_only=True)
class _FromModel:
    checkpoint: Path | None = None
    """Weights in any layout, or a name of `shvit weights list`; random ones by default, which are of use for timing
    alone."""
    model: str | None = None
    """A name that timm knows; by default the checkpoint's own model."""
    pretrained: bool = False
    """Take the model's published weights in place of a checkpoint."""
    ema: bool = False
    """Take the checkpoint's averaged weights."""
    img_size: int | None = None
    """Input height and width in pixels; those that the checkpoint was trained for by default, or the model's own."""
    images: Path | None = None
    """A folder of images to verify with, best the held-out ones in folders of their classes; scikit-image's
    bundled ones by default."""
    calibration: Path | None = None
    """A folder of training images from which 8-bit ranges are learned; scikit-image's bundled ones by default."""
    labels: Path | None = None
    """A text file with the name of a class on each line; those that the checkpoint's run knows by default, and
    ImageNet's for published weights."""

    def _check_apart(self, output: Path) -> None:
        check_apart(output, checkpoint=self.checkpoint, labels=self.labels, images=self.images,
                    calibration=self.calibration)  # fmt: skip

    def _source(self, outputs: str) -> Source:
        weights = resolve_weights(self.model, self.checkpoint, self.ema, self.pretrained, console.print)
        model, spec = open_source_model(weights, self.img_size, outputs, console.print)
        labels = []
        if outputs != "features":
            labels = find_labels(self.labels, spec.num_classes, known_classes(weights, spec))
            if not labels and weights.checkpoint is not None:
                console.print(f"{weights.name}: nothing tells the names of its {spec.num_classes} classes, so none are "
                              "written; give --labels")  # fmt: skip
        reference = Reference(
            model=model,
            spec=spec,
            images=sample_images(
                self.images, spec.num_classes, limit=images_that_fit(MAX_IMAGES, spec), classes=labels
            ),
            image_source=str(self.images or BUNDLED),
            labels=labels,
            checkpoint=weights.checkpoint,
            checkpoint_name=weights.name,
            ema=weights.ema,
            data=weights.info.data if weights.info else None,
        )
        limit = images_that_fit(MAX_CALIBRATION, spec)
        return Source(reference, spec, sample_images(self.calibration, limit=limit, part="train"))


@dataclass(frozen=True, kw_only=True)
class _Export(_FromModel):
    output: Path
    """The file to write; F.certificate.json is put beside it."""
    features: bool = False
    """Give feature maps, at strides 16, 32 and 64 of a SHViT, in place of logits."""
    softmax: bool = False
    """Give probabilities in place of logits."""

    precision: Precision = "fp32"
    kind: ClassVar[Format]

    def run(self) -> dict[str, Any]:
        if self.features:
            refuse("--features gives no classes", softmax=self.softmax, classifier=self._classifies, labels=self.labels)
        if self.precision != LEARNING[self.kind]:
            refuse(f"--precision {self.precision} learns nothing from images", calibration=self.calibration)
        self._check_output()
        source = self._source(self._outputs)
        if source.spec.num_classes == 1:
            refuse("the model has one output, of which there are no probabilities", softmax=self.softmax,
                   classifier=self._classifies)  # fmt: skip
        source = replace(source, spec=self._complete(source.spec))
        if self._classifies and not source.labels:
            raise InputError(f"--classifier needs names for the {source.spec.num_classes} classes; give --labels")
        certificate = export(self.kind, self.output, source, self._options())
        show(certificate, console)
        return {"artifact": str(self.output), "certificate": asdict(certificate)}

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
        check_output_folder(self.output.parent)
        for path in (*artifact_files(self.output), certificate_path(self.output)):
            check_replaceable(path)
            if path.suffix == ".mlpackage" and is_file(path):
                raise InputError(f"{path}: is a file; choose another name for --output")
            self._check_apart(path)
        if is_file(certificate := certificate_path(self.output)):
            try:
                read_certificate(self.output)
            except InputError as error:
                raise InputError(f"{certificate}: is there already and is no certificate; choose another name for "
                                 "--output") from error  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _ExportGraph(_Export):
    raw_pixels: bool = False
    """Take RGB pixels, uint8 (B, H, W, C), and normalize them inside; a normalized float32 (B, C, H, W) by default."""
    dynamic_batch: bool = False
    """Leave the batch size open; 1 by default."""

    def _complete(self, spec: Spec) -> Spec:
        return replace(spec, precision=self.precision, uint8_input=self.raw_pixels)

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
    """Take a normalized float32 (1, C, H, W); an RGB image by default."""
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
            spec, precision=self.precision, uint8_input=not self.tensor_input, other_sizes=tuple(self.other_sizes)
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

        check_output_folder(self.output)
        self._check_apart(self.output)
        check_own(self.output, "formats.json", b'"artifact"', ("formats.md",))
        return export_all(self.output, self._source("logits"), console)


EXPORT = {"onnx": ExportOnnx, "openvino": ExportOpenvino, "coreml": ExportCoreml, "all": ExportAll}


@dataclass(frozen=True)
class Verify:
    """Compares an exported file with its certificate and, on images, its model; exit status 1 if it drifts.

    The certificate beside the file tells its model and weights.
    """

    artifact: tyro.conf.Positional[Path]
    """An .onnx file, .xml (with its .bin) or .mlpackage of `shvit export`."""
    checkpoint: Path | None = None
    """The weights it was made from, or a name of `shvit weights list`; those that the certificate names by default."""
    model: str | None = None
    """The model it was made from; the certificate's by default."""
    pretrained: bool = False
    """It was made from the model's published weights."""
    ema: bool = False
    """It was made from the checkpoint's EMA weights; as the certificate says by default."""
    images: Path | None = None
    """A folder of images; scikit-image's bundled ones by default."""
    runtime: Literal["auto", "coreml"] = "auto"
    """coreml: run a Core ML package in Core ML, on a Mac; in our own evaluator by default."""

    def run(self) -> dict[str, Any]:
        refuse_changed(self.artifact)
        artifact = open_artifact(self.artifact, native=self.runtime == "coreml", rounded=True)
        weights = self._weights(read_origin(self.artifact), artifact.spec)
        model, spec = open_source_model(weights, artifact.spec.img_size, artifact.spec.output_kind, console.print)
        classes = known_classes(weights, spec) if artifact.spec.output_kind != "features" else ()
        reference = Reference(
            model=model,
            spec=spec,
            images=sample_images(
                self.images,
                spec.num_classes,
                limit=images_that_fit(MAX_IMAGES, spec, artifact.spec),
                classes=classes or artifact.labels,
            ),
            image_source=str(self.images or BUNDLED),
            labels=classes,
            checkpoint=weights.checkpoint,
            checkpoint_name=weights.name,
            ema=weights.ema,
            data=weights.info.data if weights.info else None,
        )
        certificate = certify(artifact, reference)
        show(certificate, console)
        require(certificate)
        return asdict(certificate)

    def _weights(self, origin: Origin | None, spec: Spec) -> Weights:
        """What it was made from: what the certificate says, which options must not contradict.

        Raises:
            InputError: nothing tells the weights, or they are not there.
            CheckFailed: it was made from another model or other weights.
        """
        made_from = origin.model if origin else spec.model
        if self.model is not None and self.model.partition(".")[0] != made_from.partition(".")[0]:
            raise self._other(f"another model: {made_from}, not {self.model}", model=made_from)
        model = self.model or made_from
        if origin is None:
            if self.checkpoint is None and self.model is None and not self.pretrained:
                raise InputError(f"{self.artifact}: no certificate beside it names its weights; give --checkpoint")
            return resolve_weights(model, self.checkpoint, self.ema, self.pretrained, console.print)
        if self.ema and not origin.ema and origin.checkpoint is not None:
            raise self._other("the weights themselves, not their average", ema=False)
        checkpoint, ema = self.checkpoint, self.ema or origin.ema
        if checkpoint is None and not self.pretrained and origin.checkpoint_sha256 is not None:
            checkpoint = self._certified(origin)
        weights = resolve_weights(model, checkpoint, ema if checkpoint else self.ema, self.pretrained, console.print)
        found = sha256(weights.checkpoint) if weights.checkpoint else None
        if found != origin.checkpoint_sha256:
            expected, given = (f"SHA-256 {each[:12]}…" if each else "random ones" for each in
                               (origin.checkpoint_sha256, found))  # fmt: skip
            named = f" ({origin.checkpoint})" if origin.checkpoint else ""
            raise self._other(f"another checkpoint: its weights are {expected}{named}, and {weights.name or 'no file'} "
                              f"is {given}", checkpoint_sha256=origin.checkpoint_sha256, found=found)  # fmt: skip
        return weights

    def _other(self, what: str, **certified: Any) -> CheckFailed:
        return CheckFailed(f"{self.artifact} was made from {what}", {"artifact": str(self.artifact), **certified})

    def _certified(self, origin: Origin) -> Path:
        """The checkpoint that a certificate names: as it is named, or beside the artifact; the one of its hash."""
        if origin.checkpoint is None:
            raise InputError(f"{self.artifact}: its certificate does not name its weights; give --checkpoint")
        named, folder = Path(origin.checkpoint), self.artifact.parent
        found = [path for path in (named, folder / named, folder / named.name) if is_file(path)]
        for path in found:
            if sha256(path) == origin.checkpoint_sha256:
                return path
        if found:
            return found[0]  # whose other hash is then said
        try:
            return find_weights(origin.checkpoint, console.print)[0]
        except InputError as error:
            raise InputError(f"{self.artifact}: its certificate names {named}, which is not there; give --checkpoint"
                             ) from error  # fmt: skip


@dataclass(frozen=True)
class Demo:
    """Train, export, verify, evaluate and time on real images, offline; writes one page with pictures."""

    output: Path = Path("demo")
    """The folder for everything that is made; report.html is the page."""
    data: Path | None = None
    """Your own images, a folder of class folders; solar cells (PyPI package elpv-dataset) by default."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Training epochs; the recipe's by default."""

    def run(self) -> dict[str, Any]:
        from .demo.run import demo

        return demo(self.output, self.data, self.epochs)
