"""The commands bench, bench phone, bench import and site; see shvit/cli.py for how they are called."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.markup import escape
from rich.table import Column, Table

from shvit import terminal
from shvit.errors import CheckFailed, InputError, printable, refuse
from shvit.files import check_output_folder, scratch_folder, sha256

PACKAGE = ".mlpackage"
console = terminal.console()

ModelNames = Annotated[list[str] | None, tyro.conf.arg(metavar="[STR [STR ...]]")]
"""None where the option is not given: a list that is empty was meant to name some."""


def _right(name: str) -> Any:
    return Column(name, justify="right")


@dataclass(frozen=True)
class Bench:
    """Latency of models and runtimes, which take turns on pinned cores, and what the machine can do at best.

    Runtimes: torch, torch-channels-last, torch-bf16, torch-compiled, torch-compiled-bf16; onnxruntime,
    onnxruntime-int8; openvino, openvino-bf16, openvino-int8; coreml (on a Mac); cuda, cuda-bf16, onnxruntime-cuda,
    onnxruntime-tensorrt; and reference, which is how others export: timm's model, its norms folded, opset 11.

    `shvit bench phone` measures in a phone's browser, `shvit bench import` reads what such a page saved; each tells its
    own options with --help.
    """

    models: ModelNames = None
    """Names that timm knows, or files of `shvit export`, which run in the runtime of their format; by default the
    checkpoint's model, or else shvit_s1 to shvit_s4."""
    runtimes: list[str] = field(default_factory=list)
    """Of the models that are given by name; see above. By default torch and onnxruntime."""
    batch_sizes: list[int] = field(default_factory=lambda: [1])
    """Images at a time."""
    threads: int = 1
    """CPU threads of each runtime, each on a core of its own."""
    img_size: int | None = None
    """Input height and width in pixels; by default those that the checkpoint was trained for, or each model's own."""
    checkpoint: Path | None = None
    """Weights of the models, a file or a name of `shvit weights list`; random ones by default, which are as fast."""
    pretrained: bool = False
    """Take each model's published weights in place of a checkpoint."""
    against: list[Path] = field(default_factory=list)
    """Files of anyone's (.onnx, .xml, .mlpackage) that all others are compared with, run with their runtime's
    defaults."""
    rounds: int = 15
    """How often each case takes its turn; more of them decide what noise hides."""
    profile: bool = False
    """Also tell which kinds of layers take the time, from each runtime's own profiler."""
    sweep: bool = False
    """Also time 128 to 1024 pixels and batches of 1 to 64 (minutes for each model and runtime)."""
    compute_units: Literal["all", "cpu", "cpu-gpu", "cpu-ne"] = "all"
    """What Core ML may run on, on a Mac: cpu-ne is the CPU and the Neural Engine."""
    output: Path | None = None
    """A folder for bench.json, pictures, and report.html, a page to choose a model with."""

    def run(self) -> dict[str, Any]:
        from .worker import peak_memory

        check_report_folder(self.output)
        if self.sweep and peak_memory() is None:
            raise InputError("--sweep measures the memory of processes, which this system does not tell; leave it out")
        if self.compute_units != "all" and not self._uses_coreml():
            raise InputError(
                f"--compute-units {self.compute_units} is for Core ML, in which nothing is to run here; "
                "add --runtimes coreml or an .mlpackage, or leave it out"
            )
        if self.models and all(map(_is_file, self.models)):
            refuse("all --models are files, which have their weights, size and runtime", runtimes=self.runtimes,
                   checkpoint=self.checkpoint, pretrained=self.pretrained, img_size=self.img_size)  # fmt: skip
        models, checkpoint = choose_models(self.models, self.checkpoint, self.pretrained)
        return replace(self, models=models, runtimes=self.runtimes or DEFAULT_RUNTIMES, checkpoint=checkpoint)._run()

    @property
    def _chosen(self) -> list[str]:
        return self.models or []

    def _run(self) -> dict[str, Any]:
        """With every default filled in."""
        from .cases import Settings
        from .measure import bench
        from .records import Measurements

        settings = Settings(self.threads, self.checkpoint, self.img_size, self.compute_units, self.pretrained)
        with _status("bench") as progress:
            machine, results = bench(
                self._chosen, self.runtimes, self.batch_sizes, settings, self.rounds, self.against, progress
            )
            show_results(results)
            measured = Measurements(
                machine,
                tuple(results),
                tuple(self._layers(settings, progress) if self.profile else ()),
                tuple(self._scaling(settings, progress) if self.sweep else ()),
                placements=tuple(self._placements(settings, progress)),
            )
            show_placements(measured.placements)
        show_machine(machine)
        if self.output is not None:
            console.print("wrote " + ", ".join(map(str, write_report(measured, self.output))))
        return asdict(measured)

    def _uses_coreml(self) -> bool:
        return "coreml" in self.runtimes or any(path.suffix == PACKAGE for path in self._paths())

    def _paths(self) -> list[Path]:
        """Everything that may be a file."""
        return [*self.against, *(Path(name) for name in self._chosen)]

    def _placements(self, settings: Any, progress: Any) -> Iterator[Any]:
        """Of every package that Core ML has run."""

        from .cases import FILES, Subject
        from ..backends.compute_plan import measure_placement

        for path in self._paths():
            if path.suffix == PACKAGE:
                progress(f"planning {path.name} in coreml")
                yield measure_placement(path, self.compute_units, path.name)
        with scratch_folder() as folder:
            for name in self._chosen if "coreml" in self.runtimes else ():
                if Path(name).suffix not in FILES:
                    progress(f"planning {name} in coreml")
                    package = Subject(name, settings, folder).coreml
                    yield measure_placement(package, self.compute_units, name)

    def _layers(self, settings: Any, progress: Any) -> Iterator[Any]:

        from .cases import FILES, Subject, choose_cores
        from .layer_times import has_profiler, measure_layers
        from .measure import pinned

        with scratch_folder() as folder, pinned(choose_cores(settings.threads), settings.threads):
            for name in self._chosen:
                if Path(name).suffix in FILES:
                    continue
                subject = Subject(name, settings, folder)
                for runtime in filter(has_profiler, self.runtimes):
                    for batch_size in self.batch_sizes:
                        progress(f"profiling {name} in {runtime}")
                        rows = measure_layers(subject, runtime, batch_size)
                        show_layers(rows)
                        yield from rows

    def _scaling(self, settings: Any, progress: Any) -> Iterator[Any]:

        from .cases import FILES
        from .scaling import sweep

        for name in self._chosen:
            for runtime in self.runtimes if Path(name).suffix not in FILES else ():
                with scratch_folder() as folder:
                    rows = sweep(name, runtime, settings, folder, progress)
                show_scaling(rows)
                yield from rows


OURS = ["shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"]
DEFAULT_RUNTIMES = ["torch", "onnxruntime"]


def choose_models(models: list[str] | None, checkpoint: Path | None, pretrained: bool) -> tuple[list[str], Path | None]:
    """The models to be timed, where none are named the checkpoint's; and the checkpoint's file.

    Raises:
        InputError: as `resolve_weights`, or a checkpoint and pretrained weights are both asked for.
    """
    from shvit.weights.resolve import find_weights, resolve_weights

    if models is not None and not models:
        raise InputError("--models: nothing to try; give at least one model")
    if pretrained:
        refuse("--pretrained takes each model's published weights", checkpoint=checkpoint)
    if checkpoint is None:
        return models or OURS, None
    if models:
        return models, find_weights(checkpoint, console.print)[0]
    weights = resolve_weights(None, checkpoint, log=console.print)
    return [weights.model], weights.checkpoint


def _is_file(model: str) -> bool:
    from .cases import FILES

    return Path(model).suffix in FILES


@contextmanager
def _status(what: str, lines: bool = False) -> Iterator[Callable[[str], None]]:
    """A line that says what is under way, on a terminal; elsewhere nothing, or plain lines if asked for."""
    if not console.is_terminal:
        yield console.print if lines else lambda _: None
        return
    with console.status(what) as status:
        yield lambda line: status.update(escape(printable(line)))


def show_results(results: Sequence[Any]) -> None:
    """Prints latencies for people, and what noise left undecided."""
    from .plots import form
    from .records import disturbance

    phones = any(each.device for each in results)
    runtimes = {each.runtime: each.precision for each in results}
    alike = any(runtimes[each.runtime] != each.precision for each in results)  # two precisions in one runtime
    alike = alike or any(name.endswith("bf16") and precision == "fp32" for name, precision in runtimes.items())
    names = ("model", "runtime", "device") if phones else ("model", "runtime")
    heads = ("px", "batch", "ms/image", "p90", "p99", "ratio", "95 %", "% of peak")
    table = Table(*names, *(_right(name) for name in heads))
    costs = Table(*names, *(_right(name) for name in ("batch", "CPU ms/image", "load ms", "first ms", "MB")))
    for each in results:
        what = [each.model, form(each) if alike or phones else each.runtime]
        what += [each.device or "this machine"] if phones else []
        table.add_row(
            *what,
            str(each.img_size),
            str(each.batch_size),
            *(f"{value:.2f}" for value in (each.latency_ms_p50, each.latency_ms_p90, each.latency_ms_p99)),
            _ratio(each),
            f"{each.ratio_low:.2f}–{each.ratio_high:.2f}",
            "" if each.percent_of_peak is None else f"{each.percent_of_peak:.0f}",
        )
        cpu = "–" if each.cpu_ms is None else f"{each.cpu_ms:.2f}"
        memory = "–" if each.peak_memory_mb is None else f"{each.peak_memory_mb:.0f}"
        costs.add_row(*what, str(each.batch_size), cpu, f"{each.load_ms:.0f}", f"{each.first_ms:.0f}", memory)
    console.print(table)
    console.print(costs)
    if disturbed := disturbance(results):
        console.print(f"CPU: a ratio of processor times, as {disturbed}; ms/image, p90 and p99 are wall times")
    if any(each.ratio_to_first is None for each in results):
        console.print(
            "too noisy: the interval is wider than 10 % of its ratio, or rounds are too few for one; "
            "try more --rounds or a quieter machine"
        )
    if any(each.ratio_to_first is None and each.threads > 1 for each in results):
        console.print("several threads are compared by wall time alone: their processor time counts spinning, too")


def _ratio(result: Any) -> str:
    from .records import PROCESSOR

    if result.ratio_to_first is None:
        return "too noisy"
    return f"{result.ratio_to_first:.2f}" + (" CPU" if result.ratio_basis == PROCESSOR else "")


def show_placements(rows: Sequence[Any]) -> None:
    """Prints on which devices Core ML means to run how many operations, and their share of the estimated cost."""
    if not rows:
        return
    devices = list(dict.fromkeys(device for row in rows for device in row.operations))
    table = Table("Core ML's plan: operations, % of cost", "compute units", *map(_right, devices))
    for row in rows:
        cells = []
        for device in devices:
            percent = row.cost_percent.get(device)
            cells.append(f"{row.operations.get(device, 0)}" + ("" if percent is None else f", {percent:.0f} %"))
        table.add_row(row.model, row.compute_units, *cells)
    console.print(table)


def show_machine(machine: Any) -> None:
    """Prints what the machine is and reaches."""
    from .roofline import PRECISIONS

    peaks = ", ".join(f"{name} {peak:,.0f}" for name, peak in machine.peak_gflops.items())
    missing = [name for name in PRECISIONS if name not in machine.peak_gflops]
    lacks = f" (no instructions for {' and '.join(missing)}: not above fp32)" if missing else ""
    console.print(
        f"{machine.processor}, {machine.cores} cores, {machine.threads} thread(s); peak GFLOP/s: {peaks}{lacks}; reads "
        f"{machine.bandwidth_gb_per_s:.0f} GB/s; {', '.join(machine.instructions)}; frequency: {machine.frequency}"
    )


def show_layers(rows: Sequence[Any]) -> None:
    """Prints where one model's time goes."""
    table = Table(f"{rows[0].model}, {rows[0].runtime}, batch {rows[0].batch_size}", _right("ms/image"), _right("%"))
    for row in rows:
        table.add_row(row.kind, f"{row.ms:.3f}", f"{row.percent:.1f}")
    console.print(table)


def show_scaling(rows: Sequence[Any]) -> None:
    """Prints how time and memory grow."""
    from .records import PROCESSOR

    for row in rows:
        by = " by processor time, as other programs had the core" if row.basis == PROCESSOR else ""
        console.print(
            f"{row.model} in {row.runtime} over {row.over} {row.values[0]} to {row.values[-1]}: time of an image "
            f"{row.latency_ms[0]:.2f} to {row.latency_ms[-1]:.2f} ms{by}, exponent {row.exponent:.2f}; memory "
            f"{row.peak_memory_mb[0]:.0f} to {row.peak_memory_mb[-1]:.0f} MB, exponent {row.memory_exponent:.2f}"
        )


# --- browsers ---------------------------------------------------------------------------------------------------------

NAMED_CDN = "cdn"
MAX_MINUTES = 1440
MAX_RECORDS = 32


@dataclass(frozen=True, kw_only=True)
class _BrowserOptions:
    models: ModelNames = None
    """Names that timm knows, or .onnx files of `shvit export` with their certificates beside them; by default the
    checkpoint's model, or else shvit_s1 to shvit_s4."""
    peers: list[str] = field(default_factory=list)
    """More names, to compare with."""
    precision: list[Literal["fp32", "fp16", "int8"]] = field(default_factory=lambda: ["fp32"])
    """Of what is given by name."""
    checkpoint: Path | None = None
    """Weights of the named models, a file or a name of `shvit weights list`; random ones by default, which are as fast.
    Peers' are random."""
    pretrained: bool = False
    """Take each named model's published weights in place of a checkpoint."""
    img_size: int | None = None
    """Input height and width in pixels of what is given by name; by default those that the checkpoint was trained for,
    or each model's own."""
    images: Path | None = None
    """A folder of images; some of them, cut, go to the browser, and to everyone with the site. scikit-image's
    bundled ones by default."""
    threads: list[int] = field(default_factory=lambda: [1])
    """CPU threads of this machine's own rows."""
    rounds: int = 7
    """How often each case takes its turn, here and in the browser."""
    sustained: int = 30
    """Seconds that a browser runs one model without a pause."""
    ort_web: str | None = None
    """Where ONNX Runtime for browsers is: a folder, filled from npm where files are missing, by default one in the
    cache; or `cdn`, which the browser fetches it from. Hashes are checked in every case."""

    @property
    def _hosted(self) -> bool:
        return self.ort_web != NAMED_CDN

    def _check(self) -> None:
        from ..browser.phone_record import MAX_ROUNDS, MAX_SECONDS

        limits = {
            "--rounds": (self.rounds, 1, MAX_ROUNDS),
            "--sustained": (self.sustained, 2, MAX_SECONDS),
        }
        checked = [(option, *limit) for option, limit in limits.items()]
        for option, value, low, high in (*checked, *(("--threads", each, 1, 1024) for each in self.threads or [0])):
            if not low <= value <= high:
                raise InputError(f"{option} {value} is out of range; choose {low} to {high}")

    def _prepare(self, folder: Path, submit: str | None, progress: Any) -> tuple[list[Any], dict[str, Any]]:
        """The files, and everything that a browser fetches."""
        from ..browser.ort_web import runtime_files
        from ..browser.served import Pace, check_names, contents, few_images, prepare
        from .cases import Settings

        models, checkpoint = choose_models(self.models, self.checkpoint, self.pretrained)
        if not self.peers and all(map(_is_file, models)):
            refuse("all --models are files, which have their weights and size", checkpoint=self.checkpoint,
                   pretrained=self.pretrained, img_size=self.img_size)  # fmt: skip
        named = Settings(1, checkpoint, self.img_size, pretrained=self.pretrained)
        runtime = runtime_files(Path(self.ort_web) if self.ort_web else None, progress) if self._hosted else None
        tried = prepare(models, self.precision, named, self.images, folder, progress)
        plain = replace(named, checkpoint=None, pretrained=False)
        tried += prepare(self.peers, self.precision, plain, self.images, folder, progress)
        check_names(tried)
        pace = Pace(rounds=self.rounds, sustained_s=self.sustained)
        return tried, contents(tried, few_images(self.images), runtime, pace, submit)

    def _measure_here(self, tried: Sequence[Any], progress: Any) -> Any:
        """This machine's own measurements of the files."""
        from .measure import bench_files
        from .records import Measurements

        files = [(each.path, each.name, each.gmacs) for each in tried]
        machine, results = bench_files(files, self.threads, self.rounds, progress)
        show_results(results)
        return Measurements(machine, tuple(results))


@dataclass(frozen=True, kw_only=True)
class BenchPhone(_BrowserOptions):
    """Latency and numerics in a phone's browser, which opens a page; this machine's processor beside it."""

    lan: bool = False
    """Let other machines of the network open the page; this one alone by default."""
    host: str | None = None
    """The name or address by which phones know this machine; guessed by default."""
    tls: bool = False
    """HTTPS with a certificate of our own, which the browser warns of: without it a phone has neither threads nor
    WebGPU nor a camera for the page."""
    port: int = 0
    """To listen on; any that is free by default."""
    records: int = 1
    """Stop when so many have arrived."""
    minutes: float = 60.0
    """Stop after this time in any case."""
    output: Path = Path("phone")
    """A folder for the files, the records, bench.json, pictures, and report.html."""

    def _check(self) -> None:
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

    def run(self) -> dict[str, Any]:
        import segno  # noqa: F401  (where the extra is missing, that is said before anything long begins)

        from ..browser.phone import Door, open_door, receive_phones
        from ..browser.phone_record import add_record, describe_record, require_served, save_record
        from ..browser.served import policy
        from ..browser.server import RECORDS

        self._check()
        door = Door(self.lan, self.host, self.tls, self.port, 60 * self.minutes)
        opened = open_door(door)
        with _status("bench phone", lines=True) as progress:
            tried, served = self._prepare(self.output / "files", RECORDS, progress)
            measured = self._measure_here(tried, progress)
        write_report(measured, self.output, pictures=False)  # whoever comes
        files = {(*each.key, sha256(each.path)) for each in tried}

        def receive(record: Any) -> int:
            nonlocal measured
            require_served(record, files)
            more = add_record(measured, record)
            try:
                save_record(record, self.output)
                write_report(more, self.output, pictures=False)
            except InputError as error:
                raise OSError(str(error)) from error  # this machine's fault, not the phone's
            measured = more
            console.print(describe_record(record))
            return self.records - len(measured.devices)

        receive_phones(served, policy(self._hosted), receive, door, opened, console.print)
        if not measured.devices:
            raise CheckFailed(
                "no phone has sent a record; open the address while the command runs, with --lan from a phone",
                asdict(measured),
            )
        result = _report(measured, self.output)
        if failed := [check for check in measured.checks if check.error]:
            first, count = failed[0], "one case was" if len(failed) == 1 else f"{len(failed)} cases were"
            where = f"{first.model} {first.precision} in {first.runtime} on {first.device}"
            raise CheckFailed(f"{count} not timed; {where}: {first.error}", result)
        return result


@dataclass(frozen=True, kw_only=True)
class BenchImport:
    """Records that the page saved as JSON, as one report."""

    records: tyro.conf.Positional[tuple[Path, ...]]
    """Files that the page saved."""
    output: Path
    """A folder for bench.json, pictures, and report.html."""
    beside: Path | None = None
    """A bench.json of `shvit bench`, whose results they are put beside."""

    def run(self) -> dict[str, Any]:
        from ..browser.phone_record import add_record, describe_record, read_record_file
        from .records import Measurements, read_measurements

        check_report_folder(self.output)
        if not self.records:
            raise InputError("nothing to import; give at least one file that the page saved")
        measured = Measurements(None, ()) if self.beside is None else read_measurements(self.beside)
        for record in [read_record_file(path) for path in self.records]:
            measured = add_record(measured, record)
            console.print(describe_record(record))
        return _report(measured, self.output)


def _report(measured: Any, output: Path) -> dict[str, Any]:
    """Prints the results and writes all of the report."""
    show_results(measured.results)
    show_devices(measured)
    console.print("wrote " + ", ".join(map(str, write_report(measured, output))))
    return asdict(measured)


def check_report_folder(output: Path | None) -> None:
    """For the beginning; raises InputError where files that are no report's would be overwritten."""
    from ..guards import check_own
    from .plots import FIGURES

    check_output_folder(output)
    check_own(output, "bench.json", b'"machine"', ("report.html", *FIGURES))


def write_report(measured: Any, output: Path, pictures: bool = True) -> list[Path]:
    """bench.json, report.html and, if wanted, pictures."""
    from ..guards import one_line
    from .explorer import write_explorer
    from .plots import draw
    from .records import write_measurements

    write_measurements(measured, output / "bench.json")
    write_explorer(output / "report.html", measured)
    with one_line(output, "the pictures cannot be drawn"):  # of numbers from a third party's bench.json
        return [output / "bench.json", output / "report.html", *(draw(measured, output) if pictures else ())]


def show_devices(measured: Any) -> None:
    """Prints what browsers answered, and how they held their speed."""
    table = Table("device", "model", "runtime", _right("images"), _right("dB"), _right("same top-1 %"), "outcome")
    for each in measured.checks:
        figures = ("–", "–") if each.snr_db is None else (f"{each.snr_db:.0f}", f"{each.top1_agreement:.0f}")
        outcome = each.error or (f"timed, until: {each.incomplete}" if each.incomplete else "answers as expected")
        runtime = f"{each.runtime} {each.precision}"
        table.add_row(each.device, each.model, runtime, str(each.images), *figures, outcome)
    console.print(table)
    for each in measured.sustained:
        console.print(f"{each.device}, {each.model} {each.precision} in {each.runtime}: {len(each.latency_ms)} s "
                      f"sustained, {each.slowdown:.2f}× the initial latency at the end")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Site(_BrowserOptions):
    """A static site for any web host: the page that measures, the explorer of measurements, the table of models."""

    output: Path
    """A folder for it."""
    measured: Path | None = None
    """A bench.json whose results the explorer shows; those of this machine and the site's files by default."""

    def _check(self) -> None:
        from ..browser.site import check_site_folder

        super()._check()
        check_output_folder(self.output)
        check_site_folder(self.output)

    def run(self) -> dict[str, Any]:
        from ..browser.site import write_site
        from ..guards import check_apart
        from .records import read_measurements

        self._check()
        check_apart(self.output, images=self.images, checkpoint=self.checkpoint, measured=self.measured)
        given = None if self.measured is None else read_measurements(self.measured)
        with scratch_folder() as folder, _status("site", lines=True) as progress:
            tried, served = self._prepare(folder, None, progress)
            written = write_site(self.output, served, tried, given or self._measure_here(tried, progress), self._hosted)
        megabytes = sum(path.stat().st_size for path in written) / 1e6
        console.print(f"wrote {len(written)} files, {megabytes:.0f} MB, to {self.output}; any web host can carry them, "
                      "over HTTPS")  # fmt: skip
        return {"site": str(self.output), "files": [str(path.relative_to(self.output)) for path in written]}


BENCH = {"phone": BenchPhone, "import": BenchImport}


def parse(options: list[str], prog: str) -> Any:
    """`shvit bench phone` and `shvit bench import` are commands of their own; other options are of `shvit bench`."""
    command = BENCH.get(options[0]) if options else None
    if command is None:
        return tyro.cli(Bench, prog=prog, args=options)
    return tyro.cli(command, prog=f"{prog} {options[0]}", args=options[1:])
