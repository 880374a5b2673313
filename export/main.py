"""Commands export and verify; see shvit/cli.py for how they are called."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from shvit import terminal
from shvit.certificate import certificate_path
from shvit.errors import InputError, refuse
from shvit.files import check_output_folder
from shvit.img_size import ImgSize
from shvit.weights.resolve import resolve_weights

from .analysis.comparison import export_all, imports
from .analysis.survey import MODELS, survey
from .arm64.emulator import DEFAULT_CPU, PROCESSORS, Cpu
from .backends.backend import Backend, FormatOptions
from .backends.registry import BACKENDS, artifact_files
from .guards import check_apart, check_own
from .pipeline import export_model, verify_artifact
from .source import Outputs, create_source
from .spec import Precision
from .tables import show
from .verify import require

console = terminal.console()


@dataclass(frozen=True, kw_only=True)
class _FromModel:
    checkpoint: Path | None = None
    """Weights in any layout, or a name of `shvit weights list`; random ones, for benchmarks alone, by default."""
    model: str | None = None
    """A name that timm knows; by default the checkpoint's own model."""
    pretrained: bool = False
    """Take the model's published weights in place of a checkpoint."""
    ema: bool = False
    """Take the checkpoint's EMA weights."""
    img_size: ImgSize | None = None
    """Input size in pixels, as 224 or HEIGHTxWIDTH.
    By default the size that the checkpoint was trained for, or the model's own."""
    images: Path | None = None
    """A folder of images to verify with, ideally the validation images in folders of their classes.
    By default scikit-image's bundled ones."""
    calibration: Path | None = None
    """A folder of training images from which 8-bit ranges are learned; scikit-image's bundled ones by default."""
    labels: Path | None = None
    """A text file with the name of a class on each line.
    By default those that the checkpoint's run knows, and ImageNet's for published weights."""

    def _check_apart(self, output: Path) -> None:
        check_apart(output, checkpoint=self.checkpoint, labels=self.labels, images=self.images,
                    calibration=self.calibration)  # fmt: skip


CPU_HELP = "\n".join(
    [
        f"Processor that QEMU emulates, {DEFAULT_CPU} by default; a runtime's kernels differ by what it has.",
        *(f"{name}: {each.help}." for name, each in PROCESSORS.items()),
    ]
)
EmulatedCpu = Annotated[Cpu | None, tyro.conf.arg(help=CPU_HELP)]


def _emulated(cpu: Cpu | None, wanted: bool, option: str) -> Cpu | None:
    """Return the processor to emulate; None where it is not wanted, and then none may be named."""
    if not wanted:
        refuse(f"it is the processor of {option}", cpu=cpu)
        return None
    return cpu or DEFAULT_CPU


@dataclass(frozen=True, kw_only=True)
class _Export(_FromModel, FormatOptions):
    output: Path
    """The file to write; F.certificate.json is put beside it."""
    features: bool = False
    """Output feature maps, at strides 16, 32 and 64 of a SHViT, in place of logits."""
    softmax: bool = False
    """Output probabilities in place of logits."""
    precision: Precision = "fp32"
    verify_arm64: bool = False
    """Verify the file in its runtime's build for ARM64 too, under QEMU, before it appears."""
    cpu: EmulatedCpu = None

    backend: ClassVar[Backend[Any]]

    def run(self) -> dict[str, Any]:
        if self.features:
            refuse("--features gives no classes", softmax=self.softmax)
        if self.precision != self.backend.calibrated:
            refuse(f"--precision {self.precision} learns nothing from images", calibration=self.calibration)
        arm64 = _emulated(self.cpu, self.verify_arm64, "--verify-arm64")
        for path in (*artifact_files(self.output), certificate_path(self.output)):
            self._check_apart(path)
        own = {each.name: getattr(self, each.name) for each in fields(self.backend.options)}
        common = {each.name: getattr(self, each.name) for each in fields(_FromModel)}
        outputs: Outputs = "features" if self.features else "probabilities" if self.softmax else "logits"
        certificate = export_model(self.backend.name, output=self.output, precision=self.precision, outputs=outputs,
                                   arm64=arm64, log=console.print, **common, **own)  # fmt: skip
        show(certificate, console)
        return {"artifact": str(self.output), "certificate": asdict(certificate)}


def _command(backend: Backend[Any]) -> type[_Export]:
    """Return the command that exports a backend's format, with the format's own options."""
    choices: Any = Literal.__getitem__(backend.precisions)
    precision = Annotated[choices, tyro.conf.arg(help=backend.precision_help)]
    content = {"__doc__": backend.help, "__annotations__": {"precision": precision},
               "precision": backend.precisions[0], "backend": backend}  # fmt: skip
    command = type(f"Export{backend.name.title()}", (backend.options, _Export), content)
    return dataclass(frozen=True, kw_only=True)(command)


@dataclass(frozen=True, kw_only=True)
class ExportAll(_FromModel):
    """Write every format in every precision, verified, and a table of what each one costs."""

    output: Path
    """A folder for the files, formats.md and formats.json."""
    verify_arm64: bool = False
    """Verify the files in their runtimes' builds for ARM64 too, under QEMU, those that have one."""
    cpu: EmulatedCpu = None
    rounds: int = 9
    """Rounds in which the files are timed, interleaved, one image at a time on one thread; 0 leaves it out."""

    def run(self) -> dict[str, Any]:
        arm64 = _emulated(self.cpu, self.verify_arm64, "--verify-arm64")
        if self.rounds < 0:
            raise InputError(f"--rounds {self.rounds} must be 0 or more")
        check_output_folder(self.output)
        self._check_apart(self.output)
        check_own(self.output, "formats.json", b'"artifact"', ("formats.md",))
        weights = resolve_weights(self.model, self.checkpoint, self.ema, self.pretrained, console.print)
        source = create_source(weights, "logits", self.img_size, self.images, self.calibration, self.labels,
                               console.print)  # fmt: skip
        return export_all(self.output, source, self.rounds, arm64, console)


@dataclass(frozen=True, kw_only=True)
class ExportSurvey:
    """Try models in every format, and write a table of which files match their models and why others do not.

    Models have random weights. What a survey in the same folder has tried already is not tried again.
    """

    output: Path
    """A folder for survey.md and survey.json; no model's file is kept."""
    models: list[str] = field(default_factory=lambda: list(MODELS))
    """Names that timm knows."""
    formats: list[str] = field(default_factory=lambda: list(BACKENDS))
    """Formats to try; by default all whose packages are installed."""
    precision: Precision = "fp32"
    """Weight and compute precision; those that learn ranges need trained weights, and are not tried."""
    images: Path | None = None
    """A folder of images to compare with; scikit-image's bundled ones by default."""

    def run(self) -> dict[str, Any]:
        check_output_folder(self.output)
        check_own(self.output, "survey.json", b'"passed"', ("survey.md",))
        for name in self.formats:
            if name not in BACKENDS:
                raise InputError(f"unknown format {name!r}; choose from {', '.join(BACKENDS)}")
            if self.precision not in BACKENDS[name].precisions or self.precision == BACKENDS[name].calibrated:
                raise InputError(
                    f"{BACKENDS[name].title} is not tried in {self.precision}; leave {name} out of --formats"
                )
        formats = [name for name in self.formats if imports(BACKENDS[name], console)]
        outcomes = survey(self.output, self.models, formats, self.precision, self.images, console.print)
        held = {
            model: [name for name, each in row.items() if each.passed is not False] for model, row in outcomes.items()
        }
        return {"output": str(self.output), "held": held}


EXPORT = {**{name: _command(backend) for name, backend in BACKENDS.items()}, "all": ExportAll, "survey": ExportSurvey}


@dataclass(frozen=True)
class Verify:
    """Compare an exported file with its certificate and, on images, with its model; exit status 1 where it exceeds its
    tolerance.

    The certificate beside the file names its model and weights.
    """

    artifact: tyro.conf.Positional[Path]
    """An .onnx, .tflite or .pte file, .xml or .param (with what belongs to it) or .mlpackage of `shvit export`."""
    checkpoint: Path | None = None
    """Weights that it was made from, or a name of `shvit weights list`; those that the certificate names by default."""
    model: str | None = None
    """Name of the model that it was made from; the certificate's by default."""
    pretrained: bool = False
    """State that it was made from the model's published weights."""
    ema: bool = False
    """State that it was made from the checkpoint's EMA weights; as the certificate says by default."""
    images: Path | None = None
    """A folder of images; scikit-image's bundled ones by default."""
    runtime: Literal["auto", "coreml"] = "auto"
    """Use coreml to run a Core ML package in Core ML, on a Mac; by default it runs in our own evaluator."""
    arm64: bool = False
    """Run up to 64 images in its runtime's build for ARM64 too, which phones run, under QEMU.
    The first time downloads that build, once for each format; ExecuTorch's needs g++-aarch64-linux-gnu for it."""
    cpu: EmulatedCpu = None

    def run(self) -> dict[str, Any]:
        own = ("runtime", "arm64", "cpu")
        options = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in own}
        arm64 = _emulated(self.cpu, self.arm64, "--arm64")
        certificate = verify_artifact(**options, native=self.runtime == "coreml", arm64=arm64, log=console.print)
        show(certificate, console)
        require(certificate)
        return asdict(certificate)
