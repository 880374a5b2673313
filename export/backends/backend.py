"""Types of backends, each a file format and the runtime that runs it, and of artifacts, loaded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from shvit.errors import InputError
from shvit.img_size import ImgSize
from shvit.train.data.pixels.formats import PixelFormat

from ..formats.parameters import LayerParameters
from ..formats.rounding import Outputs, Rounded
from ..guards import finite, rows_that_fit
from ..quantization.qdq import LayerRanges
from ..quantization.ranges import Range
from ..spec import Precision, Spec
from ..wrappers import layers

Run = Callable[[torch.Tensor], Outputs]  # from what `Spec.feed` returns to the outputs that `Spec.outputs` names
Images = torch.Tensor | np.ndarray | Image.Image | Sequence[Image.Image]


# --- artifacts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """An exported file, loaded."""

    path: Path
    spec: Spec
    runtime: str
    operators: Mapping[str, int]  # number of each operator, most frequent first
    run: Run
    run_layers: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
    """From what `Spec.feed` returns to the output of each convolution and linear layer, by its name where known."""
    parameters: Callable[[], Mapping[str, LayerParameters]]  # the weights that each of these layers computes with
    scale_faults: Callable[[], list[str]]  # scales of 8-bit tensors that do not belong together, each as a sentence
    labels: Sequence[str] = ()  # names of the classes that the file holds
    largest_values: Callable[[], Mapping[str, float]] = dict
    """With rounding after each operation: the largest absolute values so far, by the operation's name."""
    overflow: Callable[[], str | None] = lambda: None
    """With rounding after each operation: the first operation whose result did not fit the precision so far."""
    run_with_defaults: Run | None = None
    """`run` with the runtime's own settings, where `run` has others that keep 8-bit sums from overflowing."""

    def __call__(self, images: Images) -> torch.Tensor:
        """Return the first output, mostly logits (B, classes).

        Args:
            images: PIL images of any size, which are resized and cropped as the spec says; or pixels (B, C, H, W) of
                the spec's size, as `spec.transform(normalize=False)` makes them.

        Raises:
            InputError: the file does not run, or its output is no prediction.
        """
        pixels = self._pixels(images)
        parts = pixels.split(rows_that_fit(max(len(pixels), 1), self.spec))
        return finite(self.path, torch.cat([self.run(self.spec.feed(part))[0] for part in parts]))

    def _pixels(self, images: Images) -> torch.Tensor:
        if isinstance(images, torch.Tensor | np.ndarray):
            return torch.as_tensor(images)
        transform = self.spec.transform(normalize=False)
        images = [images] if isinstance(images, Image.Image) else images
        return torch.stack([transform(self.spec.pixels.convert(image, "image")) for image in images])


class ImageInput(NamedTuple):
    """The input of an image model's file, which need not be one of ours."""

    img_size: ImgSize
    batch: int | None  # the one batch size that it takes; None for any
    precision: str


def image_input(path: Path, shapes: Sequence[Sequence[int | str | None]], precision: str) -> ImageInput:
    """Return the image input of a file from the shapes of its inputs, in which an open length is no number.

    Raise InputError where there is no single input of four dimensions, or height and width are open.
    """
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise InputError(f"{path}: has no single input of four dimensions; only image models are timed here")
    batch, *sides = shapes[0]
    sizes = [side for side in sides if isinstance(side, int) and side > 4]
    if len(sizes) < 2:
        raise InputError(f"{path}: leaves the image's height and width open; export it for one size")
    return ImageInput(ImgSize(*sizes[:2]), batch if isinstance(batch, int) else None, precision)


# --- timing -----------------------------------------------------------------------------------------------------------

Job = dict[str, Any]
"""How worker.py opens a file: `runner`, `path` and the runner's own options, as JSON."""
JOB_FILES = ("path", "sessions")
"""The options of a job that name files, of which an emulated processor sees copies."""


@dataclass(frozen=True)
class Timing:
    """A runtime of `shvit bench`: in which precision a format's file is written, and how it is run."""

    help: str
    """Description in `shvit bench --help`."""
    precision: str
    """Compute precision."""
    file: Precision
    """Precision that the file is exported in."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Options of the job besides the backend's own."""
    on_cpu: bool = True
    """Run in the environment that the backend sets, and profiled where the backend can; False on other devices."""


PROFILED_RUNS = 20
UNSTEADY_RUNS = 3  # the first of these, which do not count


class OperatorTime(NamedTuple):
    """Seconds that one operator takes in one run, as a runtime's own profiler tells."""

    operator: str
    """The runtime's name for the operation."""
    weight: Sequence[int]
    """Shape of a convolution's weight (outputs, inputs of a group, height, width); empty for all else."""
    seconds: float


class Delegation(NamedTuple):
    """How a graph is divided between a delegate, which is fast, and the runtime's own operators."""

    partitions: int
    """Parts of the graph that the delegate computes, each in one call."""
    outside: Mapping[str, int]
    """Operators that the delegate leaves to the runtime, with their numbers."""


# --- ARM64 ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wheel:
    """A package for ARM64 Linux, pinned."""

    name: str
    version: str
    sha256: Mapping[str, str]
    """The digest of its wheel, by the version of Python that it is for, such as 3.11; `any` for all others."""


@dataclass(frozen=True)
class Library:
    """Functions of C around a runtime in C++, which worker.py's runner calls through ctypes: its job names `library`.

    It is compiled for ARM64 with the headers and libraries of the wheels.
    """

    source: str  # a C++ file beside this one
    flags: tuple[str, ...]  # of g++, which runs in the folder that the wheels are unpacked in, and writes there

    @property
    def path(self) -> Path:
        """Where the source is."""
        return Path(__file__).with_name(self.source)

    @property
    def name(self) -> str:
        """The compiled file."""
        return Path(self.source).with_suffix(".so").name


@dataclass(frozen=True)
class Arm64Build:
    """The build of a runtime for ARM64 Linux: what worker.py's runner needs there besides Python and NumPy."""

    wheels: tuple[Wheel, ...]
    loaded: str | Library  # by the runner: a module of the wheels, or a library


# --- backends ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """Options of a format besides model, size and precision; each field is one of `shvit export FORMAT`."""

    @property
    def classifies(self) -> bool:
        """True if the file returns a label besides probabilities."""
        return False

    def complete(self, spec: Spec) -> Spec:
        """Return the spec with what these options change; raise InputError where they contradict it or each other."""
        return spec

    def for_pixels(self, pixels: PixelFormat) -> "FormatOptions":
        """Return these options; without an input of images where a model's pixels are not an image's."""
        return self


def with_pixel_input(spec: Spec, wanted: bool, otherwise: str = "leave out --raw-pixels") -> Spec:
    """Return the spec of a file that takes pixels and normalizes them itself, where that is wanted.

    Args:
        otherwise: what a message tells to do where the model's pixels are not an image's.
    """
    if wanted and not spec.pixels.uses_pillow:
        raise InputError(f"{spec.model} takes {spec.pixels}, and an input of pixels has 1 or 3 channels of 8 bits; "
                         f"{otherwise}")  # fmt: skip
    return replace(spec, uint8_input=wanted)


@dataclass(frozen=True, kw_only=True)
class GraphOptions(FormatOptions):
    """Options of formats that take batches."""

    raw_pixels: bool = False
    """Take RGB pixels, uint8 (B, H, W, C), and normalize them inside; a normalized float32 (B, C, H, W) by default."""
    dynamic_batch: bool = False
    """Leave the batch size open; 1 by default."""

    def complete(self, spec: Spec) -> Spec:
        return with_pixel_input(spec, self.raw_pixels)


class Source(Protocol):
    """The model that a file is written from. Each result is computed once for all files of one model."""

    @property
    def spec(self) -> Spec: ...
    @property
    def labels(self) -> Sequence[str]: ...
    def deployed(self) -> nn.Module:
        """Return the model in its inference form."""

    def unfolded(self) -> nn.Module:
        """Return the deployed model with identities unfolded, which QDQ files in int8 are made from."""

    def ranges(self, symmetric: bool = False) -> Mapping[str, LayerRanges]:
        """Return the ranges of layers in int8; of formats without a zero point symmetric ones."""

    def coreml_ranges(self) -> dict[str, Range]:
        """Return the ranges of Core ML's w8a8, which the first file that is written fills."""

    def calibration_pixels(self) -> torch.Tensor:
        """Return pixels (n, C, H, W)."""

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for this key, whatever the precision of the file."""


O = TypeVar("O", bound=FormatOptions)
Writer = Callable[[Path, Spec], None]
"""Writes a file with the given spec, whose excluded layers may differ from call to call."""


@dataclass(frozen=True, kw_only=True)
class Backend(Generic[O]):
    """A file format and the runtime that runs it: all that export, verification and benchmarks know of them."""

    name: str  # the format's word on the command line: `shvit export NAME`
    title: str
    suffix: str
    inner_suffix: str = ""  # what stands before it in every file's name, as in F.ncnn.param
    companions: tuple[str, ...] = ()  # suffixes of further files that belong to an artifact
    help: str  # help text of the export command
    timings: Mapping[str, Timing]
    """Runtimes by their words on the command line, `shvit bench --runtimes NAME`; exported files run in the first."""
    job: Callable[[Path, int, str, str], Job]
    """Returns the job for a file, a batch size, a compute precision and a key of `COMPUTE_UNITS`."""
    profile: Callable[[Path, torch.Tensor, int, str], list[OperatorTime]] | None = None
    """Returns the time of each operator of a file, for a batch of its inputs, a number of threads and a compute
    precision; None where the runtime has no profiler."""
    delegation: Callable[[Path], Delegation] | None = None
    """Returns how a file is divided; None where the runtime has no delegates."""
    packages: tuple[str, ...]  # modules that write and run a file
    extra: str = "export"  # the extra of this package that installs them
    precisions: tuple[Precision, ...]  # those that can be exported, the default first
    precision_help: str
    compared: tuple[Precision, ...]  # those that `shvit export all` writes
    calibrated: Precision  # the precision whose ranges are learned from images
    options: type[O]
    all_options: O  # the options that `shvit export all` writes with
    create_writer: Callable[[Source, O], Writer]
    create_extras: Callable[[Source, O], Mapping[str, Callable[[Path], str]]] | None = None
    """Returns what writes further files, by their suffixes, that are not run here; each returns what it wrote."""
    load: Callable[[Path, int | None], Artifact]  # from a path and a number of threads, the runtime's choice where None
    load_native: Callable[[Artifact], Artifact] | None = None
    """The same file in the vendor's runtime, where `load` runs it in an evaluator of ours."""
    load_rounded: Callable[[Artifact, int | None], Artifact] | None = None
    """The same file in half precision, rounded after each operation; None where `load` does so itself."""
    inspect: Callable[[Path], ImageInput]  # reads the input of a file, which need not be one of ours
    unfolds_identities: bool = True  # int8 is made from the model with its identities unfolded
    float_stem: bool = False
    """Leave an int8 model's first convolution, which has three channels, in float32: it is faster so."""
    float_head: bool = False
    """Leave an int8 model's classifier in float32, where the format would round its result too."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the process that runs it; set before it starts."""
    arm64: Arm64Build | None = None
    """The runtime's build for ARM64, which files are verified in under emulation; None where there is none."""
    overflow_advice: str = ""  # how to run int8 on a processor whose 8-bit sums overflow

    @property
    def runtime(self) -> str:
        """The runtime in which exported files are timed."""
        return next(iter(self.timings))

    @property
    def ending(self) -> str:
        """What the names of all its files end in."""
        return self.inner_suffix + self.suffix

    def options_for(self, spec: Spec) -> O:
        """Return the options that `shvit export all` writes a model with."""
        return self.all_options.for_pixels(spec.pixels)  # type: ignore[return-value]

    def float_layers(self, model: nn.Module) -> tuple[str, ...]:
        """Return the layers of a deployed model that stay in float32 in any int8 file."""
        names, modules = zip(*layers(model), strict=True)
        head = names[-1:] if self.float_head and isinstance(modules[-1], nn.Linear) else ()
        return (*(names[:1] if self.float_stem else ()), *head)


HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""On Linux the C library then asks for pages of 2 MB: with one image at a time the weights come from memory, and a
processor fetches ahead within a page only. docs/explanation/measurements.md has the figures."""


# --- rounding ---------------------------------------------------------------------------------------------------------

SHOWN_VALUES = 3


def apply_rounding(artifact: Artifact, rounded: Rounded) -> Artifact:
    """Return the artifact as it runs with rounding after each operation."""
    runtime = f"{artifact.runtime}, {str(rounded.dtype).removeprefix('torch.')} after each operation"
    return replace(artifact, runtime=runtime, run=rounded.run, run_layers=rounded.run_layers,
                   largest_values=lambda: rounded.nearest(SHOWN_VALUES), overflow=lambda: rounded.overflow)  # fmt: skip
