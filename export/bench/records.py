"""What measurements say: frozen records with units in their names, written as JSON and read back.

Times are of one image: a batch's time over its size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shvit.documents import load_json, parse_model, to_json
from shvit.errors import InputError
from shvit.files import atomic_write
from shvit.weights.run_info import is_name

WALL, PROCESSOR = "wall time", "processor time"
PREEMPTED_PERCENT = 5.0
"""Of a case's wall time; while more than that goes to other programs, wall time measures them too."""


@dataclass(frozen=True)
class Machine:
    """Where it was measured, and what a loop of nothing but arithmetic or reading reaches there."""

    processor: str
    cores: int
    instructions: tuple[str, ...]
    """Instruction sets that arithmetic can make use of, such as avx512_bf16."""
    frequency: str
    """The operating system's policy, or that a hypervisor hides it."""
    threads: int
    """That the peaks below were measured with."""
    peak_gflops: dict[str, float]
    """Two operations for each multiply-add, by precision: fp32, bf16, int8. One that is slower than float32, as the
    processor has no instructions for it, is left out."""
    bandwidth_gb_per_s: float
    """Reading memory that no cache holds."""
    versions: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)
    """The user's variables that change how threads wait or which instructions are used; the runtimes ran with them."""


@dataclass(frozen=True)
class BenchResult:
    """Latency of one case over all rounds."""

    model: str
    """timm's name, or a file's."""
    runtime: str
    precision: str
    """Of the arithmetic: fp32, bf16, fp16 or int8. What was asked for as bf16 is fp32 where the runtime found that the
    processor has no instructions for it."""
    img_size: int
    """Height and width in pixels."""
    batch_size: int
    threads: int
    rounds: int
    calls: int
    latency_ms_p50: float
    latency_ms_p90: float
    latency_ms_p99: float
    cpu_ms: float | None
    """Processor time, all threads together, the mean of a round's calls; None where a browser ran it, which does not
    tell."""
    ratio_to_first: float | None
    """Median over rounds of this case's time over that of the first case of the same device and batch size, by
    `ratio_basis`; None if too noisy."""
    ratio_low: float
    ratio_high: float
    """Ends of the ratio's 95 % confidence interval, from the same rounds' ratios by the same `ratio_basis`."""
    load_ms: float
    """From the file, or the model's weights, to ready."""
    first_ms: float
    """The first call of all, of a whole batch."""
    peak_memory_mb: float | None
    """Of the process, with everything that the runtime loads; None where a browser ran it."""
    gmacs: float | None
    """Multiply-adds for one image, in units of 10⁹; None for a file, whose model is not at hand."""
    percent_of_peak: float | None
    """Of the machine's measured peak in this precision, by processor time where other programs took more of the core
    than `PREEMPTED_PERCENT`; None where that was not measured."""
    top1: float | None
    """Published ImageNet top-1 in percent, at `img_size`; None where there is none."""
    device: str = ""
    """The name of one of `Measurements.devices`; empty where it ran on `Measurements.machine`."""
    ratio_basis: str = WALL
    """What the ratio and its interval compare: `WALL`, or `PROCESSOR` where other programs took more of either case's
    core than `PREEMPTED_PERCENT` and both cases are one thread of the CPU."""
    preempted_percent: float | None = None
    """Of the calls' wall time, during which the processor worked for other programs; None for a case of several
    threads, whose processor time also counts those that spin while they wait, and for one that is not the CPU's."""

    @property
    def preempted(self) -> bool:
        return self.preempted_percent is not None and self.preempted_percent > PREEMPTED_PERCENT


def disturbance(results: Sequence[BenchResult]) -> str:
    """That other programs took the core while these were measured, for people; empty if they did not."""
    worst = max((each.preempted_percent or 0.0 for each in results if each.preempted), default=None)
    return "" if worst is None else f"other programs had the core for up to {worst:.0f} % of the time"


@dataclass(frozen=True)
class Device:
    """A phone, or whatever else a browser ran on, as the browser describes it."""

    name: str
    """That its user gave it."""
    browser: str
    """Its user agent."""
    cores: int
    """That the browser admits to."""
    memory_gb: float | None
    """That the browser admits to: rounded, capped, and often not told at all."""
    gpu: str
    """Vendor and architecture of the WebGPU adapter; empty where there is none."""
    missing: dict[str, str]
    """Backends that were not measured, and why."""
    runtime: str
    """onnxruntime-web and its version."""


@dataclass(frozen=True)
class Check:
    """Whether a file gave its answers on a device: compared before anything was timed."""

    device: str
    model: str
    runtime: str
    precision: str
    images: int
    """Images; 0 where it did not run."""
    max_rel_error: float | None
    """As in a certificate, against the same file in ONNX Runtime on the machine that exported it."""
    snr_db: float | None
    top1_agreement: float | None
    """Percent."""
    error: str
    """Why it was not timed; empty if it was."""
    incomplete: str
    """What ended its timing early; empty if nothing did."""


@dataclass(frozen=True)
class Sustained:
    """One model, run without a pause."""

    device: str
    model: str
    runtime: str
    precision: str
    latency_ms: tuple[float, ...]
    """The median of each second."""
    slowdown: float
    """Median of the last fifth of the seconds over that of the first fifth: above 1 the device throttles."""


@dataclass(frozen=True)
class LayerTime:
    """Time that one kind of layer takes, from the runtime's own profiler."""

    model: str
    runtime: str
    batch_size: int
    kind: str
    """1×1 convolution, k×k convolution, depthwise convolution, attention, …"""
    ms: float
    """Of one image."""
    percent: float
    """Of the whole model's time."""


@dataclass(frozen=True)
class Placement:
    """Where Core ML means to run a package's operations: its compute plan, made before anything runs."""

    model: str
    compute_units: str
    """That it may choose from: all, cpu, cpu-gpu or cpu-ne."""
    operations: dict[str, int]
    """How many it prefers to run on each device: cpu, gpu, neural engine, or unknown. Constants are left out."""
    cost_percent: dict[str, float]
    """Of the estimated cost of all of them, by device; empty where Core ML estimates none."""


@dataclass(frozen=True)
class Scaling:
    """How time and memory grow, fitted as a power over a sweep of one quantity."""

    model: str
    runtime: str
    over: str
    """pixels or batch_size."""
    values: tuple[int, ...]
    """Of the quantity; for pixels height times width."""
    latency_ms: tuple[float, ...]
    """Of one image."""
    peak_memory_mb: tuple[float, ...]
    exponent: float
    """Of the time of one image: 1 is proportional to pixels, 0 does not change with the batch."""
    memory_exponent: float
    basis: str = WALL
    """What `latency_ms` are: `WALL`, or `PROCESSOR` as with `BenchResult.ratio_basis`."""


@dataclass(frozen=True)
class Measurements:
    """Everything that one run of `shvit bench` found out."""

    machine: Machine | None
    """None where everything was measured in browsers."""
    results: tuple[BenchResult, ...]
    layers: tuple[LayerTime, ...] = ()
    scaling: tuple[Scaling, ...] = ()
    devices: tuple[Device, ...] = ()
    checks: tuple[Check, ...] = ()
    sustained: tuple[Sustained, ...] = ()
    placements: tuple[Placement, ...] = ()


for _kind in (Machine, BenchResult, Device, Check, Sustained, LayerTime, Placement, Scaling, Measurements):
    setattr(_kind, "__pydantic_config__", {"extra": "forbid"})  # noqa: B010  (of how they are read from a file)


def write_measurements(measurements: Measurements, path: Path) -> None:
    """Writes them as JSON, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text(to_json(asdict(measurements), indent=2) + "\n", encoding="utf-8")


def read_measurements(path: Path) -> Measurements:
    """What `write_measurements` wrote.

    Raises:
        InputError: no such file, or something else is in it.
    """
    return measurements_from(load_json(path), str(path))


def measurements_from(content: Any, name: str = "the measurements") -> Measurements:
    """From what `asdict` and JSON made of them.

    Args:
        name: what messages call them.

    Raises:
        InputError: a value is not of its field's type, or none that is measured.
    """
    where = f"{name}: holds no measurements of `shvit bench`"
    measurements = parse_model(Measurements, content, where)
    if problem := next((each for row in _rows(measurements) if (each := _problem(row, measurements))), None):
        raise InputError(f"{where}: {problem}")
    return measurements


MAX_NUMBER = 1e12  # of anything that is measured here, whatever its unit
ANY_SIGN = ("exponent", "memory_exponent", "snr_db")


def _rows(measurements: Measurements) -> Iterator[Any]:
    for each in fields(measurements):
        value = getattr(measurements, each.name)
        yield from value if isinstance(value, tuple) else [] if value is None else [value]


def _problem(row: Any, measurements: Measurements) -> str | None:
    """What no measurement has: names that steer a terminal, numbers out of range, lists that do not belong together."""
    kind = type(row).__name__
    for name in (each.name for each in fields(row)):
        for value in _leaves(getattr(row, name)):
            if isinstance(value, str) and value and not is_name(value):
                return f"{kind}.{name} {value[:60]!r} holds control characters, or is longer than a name"
            if isinstance(value, int | float):
                lowest = -MAX_NUMBER if name in ANY_SIGN else 0
                if not lowest <= value <= MAX_NUMBER:  # NaN is in no range
                    return f"{kind}.{name} is {value:.3g}, out of the range of what is measured"
    if isinstance(row, Scaling):
        lengths = {len(row.values), len(row.latency_ms), len(row.peak_memory_mb)}
        if len(lengths) > 1 or not row.values:
            return f"{kind} of {row.model} does not have a latency and a memory for each of at least one value"
        if min((*row.values, *row.latency_ms, max(row.peak_memory_mb))) <= 0:
            return f"{kind} of {row.model} has values, latencies or memories of 0"
    if isinstance(row, Sustained) and not row.latency_ms:
        return f"{kind} of {row.model} holds no latencies"
    if isinstance(row, BenchResult) and min(row.img_size, row.batch_size) < 1:
        return f"{kind} of {row.model} is of {row.img_size} px and batches of {row.batch_size}"
    device = getattr(row, "device", None)
    if device is not None and device not in {each.name for each in measurements.devices}:
        if device or not isinstance(row, BenchResult):
            return f"{kind} of {row.model} is of the device {device!r}, which is not described"
        if measurements.machine is None:
            return f"{kind} of {row.model} names no device, and no machine is described"
    return None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.keys()
        value = tuple(value.values())
    yield from value if isinstance(value, tuple) else (value,)
