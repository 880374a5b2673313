"""Records of measurements: frozen, with units in their names, written as JSON and validated when read back.

Times are per image: a batch's time over its size.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from shvit.documents import load_json, parse_model, to_json
from shvit.files import atomic_write
from shvit.img_size import ImgSize
from shvit.weights.run_info import is_name

WALL, PROCESSOR = "wall time", "processor time"
PREEMPTED_PERCENT = 5.0  # of a case's wall time; while other programs take more, wall time measures them too
MAX_NUMBER = 1e12  # of anything that is measured here, whatever its unit


def _check_text(text: str) -> str:
    if text and not is_name(text):
        raise ValueError("it holds control characters, or is longer than a name")
    return text


Text = Annotated[str, AfterValidator(_check_text)]
"""Text from a third-party file that is safe to print."""
Number = Annotated[float, Field(ge=0, le=MAX_NUMBER)]
Positive = Annotated[float, Field(gt=0, le=MAX_NUMBER)]
Signed = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Count = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Size = Annotated[int, Field(ge=1, le=MAX_NUMBER)]


@dataclass(frozen=True)
class Machine:
    """The machine that ran the benchmark, and the peak that loops of pure arithmetic or reading reach on it."""

    processor: Text
    cores: Count
    instructions: tuple[Text, ...]
    """Instruction sets for arithmetic, such as avx512_bf16."""
    frequency: Text
    """The operating system's frequency policy, or that a hypervisor hides it."""
    threads: Count
    """Threads that the peaks below were measured with."""
    peak_gflops: dict[Text, Number]
    """Peak by precision (fp32, bf16, int8); a multiply-add is two operations. A precision that is slower than float32,
    because the processor has no instructions for it, is left out."""
    bandwidth_gb_per_s: Number
    """Bandwidth of reading memory that no cache holds."""
    versions: dict[Text, Text]
    environment: dict[Text, Text] = field(default_factory=dict)
    """The user's variables that change how threads wait or which instructions are used; the runtimes ran with them."""


@dataclass(frozen=True)
class BenchResult:
    """Latency of one case over all rounds."""

    model: Text
    """timm's name, or a file's."""
    runtime: Text
    precision: Text
    """Precision of the arithmetic: fp32, bf16, fp16 or int8; fp32 where bf16 was requested and the processor has no
    instructions for it."""
    img_size: ImgSize
    batch_size: Size
    threads: Count
    rounds: Count
    calls: Count
    latency_ms_p50: Number
    latency_ms_p90: Number
    latency_ms_p99: Number
    cpu_ms: Number | None
    """Processor time, all threads together, the mean of a round's calls; None in browsers, which do not report it."""
    ratio_to_first: Number | None
    """Median over rounds of this case's time over that of the first case of the same device and batch size, by
    `ratio_basis`; None if too noisy."""
    ratio_low: Number
    ratio_high: Number
    """Ends of the ratio's 95 % confidence interval."""
    load_ms: Number
    """Loading the file, or the model's weights, until it is ready."""
    first_ms: Number
    """The very first call, of a whole batch."""
    peak_memory_mb: Number | None
    """Peak memory of the process, with everything that the runtime loads; None in browsers."""
    gmacs: Number | None
    """Multiply-adds for one image, in units of 10⁹; None for a file, whose model is not at hand."""
    percent_of_peak: Number | None
    """Percent of the machine's measured peak in this precision, by processor time where other programs took more of the
    core than `PREEMPTED_PERCENT`; None where the peak was not measured."""
    top1: Number | None
    """Published ImageNet top-1 in percent, at `img_size`; None where there is none."""
    device: Text = ""
    """The name of one of `Measurements.devices`; empty for `Measurements.machine`."""
    ratio_basis: Text = WALL
    """Clock of the ratio and its interval: `WALL`, or `PROCESSOR` where other programs took more of either case's
    core than `PREEMPTED_PERCENT` and both cases are one thread of the CPU."""
    preempted_percent: Number | None = None
    """Percent of the calls' wall time during which the processor worked for other programs; None for a case of several
    threads, whose processor time also counts those that spin while they wait, and for one that is not the CPU's."""

    @property
    def form(self) -> str:
        """The runtime, with the precision where the runtime's name does not end with it."""
        return self.runtime if self.runtime.endswith(self.precision) else f"{self.runtime} {self.precision}"

    @property
    def preempted(self) -> bool:
        return self.preempted_percent is not None and self.preempted_percent > PREEMPTED_PERCENT


def describe_preemption(results: Sequence[BenchResult]) -> str:
    """Return a clause that says how much other programs disturbed the results; empty if they did not."""
    worst = max((each.preempted_percent or 0.0 for each in results if each.preempted), default=None)
    return "" if worst is None else f"other programs had the core for up to {worst:.0f} % of the time"


@dataclass(frozen=True)
class Device:
    """A phone, or any other machine with a browser, as the browser describes it."""

    name: Text
    """The name that its user gave it."""
    browser: Text
    """The browser's user agent."""
    cores: Count
    """Cores that the browser reports."""
    memory_gb: Number | None
    """Memory that the browser reports: rounded, capped, and often missing."""
    gpu: Text
    """Vendor and architecture of the WebGPU adapter; empty where there is none."""
    missing: dict[Text, Text]
    """Backends that were not measured, and why."""
    runtime: Text
    """onnxruntime-web and its version."""


@dataclass(frozen=True)
class Check:
    """The comparison of a file's outputs on a device with the expected ones, made before anything is timed."""

    device: Text
    model: Text
    runtime: Text
    precision: Text
    images: Count
    """Images compared; 0 if the file did not run."""
    max_rel_error: Number | None
    """The certificate's figure, compared with the same file in ONNX Runtime on the machine that exported it."""
    snr_db: Signed | None
    top1_agreement: Number | None
    """Percent."""
    error: Text
    """Why the file was not timed; empty if it was."""
    incomplete: Text
    """Reason why its timing ended early; empty if it did not."""


@dataclass(frozen=True)
class Sustained:
    """One model, run without a pause."""

    device: Text
    model: Text
    runtime: Text
    precision: Text
    latency_ms: Annotated[tuple[Number, ...], Field(min_length=1)]
    """The median of each second."""
    slowdown: Number
    """Median of the last fifth of the seconds over that of the first fifth: above 1 the device throttles."""


@dataclass(frozen=True)
class LayerTime:
    """Time that one kind of layer takes, from the runtime's own profiler."""

    model: Text
    runtime: Text
    batch_size: Count
    kind: Text
    """1×1 convolution, k×k convolution, depthwise convolution, attention, …"""
    ms: Number
    """Milliseconds per image."""
    percent: Number
    """Percent of the whole model's time."""


@dataclass(frozen=True)
class Placement:
    """Core ML's compute plan for a package, made before anything runs: how many operations on which device."""

    model: Text
    compute_units: Text
    """The units that Core ML may choose from: all, cpu, cpu-gpu or cpu-ne."""
    operations: dict[Text, Count]
    """Number of operations by preferred device: cpu, gpu, neural engine, or unknown. Constants are left out."""
    cost_percent: dict[Text, Number]
    """Percent of the estimated cost of all operations, by device; empty where Core ML estimates none."""

    @classmethod
    def of(
        cls, model: str, compute_units: str, operations: Iterable[tuple[str, float | None]], devices: Iterable[str]
    ) -> "Placement":
        """Return the sums over pairs of device and estimated cost, costs scaled to 100 % of their sum.

        Args:
            devices: names that are listed even if nothing runs there.
        """
        counts = Counter(dict.fromkeys(devices, 0))
        costs = dict.fromkeys(counts, 0.0)
        for device, cost in operations:
            counts[device] += 1
            costs[device] = costs.get(device, 0.0) + (cost or 0.0)
        total = sum(costs.values())
        percent = {device: 100 * cost / total for device, cost in costs.items()} if total else {}
        return cls(model, compute_units, dict(counts), percent)


@dataclass(frozen=True)
class Partition:
    """How a runtime divides a model between a delegate, such as XNNPACK, and its own operators."""

    model: Text
    runtime: Text
    partitions: Count
    """Parts of the graph that the delegate computes, each in one call."""
    outside: dict[Text, Count]
    """Operators that the delegate leaves to the runtime, with their numbers."""


@dataclass(frozen=True)
class Scaling:
    """Growth of time and memory over a sweep of one quantity, fitted as a power."""

    model: Text
    runtime: Text
    over: Text
    """The quantity: pixels or batch_size."""
    values: Annotated[tuple[Size, ...], Field(min_length=1)]
    """Values of the quantity; pixels are height times width."""
    latency_ms: tuple[Positive, ...]
    """Milliseconds per image, for each value."""
    peak_memory_mb: tuple[Number, ...]
    exponent: Signed
    """Exponent of the time per image: 1 is proportional to pixels, 0 does not change with the batch."""
    memory_exponent: Signed
    basis: Text = WALL
    """The clock of `latency_ms`: `WALL`, or `PROCESSOR` as with `BenchResult.ratio_basis`."""

    @model_validator(mode="after")
    def _check_sweep(self) -> "Scaling":
        if not len(self.values) == len(self.latency_ms) == len(self.peak_memory_mb):
            raise ValueError("each value needs one latency and one memory")
        if max(self.peak_memory_mb) <= 0:
            raise ValueError("all memories are 0")
        return self


@dataclass(frozen=True)
class LeftOut:
    """A model that was not timed in a runtime, as its format cannot hold the model."""

    model: Text
    runtime: Text
    reason: Text


@dataclass(frozen=True)
class Measurements:
    """Everything that one run of `shvit bench` measured."""

    machine: Machine | None
    """None where everything was measured in browsers."""
    results: tuple[BenchResult, ...]
    layers: tuple[LayerTime, ...] = ()
    scaling: tuple[Scaling, ...] = ()
    devices: tuple[Device, ...] = ()
    checks: tuple[Check, ...] = ()
    sustained: tuple[Sustained, ...] = ()
    placements: tuple[Placement, ...] = ()
    partitions: tuple[Partition, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @model_validator(mode="after")
    def _check_devices(self) -> "Measurements":
        devices = {each.name for each in self.devices}
        rows: tuple[BenchResult | Check | Sustained, ...] = (*self.results, *self.checks, *self.sustained)
        for row in rows:
            here = isinstance(row, BenchResult) and row.device == "" and self.machine
            if not here and row.device not in devices:
                raise ValueError(f"device {row.device!r} of the {type(row).__name__} of {row.model} is not described")
        return self


for _kind in (Machine, BenchResult, Device, Check, Sustained, LayerTime, Placement, Scaling, LeftOut, Measurements):
    setattr(_kind, "__pydantic_config__", {"extra": "forbid"})  # noqa: B010  (how pydantic reads them)


def write_measurements(measurements: Measurements, path: Path) -> None:
    """Write measurements as JSON, atomically."""
    with atomic_write(path) as partial:
        partial.write_text(to_json(asdict(measurements), indent=2) + "\n", encoding="utf-8")


def read_measurements(path: Path) -> Measurements:
    """Return the content of a file that `write_measurements` wrote.

    Raises:
        InputError: no such file, or the file holds something else.
    """
    return parse_measurements(load_json(path), str(path))


def parse_measurements(content: object, name: str = "the measurements") -> Measurements:
    """Return plain values, as `asdict` and JSON give them, as measurements.

    Args:
        name: what messages call them.

    Raises:
        InputError: a value is not of its field's type, or out of the range of what is measured.
    """
    return parse_model(Measurements, content, f"{name}: holds no measurements of `shvit bench`")
