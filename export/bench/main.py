"""The command `shvit bench`; see shvit/cli.py for how it is called."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from shvit.errors import InputError, refuse
from shvit.files import scratch_folder
from shvit.img_size import ImgSize

from .records import LayerTime, LeftOut, Partition, Placement, Scaling
from .runtimes import DEFAULT_RUNTIMES, RUNTIMES, describe_runtimes, is_artifact
from .tables import (
    console,
    progress_line,
    show_layers,
    show_left_out,
    show_machine,
    show_partitions,
    show_placements,
    show_results,
    show_scaling,
)

if TYPE_CHECKING:
    from .cases import Settings

PACKAGE = ".mlpackage"
Progress = Callable[[str], None]
Pairs = Mapping[str, Sequence[str]]
"""Models by name, each with its runtimes."""
RuntimeNames = Annotated[
    list[str],
    tyro.conf.arg(
        help=f"Runtimes of the named models; {' and '.join(DEFAULT_RUNTIMES)} by default.\n{describe_runtimes()}\n"
    ),
]


@dataclass(frozen=True)
class Bench:
    """Measure the latency of models in runtimes, interleaved on pinned cores, and the machine's own peaks.

    `shvit bench phone` measures in a phone's browser, and `shvit bench import` reads the records that its page saved.
    """

    models: Annotated[list[str] | None, tyro.conf.arg(metavar="[STR [STR ...]]")] = None
    """Names that timm knows, or files of `shvit export`, which run in the runtime of their format.
    By default the checkpoint's model, or else shvit_s1 to shvit_s4."""
    runtimes: RuntimeNames = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    """Numbers of images in a batch."""
    threads: int = 1
    """CPU threads of each runtime, each on a core of its own."""
    img_size: ImgSize | None = None
    """Input size in pixels, as 224 or HEIGHTxWIDTH.
    By default the size that the checkpoint was trained for, or each model's own."""
    checkpoint: Path | None = None
    """Weights of the models: a file, or a name of `shvit weights list`. Random weights, the default, are as fast."""
    pretrained: bool = False
    """Use each model's published weights in place of a checkpoint."""
    against: list[Path] = field(default_factory=list)
    """Third-party files (.onnx, .xml, .mlpackage) to compare with, run with their runtime's defaults.
    Ratios are to the first of them."""
    rounds: int = 15
    """Rounds in which each case is timed; with more rounds, smaller differences can be told from noise."""
    profile: bool = False
    """Also report the time of each kind of layer, from each runtime's own profiler, and what delegates leave out."""
    sweep: bool = False
    """Also time 128 to 1024 pixels and batches of 1 to 64 (minutes for each model and runtime)."""
    compute_units: Literal["all", "cpu", "cpu-gpu", "cpu-ne"] = "all"
    """Compute units that Core ML may use, on a Mac: cpu-ne is the CPU and the Neural Engine."""
    output: Path | None = None
    """A folder for bench.json, plots, and report.html, a page to choose a model with."""

    def run(self) -> dict[str, Any]:
        from .cases import Settings, resolve_models
        from .explorer import check_report_folder, write_report
        from .measure import measure_models

        check_report_folder(self.output)
        self._check_options()
        models, checkpoint = resolve_models(self.models, self.checkpoint, self.pretrained, console.print)
        runtimes = self.runtimes or list(DEFAULT_RUNTIMES)
        settings = Settings(self.threads, checkpoint, self.img_size, self.compute_units, self.pretrained)
        with progress_line("bench") as progress:
            sizes, rounds = self.batch_sizes, self.rounds
            measured = measure_models(models, runtimes, sizes, settings, rounds, self.against, progress)
            show_results(measured.results)
            show_left_out(measured.left_out)
            pairs = _pairs(models, runtimes, measured.left_out)
            measured = replace(
                measured,
                layers=tuple(self._layers(pairs, settings, progress) if self.profile else ()),
                scaling=tuple(self._scaling(pairs, settings, progress) if self.sweep else ()),
                placements=tuple(self._placements(models, runtimes, settings, progress)),
                partitions=tuple(self._partitions(pairs, settings, progress) if self.profile else ()),
            )
            show_placements(measured.placements)
            show_partitions(measured.partitions)
        if measured.machine is not None:
            show_machine(measured.machine)
        if self.output is not None:
            console.print("wrote " + ", ".join(map(str, write_report(measured, self.output))))
        return asdict(measured)

    def _check_options(self) -> None:
        from ..backends.worker import peak_memory

        if self.sweep and peak_memory() is None:
            raise InputError("--sweep measures the memory of processes, which this system does not report; leave it "
                             "out")  # fmt: skip
        paths = [*self.against, *map(Path, self.models or ())]
        coreml = "coreml" in self.runtimes or any(path.suffix == PACKAGE for path in paths)
        if self.compute_units != "all" and not coreml:
            raise InputError(f"--compute-units {self.compute_units} is for Core ML, and nothing here runs in Core ML; "
                             "add --runtimes coreml or an .mlpackage, or leave it out")  # fmt: skip
        if self.models and all(map(is_artifact, self.models)):
            refuse("all --models are files, which have their weights, size and runtime", runtimes=self.runtimes,
                   checkpoint=self.checkpoint, pretrained=self.pretrained, img_size=self.img_size)  # fmt: skip

    def _placements(
        self, models: list[str], runtimes: list[str], settings: "Settings", progress: Progress
    ) -> Iterator[Placement]:
        """Yield the compute plan of every package that Core ML has run."""
        from ..backends.compute_plan import DEVICES, load_placements
        from .cases import BenchModel

        with scratch_folder() as folder:
            named = [name for name in models if not is_artifact(name)] if "coreml" in runtimes else []
            for name, path in (
                *((path.name, path) for path in [*self.against, *map(Path, models)] if path.suffix == PACKAGE),
                *((name, BenchModel(name, settings, folder).file("coreml", "fp16")) for name in named),
            ):
                progress(f"planning {name} in coreml")
                operations = load_placements(path, self.compute_units)
                yield Placement.of(name, self.compute_units, operations, DEVICES.values())

    def _layers(self, pairs: Pairs, settings: "Settings", progress: Progress) -> Iterator[LayerTime]:
        from .cases import BenchModel, choose_cores
        from .layer_times import measure_layers
        from .measure import pinned

        with scratch_folder() as folder, pinned(choose_cores(settings.threads), settings.threads):
            for name, runtimes in pairs.items():
                model = BenchModel(name, settings, folder)
                for runtime in (each for each in runtimes if RUNTIMES[each].has_profiler):
                    for batch_size in self.batch_sizes:
                        progress(f"profiling {name} in {runtime}")
                        rows = measure_layers(model, runtime, batch_size)
                        show_layers(rows)
                        yield from rows

    def _partitions(self, pairs: Pairs, settings: "Settings", progress: Progress) -> Iterator[Partition]:
        """Yield how each runtime that has delegates divides each model."""
        from .cases import BenchModel

        with scratch_folder() as folder:
            for name, runtimes in pairs.items():
                model = BenchModel(name, settings, folder)
                for runtime in runtimes:
                    if (division := RUNTIMES[runtime].delegation) is not None:
                        progress(f"dividing {name} in {runtime}")
                        partitions, outside = division(model)
                        yield Partition(name, runtime, partitions, dict(outside))

    def _scaling(self, pairs: Pairs, settings: "Settings", progress: Progress) -> Iterator[Scaling]:
        from .measure import measure_scaling

        for name, runtimes in pairs.items():
            for runtime in runtimes:
                with scratch_folder() as folder:
                    rows = measure_scaling(name, runtime, settings, folder, progress)
                show_scaling(rows)
                yield from rows


def _pairs(models: Sequence[str], runtimes: Sequence[str], left_out: Sequence[LeftOut]) -> Pairs:
    """Return each named model, none that is a file, with the runtimes that it was timed in."""
    missing = {(each.model, each.runtime) for each in left_out}
    named = dict.fromkeys(name for name in models if not is_artifact(name))
    return {name: [each for each in runtimes if (name, each) not in missing] for name in named}
