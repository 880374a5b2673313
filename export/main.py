"""The commands info, eval, export, verify, bench and demo; see shvit/cli.py for how they are called."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from rich.table import Table
from torch import nn

from shvit import terminal
from shvit.checkpoint import holds_average
from shvit.deploy import deploy
from shvit.errors import InputError
from shvit.files import write_whole

from .runtimes import open_artefact, torch_predict
from .spec import Precision, Spec, open_model
from .verify import Certificate, certificate_path, certify, check_unchanged, require

console = terminal.console()
MOST_CLASSES_PRINTED = 50


@dataclass(frozen=True)
class Info:
    """MACs, parameters, activation bytes and tokens of a model, per stage and kind of layer."""

    model: tyro.conf.Positional[str]
    """A name that timm knows."""
    img_size: int | None = None
    """Input height and width in pixels; the model's own by default."""

    def run(self) -> dict[str, Any]:
        from .info import describe_layers

        model, spec = open_model(self.model, None, self.img_size)
        rows = describe_layers(model, spec)
        params = sum(p.numel() for p in model.parameters())
        table = Table(
            "stage", "layer", *(_right(name) for name in ("n", "MMACs", "params", "activations kB", "tokens"))
        )
        for row in rows:
            figures = (
                f"{row.macs / 1e6:.1f}",
                f"{row.params:,}",
                f"{row.activation_bytes / 1e3:,.0f}",
                f"{row.tokens}",
            )
            table.add_row(row.stage, row.kind, str(row.layers), *figures)
        console.print(table)
        macs = sum(row.macs for row in rows)
        console.print(f"{self.model} at {spec.img_size} px: {macs / 1e9:.3f} GMACs, {params:,} parameters")
        return {
            "model": self.model,
            "img_size": spec.img_size,
            "macs": macs,
            "params": params,
            "layers": [asdict(row) for row in rows],
        }


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
    """An .onnx file or .mlpackage of `shvit export`, in place of a model and checkpoint."""
    img_size: int | None = None
    """Input height and width in pixels; the model's own by default."""
    batch_size: int = 32
    """Images at a time."""
    workers: int = 0
    """Processes that read images."""
    output: Path | None = None
    """A folder for accuracy.json and a picture of what is taken for what."""

    def run(self) -> dict[str, Any]:
        from shvit.train.data import open_eval_dataset

        if self.batch_size < 1 or self.workers < 0:
            raise InputError(f"--batch-size {self.batch_size} or --workers {self.workers} is below its lowest, 1 and 0")
        predict, spec, transform = self._predict()
        dataset = open_eval_dataset(self.data, self.split)
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
        if self.img_size not in (None, spec.img_size):
            raise InputError(f"{self.artefact} takes {spec.img_size} px; leave out --img-size {self.img_size}")
        return artefact, spec, spec.transform(normalize=False)


@dataclass(frozen=True)
class _Export:
    model: str
    """A name that timm knows."""
    output: Path
    """The file to write; F.certificate.json is put beside it."""
    checkpoint: Path | None = None
    """Its weights, in any layout; random ones by default, which is of use for timing alone."""
    ema: bool = False
    """Take the checkpoint's averaged weights."""
    img_size: int | None = None
    """Input height and width in pixels; the model's own by default."""
    precision: Precision = "fp32"
    """Of weights and arithmetic."""
    images: Path | None = None
    """A folder of photographs to verify with; scikit-image's bundled ones by default."""

    suffix: ClassVar[str]

    def run(self) -> dict[str, Any]:
        self._check_output()
        model, spec = open_model(self.model, self.checkpoint, self.img_size, self.ema)
        spec = replace(spec, precision=self.precision, takes_pixels=self._takes_pixels)
        with write_whole(certificate_path(self.output)) as record, write_whole(self.output) as partial:
            self._write(deploy(model, spec.img_size), partial, spec)
            certificate = certify(open_artefact(partial), model, spec, self.images, self.checkpoint, self.output.name)
            require(certificate)
            record.write_text(json.dumps(asdict(certificate), indent=2) + "\n")
        show(certificate)
        return {"artefact": str(self.output), "certificate": asdict(certificate)}

    @property
    def _takes_pixels(self) -> bool:
        return False

    def _write(self, deployed: nn.Module, path: Path, spec: Spec) -> None:
        raise NotImplementedError

    def _check_output(self) -> None:
        if self.output.suffix != self.suffix:
            raise InputError(f"--output {self.output} must end in {self.suffix}")
        for path, folder in ((self.output, self.suffix == ".mlpackage"), (certificate_path(self.output), False)):
            if path.exists() and path.is_dir() != folder:
                raise InputError(f"{path}: is a {'file' if folder else 'folder'}; choose another name for --output")


@dataclass(frozen=True)
class ExportOnnx(_Export):
    """A verified ONNX file: normalised image in, logits out, both float32."""

    dynamic_batch: bool = False
    """Leave the batch size open; 1 by default."""

    suffix: ClassVar[str] = ".onnx"

    def _write(self, deployed: nn.Module, path: Path, spec: Spec) -> None:
        from .onnx import write_onnx

        write_onnx(deployed, path, spec, self.dynamic_batch)


@dataclass(frozen=True)
class ExportCoreml(_Export):
    """A verified Core ML package (ML Program, iOS 16): RGB image in, logits out; run here by our own evaluator."""

    suffix: ClassVar[str] = ".mlpackage"

    @property
    def _takes_pixels(self) -> bool:
        return True

    def _write(self, deployed: nn.Module, path: Path, spec: Spec) -> None:
        from .coreml import write_coreml

        write_coreml(deployed, path, spec)


EXPORT = {"onnx": ExportOnnx, "coreml": ExportCoreml}


@dataclass(frozen=True)
class Verify:
    """Compares an exported file with its certificate and, on photographs, its model; exit status 1 if it drifts."""

    artefact: tyro.conf.Positional[Path]
    """An .onnx file or .mlpackage of `shvit export`."""
    model: str
    """The model it was made from."""
    checkpoint: Path | None = None
    """The weights it was made from."""
    ema: bool = False
    """Take the checkpoint's averaged weights."""
    images: Path | None = None
    """A folder of photographs; scikit-image's bundled ones by default."""

    def run(self) -> dict[str, Any]:
        artefact = open_artefact(self.artefact)
        check_unchanged(self.artefact)
        model, spec = open_model(self.model, self.checkpoint, artefact.spec.img_size, self.ema)
        certificate = certify(artefact, model, spec, self.images, self.checkpoint)
        show(certificate)
        require(certificate)
        return asdict(certificate)


def show(certificate: Certificate) -> None:
    """Prints a certificate for people."""
    verdict = "gives its model's answers" if certificate.passed else "DRIFTS from its model"
    console.print(
        f"{certificate.artefact} {verdict}: {certificate.images} photographs in {certificate.runtime}, largest error "
        f"{certificate.max_abs_error:.1e} (relative {certificate.max_rel_error:.1e}), {certificate.snr_db:.0f} dB, "
        f"top-1 agreement {certificate.top1_agreement:.1f} %"
    )


@dataclass(frozen=True)
class Bench:
    """Latency of models and runtimes, interleaved round by round in one process; random weights."""

    models: list[str] = field(default_factory=lambda: ["shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"])
    """Names that timm knows, or .onnx files of `shvit export`."""
    runtimes: list[str] = field(default_factory=lambda: ["torch", "onnxruntime"])
    """torch (eager, deployed), onnxruntime."""
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    """Images at a time."""
    threads: int = 1
    """CPU threads of each runtime."""
    img_size: int | None = None
    """Input height and width in pixels; each model's own by default."""
    rounds: int = 11
    """How often each case takes its turn."""
    output: Path | None = None
    """A folder for bench.json and bench.png."""

    def run(self) -> dict[str, Any]:
        from rich.progress import Progress

        from .bench import bench, write_results

        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("rounds", total=self.rounds)
            results = bench(
                self.models,
                self.runtimes,
                self.batch_sizes,
                self.threads,
                self.img_size,
                self.rounds,
                lambda done: progress.update(task, completed=done),
            )
        table = Table("model", "runtime", *(_right(name) for name in ("px", "batch", "ms/image", "p10–p90", "ratio")))
        for result in results:
            spread = f"{result.latency_ms_p10:.2f}–{result.latency_ms_p90:.2f}"
            where = (str(result.img_size), str(result.batch_size), f"{result.latency_ms_p50:.2f}")
            table.add_row(result.model, result.runtime, *where, spread, f"{result.ratio_to_first:.2f}")
        console.print(table)
        console.print(f"{results[0].device}, {self.threads} thread(s), median of {self.rounds} interleaved rounds")
        if self.output is not None:
            from .report import plot_latency

            write_results(results, self.output / "bench.json")
            plot_latency(results, self.output / "bench.png")
        return {"results": [asdict(result) for result in results]}


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
