"""Measurements as the terminal shows them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.markup import escape
from rich.table import Table

from shvit import terminal
from shvit.errors import printable
from shvit.terminal import right_aligned

from .records import (
    PROCESSOR,
    BenchResult,
    LayerTime,
    LeftOut,
    Machine,
    Measurements,
    Partition,
    Placement,
    Scaling,
    describe_preemption,
)

console = terminal.console()


@contextmanager
def progress_line(command: str, lines: bool = False) -> Iterator[Callable[[str], None]]:
    """Show the current step on a terminal; elsewhere nothing, or plain lines if `lines`."""
    if not console.is_terminal:
        yield console.print if lines else lambda _: None
        return
    with console.status(command) as status:
        yield lambda line: status.update(escape(printable(line)))


def show_results(results: Sequence[BenchResult]) -> None:
    """Print latencies, and what noise left undecided."""
    phones = any(each.device for each in results)
    precisions = _names_precisions(results) or phones
    names = ("model", "runtime", "device") if phones else ("model", "runtime")
    latency = Table(*names, *right_aligned("px", "batch", "ms/image", "p90", "p99", "ratio", "95 %", "% of peak"))
    costs = Table(*names, *right_aligned("batch", "CPU ms/image", "load ms", "first ms", "MB"))
    for each in results:
        case = [each.model, each.form if precisions else each.runtime]
        case += [each.device or "this machine"] if phones else []
        latency.add_row(*case, *_latency_cells(each))
        costs.add_row(*case, *_cost_cells(each))
    console.print(latency)
    console.print(costs)
    if preemption := describe_preemption(results):
        console.print(f"CPU: a ratio of processor times, as {preemption}; ms/image, p90 and p99 are wall times")
    if any(each.ratio_to_first is None for each in results):
        console.print("too noisy: the interval is wider than 10 % of its ratio, or rounds are too few for one; try "
                      "more --rounds or a quieter machine")  # fmt: skip
    if any(each.ratio_to_first is None and each.threads > 1 for each in results):
        console.print("several threads are compared by wall time alone: their processor time counts spinning, too")


def _names_precisions(results: Sequence[BenchResult]) -> bool:
    """Return whether the runtime's name does not tell the precision of some result."""
    runtimes = {each.runtime: each.precision for each in results}
    return any(runtimes[each.runtime] != each.precision for each in results) or any(
        name.endswith("bf16") and precision == "fp32" for name, precision in runtimes.items()
    )


def _latency_cells(result: BenchResult) -> list[str]:
    times = [f"{value:.2f}" for value in (result.latency_ms_p50, result.latency_ms_p90, result.latency_ms_p99)]
    clock = " CPU" if result.ratio_basis == PROCESSOR else ""
    ratio = "too noisy" if result.ratio_to_first is None else f"{result.ratio_to_first:.2f}{clock}"
    interval = f"{result.ratio_low:.2f}–{result.ratio_high:.2f}"
    peak = "" if result.percent_of_peak is None else f"{result.percent_of_peak:.0f}"
    return [str(result.img_size), str(result.batch_size), *times, ratio, interval, peak]


def _cost_cells(result: BenchResult) -> list[str]:
    cpu = "–" if result.cpu_ms is None else f"{result.cpu_ms:.2f}"
    memory = "–" if result.peak_memory_mb is None else f"{result.peak_memory_mb:.0f}"
    return [str(result.batch_size), cpu, f"{result.load_ms:.0f}", f"{result.first_ms:.0f}", memory]


def show_placements(placements: Sequence[Placement]) -> None:
    """Print Core ML's compute plans: operations on each device, and their share of the estimated cost."""
    if not placements:
        return
    devices = list(dict.fromkeys(device for row in placements for device in row.operations))
    table = Table("Core ML's plan: operations, % of cost", "compute units", *right_aligned(*devices))
    for row in placements:
        cells = []
        for device in devices:
            percent = row.cost_percent.get(device)
            cells.append(f"{row.operations.get(device, 0)}" + ("" if percent is None else f", {percent:.0f} %"))
        table.add_row(row.model, row.compute_units, *cells)
    console.print(table)


def show_partitions(partitions: Sequence[Partition]) -> None:
    """Print in how many parts delegates compute each model, and which operators they leave."""
    if not partitions:
        return
    table = Table("delegation", "runtime", *right_aligned("partitions"), "operators outside")
    for row in partitions:
        outside = ", ".join(f"{name} {count}" for name, count in row.outside.items())
        table.add_row(row.model, row.runtime, str(row.partitions), outside or "none")
    console.print(table)


def show_machine(machine: Machine) -> None:
    """Print the machine and its peaks."""
    from .roofline import PRECISIONS

    peaks = ", ".join(f"{name} {peak:,.0f}" for name, peak in machine.peak_gflops.items())
    missing = [name for name in PRECISIONS if name not in machine.peak_gflops]
    note = f" (no instructions for {' and '.join(missing)}: not above fp32)" if missing else ""
    console.print(
        f"{machine.processor}, {machine.cores} cores, {machine.threads} thread(s); peak GFLOP/s: {peaks}{note}; reads "
        f"{machine.bandwidth_gb_per_s:.0f} GB/s; {', '.join(machine.instructions)}; frequency: {machine.frequency}"
    )


def show_left_out(rows: Sequence[LeftOut]) -> None:
    """Print which models were not timed in which runtimes, and why."""
    for each in rows:
        console.print(f"{each.model} was left out of {each.runtime}: {each.reason}", markup=False)


def show_layers(rows: Sequence[LayerTime]) -> None:
    """Print one model's time by kind of layer."""
    table = Table(f"{rows[0].model}, {rows[0].runtime}, batch {rows[0].batch_size}", *right_aligned("ms/image", "%"))
    for row in rows:
        table.add_row(row.kind, f"{row.ms:.3f}", f"{row.percent:.1f}")
    console.print(table)


def show_scaling(rows: Sequence[Scaling]) -> None:
    """Print how time and memory grow."""
    for row in rows:
        by = " by processor time, as other programs had the core" if row.basis == PROCESSOR else ""
        console.print(
            f"{row.model} in {row.runtime} over {row.over} {row.values[0]} to {row.values[-1]}: time of an image "
            f"{row.latency_ms[0]:.2f} to {row.latency_ms[-1]:.2f} ms{by}, exponent {row.exponent:.2f}; memory "
            f"{row.peak_memory_mb[0]:.0f} to {row.peak_memory_mb[-1]:.0f} MB, exponent {row.memory_exponent:.2f}"
        )


def show_devices(measured: Measurements) -> None:
    """Print how browsers' outputs compare with the expected ones, and how they sustained their speed."""
    table = Table("device", "model", "runtime", *right_aligned("images", "dB", "same top-1 %"), "outcome")
    for each in measured.checks:
        figures = ("–", "–") if each.snr_db is None else (f"{each.snr_db:.0f}", f"{each.top1_agreement:.0f}")
        outcome = each.error or (f"timed, until: {each.incomplete}" if each.incomplete else "outputs match")
        runtime = f"{each.runtime} {each.precision}"
        table.add_row(each.device, each.model, runtime, str(each.images), *figures, outcome)
    console.print(table)
    for run in measured.sustained:
        console.print(f"{run.device}, {run.model} {run.precision} in {run.runtime}: {len(run.latency_ms)} s "
                      f"sustained, {run.slowdown:.2f}× the initial latency at the end")  # fmt: skip
