"""The commands `bench phone`, `bench import` and `site`; see shvit/cli.py for how they are called."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from shvit.errors import CheckFailed, InputError, refuse
from shvit.files import check_output_folder, scratch_folder, sha256
from shvit.img_size import ImgSize

from ..bench.records import Measurements, read_measurements
from ..bench.runtimes import is_artifact
from ..bench.tables import console, progress_line, show_devices, show_results
from ..web import Content

if TYPE_CHECKING:
    from .phone_record import PhoneRecord
    from .served import ServedModel

MAX_MINUTES = 1440
MAX_RECORDS = 32
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _BrowserOptions:
    models: Annotated[list[str] | None, tyro.conf.arg(metavar="[STR [STR ...]]")] = None
    """Names that timm knows, or .onnx files of `shvit export` with their certificates beside them.
    By default the checkpoint's model, or else shvit_s1 to shvit_s4."""
    baselines: list[str] = field(default_factory=list)
    """Names of baseline models to compare with; their weights are random."""
    precision: list[Literal["fp32", "fp16", "int8"]] = field(default_factory=lambda: ["fp32"])
    """Precisions of the models that are given by name."""
    checkpoint: Path | None = None
    """Weights of the named models, a file or a name of `shvit weights list`; random ones, equally fast, by default."""
    pretrained: bool = False
    """Use each named model's published weights in place of a checkpoint."""
    img_size: ImgSize | None = None
    """Input size in pixels of the named models, as 224 or HEIGHTxWIDTH.
    By default the size that the checkpoint was trained for, or each model's own."""
    images: Path | None = None
    """A folder of images, some of which are sent to the browser, resized and cropped, and published with a site.
    By default scikit-image's bundled images."""
    threads: list[int] = field(default_factory=lambda: [1])
    """Numbers of CPU threads that this machine is measured with."""
    rounds: int = 7
    """Rounds in which each case is timed, here and in the browser."""
    sustained: int = 30
    """Seconds that a browser runs one model without a pause."""
    ort_web: str | None = None
    """Location of ONNX Runtime for browsers: a folder, or `cdn`, from which the browser downloads it.
    By default a folder in the cache, to which missing files are downloaded from npm. Hashes are always checked."""

    @property
    def _hosted(self) -> bool:
        return self.ort_web != "cdn"

    def _check(self) -> None:
        from .phone_record import MAX_ROUNDS, MAX_SECONDS

        for option, value, low, high in (
            ("--rounds", self.rounds, 1, MAX_ROUNDS),
            ("--sustained", self.sustained, 2, MAX_SECONDS),
            *(("--threads", each, 1, 1024) for each in self.threads or [0]),
        ):
            if not low <= value <= high:
                raise InputError(f"{option} {value} is out of range; choose {low} to {high}")

    def _prepare(
        self, folder: Path, submit: str | None, progress: Progress
    ) -> "tuple[list[ServedModel], dict[str, Content]]":
        """Return the served models, and everything that a browser fetches."""
        from ..bench.cases import Settings, resolve_models
        from .ort_web import runtime_files
        from .served import Pace, check_names, create_contents, prepare_models, select_images

        models, checkpoint = resolve_models(self.models, self.checkpoint, self.pretrained, console.print)
        if not self.baselines and all(map(is_artifact, models)):
            refuse("all --models are files, which have their weights and size", checkpoint=self.checkpoint,
                   pretrained=self.pretrained, img_size=self.img_size)  # fmt: skip
        settings = Settings(1, checkpoint, self.img_size, pretrained=self.pretrained)
        runtime = runtime_files(Path(self.ort_web) if self.ort_web else None, progress) if self._hosted else None
        served = prepare_models(models, self.precision, settings, self.images, folder, progress)
        random = replace(settings, checkpoint=None, pretrained=False)
        served += prepare_models(self.baselines, self.precision, random, self.images, folder, progress)
        check_names(served)
        pace = Pace(rounds=self.rounds, sustained_s=self.sustained)
        return served, create_contents(served, select_images(self.images), runtime, pace, submit)

    def _measure_here(self, served: "Sequence[ServedModel]", progress: Progress) -> Measurements:
        from ..bench.measure import measure_files

        files = [(each.path, each.name, each.gmacs) for each in served]
        machine, results = measure_files(files, self.threads, self.rounds, progress)
        show_results(results)
        return Measurements(machine, tuple(results))


@dataclass(frozen=True, kw_only=True)
class BenchPhone(_BrowserOptions):
    """Serve a page that measures latency and outputs in a phone's browser, and measure this machine to compare with."""

    lan: bool = False
    """Accept connections from the network; only from this machine by default."""
    host: str | None = None
    """The name or address by which phones know this machine; guessed by default."""
    tls: bool = False
    """Serve HTTPS with a self-signed certificate, about which the browser warns.
    Without HTTPS a phone's browser has no threads, no WebGPU and no camera for the page."""
    port: int = 0
    """Port to listen on; any free port by default."""
    records: int = 1
    """Stop when this many records have arrived."""
    minutes: float = 60.0
    """Stop after this many minutes, even if records are missing."""
    output: Path = Path("phone")
    """A folder for the files, the records, bench.json, plots, and report.html."""

    def run(self) -> dict[str, Any]:
        from .phone import ServerConfig, bind_server, serve_phones
        from .served import policy
        from .server import RECORDS

        self._check()
        config = ServerConfig(self.lan, self.host, self.tls, self.port, 60 * self.minutes)
        server = bind_server(config)
        with progress_line("bench phone", lines=True) as progress:
            served, contents = self._prepare(self.output / "files", RECORDS, progress)
            received = _Received(self.output, served, self._measure_here(served, progress), self.records)
        serve_phones(contents, policy(self._hosted), received.add, config, server, console.print)
        return received.report()

    def _check(self) -> None:
        from ..bench.explorer import check_report_folder
        from ..guards import check_apart

        super()._check()
        check_report_folder(self.output)
        check_apart(self.output, images=self.images, checkpoint=self.checkpoint)
        if not 0 <= self.port <= 65535:
            raise InputError(f"--port {self.port} is out of range; choose 1 to 65535, or leave it out")
        if not 1 <= self.records <= MAX_RECORDS:
            raise InputError(f"--records {self.records} is out of range; choose 1 to {MAX_RECORDS}")
        if not 0 < self.minutes <= MAX_MINUTES:
            raise InputError(f"--minutes {self.minutes:g} is out of range; choose more than 0 and up to {MAX_MINUTES}")


class _Received:
    """The records received so far, `expected` in the end; bench.json and report.html are complete after each."""

    def __init__(self, output: Path, served: "Sequence[ServedModel]", measured: Measurements, expected: int):
        from ..bench.explorer import write_report

        self.output, self.measured, self.expected = output, measured, expected
        self.files = {(*each.key, sha256(each.path)) for each in served}
        write_report(measured, output, plots=False)  # even if no record arrives

    def add(self, record: "PhoneRecord") -> int:
        """Save a record and return how many more are awaited.

        Raises:
            InputError: the record is of other files.
            OSError: it cannot be saved, which is not the phone's fault.
        """
        from ..bench.explorer import write_report
        from .phone_record import add_record, describe_record, require_served, save_record

        require_served(record, self.files)
        measured = add_record(self.measured, record)
        try:
            save_record(record, self.output)
            write_report(measured, self.output, plots=False)
        except InputError as error:
            raise OSError(str(error)) from error
        self.measured = measured
        console.print(describe_record(record))
        return self.expected - len(measured.devices)

    def report(self) -> dict[str, Any]:
        """Print and write the results.

        Raises:
            CheckFailed: no record arrived, or a case was not timed.
        """
        if not self.measured.devices:
            message = "no phone has sent a record; open the address while the command runs, with --lan from a phone"
            raise CheckFailed(message, asdict(self.measured))
        result = _report(self.measured, self.output)
        if failed := [check for check in self.measured.checks if check.error]:
            first, count = failed[0], "one case was" if len(failed) == 1 else f"{len(failed)} cases were"
            case = f"{first.model} {first.precision} in {first.runtime} on {first.device}"
            raise CheckFailed(f"{count} not timed; {case}: {first.error}", result)
        return result


@dataclass(frozen=True, kw_only=True)
class BenchImport:
    """Write a report of the records that the page of `shvit bench phone`, or of a site, saved in a browser."""

    records: tyro.conf.Positional[tuple[Path, ...]]
    """JSON files that the page saved."""
    output: Path
    """A folder for bench.json, plots, and report.html."""
    beside: Path | None = None
    """A bench.json of `shvit bench`; its results are part of the report."""

    def run(self) -> dict[str, Any]:
        from ..bench.explorer import check_report_folder
        from .phone_record import add_record, describe_record, read_record_file

        check_report_folder(self.output)
        if not self.records:
            raise InputError("nothing to import; give at least one file that the page saved")
        measured = Measurements(None, ()) if self.beside is None else read_measurements(self.beside)
        for record in [read_record_file(path) for path in self.records]:
            measured = add_record(measured, record)
            console.print(describe_record(record))
        return _report(measured, self.output)


def _report(measured: Measurements, output: Path) -> dict[str, Any]:
    """Print the results and write the whole report."""
    from ..bench.explorer import write_report

    show_results(measured.results)
    show_devices(measured)
    console.print("wrote " + ", ".join(map(str, write_report(measured, output))))
    return asdict(measured)


@dataclass(frozen=True, kw_only=True)
class Site(_BrowserOptions):
    """Write a static site for any web host: a page that measures in browsers, an explorer, and a table of models."""

    output: Path
    """A folder for the site."""
    measured: Path | None = None
    """A bench.json whose results the explorer shows; by default this machine measures the site's files."""

    def run(self) -> dict[str, Any]:
        from ..guards import check_apart
        from .site import write_site

        self._check()
        check_apart(self.output, images=self.images, checkpoint=self.checkpoint, measured=self.measured)
        given = None if self.measured is None else read_measurements(self.measured)
        with scratch_folder() as folder, progress_line("site", lines=True) as progress:
            served, contents = self._prepare(folder, None, progress)
            measured = given or self._measure_here(served, progress)
            written = write_site(self.output, contents, served, measured, self._hosted)
        megabytes = sum(path.stat().st_size for path in written) / 1e6
        console.print(f"wrote {len(written)} files, {megabytes:.0f} MB, to {self.output}; any web host can serve them, "
                      "over HTTPS")  # fmt: skip
        return {"site": str(self.output), "files": [str(path.relative_to(self.output)) for path in written]}

    def _check(self) -> None:
        from .site import check_site_folder

        super()._check()
        check_output_folder(self.output)
        check_site_folder(self.output)
