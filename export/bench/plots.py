"""Plots of measurements, as PNG files.

The first eight colors are Okabe and Ito's, which color-blind readers can tell apart.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice, pairwise
from math import log
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from shvit.files import atomic_write
from shvit.img_size import ImgSize

from .records import BenchResult, LayerTime, Measurements, Scaling, describe_preemption

INK, MUTED, FAINT = "#1c2733", "#6b7785", "#d7dde3"
OURS = "#c2410c"
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#5b6875", "#000000", "#b3b3b3",
           "#8c510a", "#7fcdbb")  # fmt: skip
MARKERS = "osD^vP*X"
MAX_PANELS = 12
PLACES = (
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (6, 8, "left", "bottom"),
    (6, -8, "left", "top"),
    (-6, 8, "right", "bottom"),
    (-6, -8, "right", "top"),
)
"""Places of a name beside its point: offset to the right and up, and alignment there."""
NOISY = "too noisy, or too few rounds, to compare"
MAX_NAME = 48  # characters of a name in a plot
MAX_CASES = 60  # bars in one panel of bench.png; further cases are in bench.json


def draw_plots(measurements: Measurements, folder: Path) -> list[Path]:
    """Write those of pareto, bench, batch, resolution and layers.png that have data, and return their paths."""
    written = []
    for name, make in FIGURES.items():
        figure = make(measurements)
        if figure is not None:
            with atomic_write(folder / name) as partial:
                figure.savefig(partial, dpi=144, format="png")
            written.append(folder / name)
    return written


def front(results: Sequence[BenchResult]) -> list[BenchResult]:
    """Return the Pareto front, fastest first: nothing is as fast and more accurate, or as accurate and faster."""
    best: list[BenchResult] = []
    rated = [(result.latency_ms_p50, -result.top1, result) for result in results if result.top1 is not None]
    for _, _, result in sorted(rated, key=lambda each: each[:2]):
        if not best or (result.top1 or 0) > (best[-1].top1 or 0):
            best.append(result)
    return best


def best_forms(results: Sequence[BenchResult]) -> list[BenchResult]:
    """Return the result of the fastest runtime and precision of each model at each size and batch size."""
    forms: dict[tuple[str, ImgSize, int], list[BenchResult]] = {}
    for result in results:
        forms.setdefault((result.model, result.img_size, result.batch_size), []).append(result)
    return [min(each, key=lambda form: form.latency_ms_p50) for each in forms.values()]


def panels(results: Sequence[BenchResult]) -> dict[tuple[str, int], list[BenchResult]]:
    """Return the results of each panel, by device and batch size; only the first `MAX_PANELS`."""
    groups: dict[tuple[str, int], list[BenchResult]] = {}
    for result in results:
        groups.setdefault((result.device, result.batch_size), []).append(result)
    return dict(islice(groups.items(), MAX_PANELS))


def draw_pareto(measurements: Measurements) -> Figure | None:
    """Return published accuracy against latency, a panel for each device and batch size."""
    rated = [result for result in measurements.results if result.top1 is not None and result.latency_ms_p50 > 0]
    if not rated:
        return None
    groups = panels(rated)
    markers = dict(zip(_unique(result.form for result in rated), cycle(MARKERS), strict=False))
    figure, axes = _panels(1, len(groups), 7.4, 6.2)
    for axis, ((device, size), shown) in zip(axes, groups.items(), strict=True):
        best = best_forms(shown)
        axis.set_xscale("log")
        line = front(best)
        axis.step(
            [result.latency_ms_p50 for result in line],
            [result.top1 or 0 for result in line],
            where="post", color=INK, linewidth=1.2, alpha=0.55, gid="front", zorder=1,
        )  # fmt: skip
        for result in shown:
            _point(axis, result, markers[result.form], result in best)
        for result in best:
            forms = [each.latency_ms_p50 for each in shown if _model(each) == _model(result)]
            look: dict[str, Any] = {"color": _color(result), "alpha": 0.25, "linewidth": 1, "zorder": 0}
            axis.hlines(result.top1 or 0, min(forms), max(forms), **look)
        axis.margins(0.09, 0.07)
        _ticks(axis.xaxis)
        _title(axis, device, measurements)
        axis.set_xlabel(f"ms per image (median, log), batch {size}, {_threads(shown)}{_disturbed(shown)}")
        axis.set_ylabel("published ImageNet top-1, % (of the float32 weights)")
    handles = [_handle(name, MUTED, marker=mark, linestyle="") for name, mark in markers.items()]
    handles.append(_handle("nothing is faster and more accurate", INK, alpha=0.55))
    if any(result.ratio_to_first is None for result in rated):
        handles.append(_handle("hollow: " + NOISY, MUTED, marker="o", markerfacecolor="white", linestyle=""))
    _legend(figure, handles)
    figure.draw_without_rendering()  # once: places of panels and points
    for axis, shown in zip(axes, groups.values(), strict=True):
        _label(figure, axis, shown)
    return figure


def draw_latency(measurements: Measurements) -> Figure | None:
    """Return bars to each case's median and whiskers to the 90th percentile, a panel for each device and batch size."""
    if not measurements.results:
        return None
    cases = {key: shown[:MAX_CASES] for key, shown in panels(measurements.results).items()}
    colors = dict(zip(_unique(result.form for result in measurements.results), cycle(COLORS), strict=False))
    rows = max(len(shown) + 0.8 * len(_unique(map(_model, shown))) for shown in cases.values())
    figure, axes = _panels(1, len(cases), 6.8, 1.3 + 0.19 * rows)
    for axis, ((device, size), shown) in zip(axes, cases.items(), strict=True):
        y, ticks = 0.0, []
        widest = max(result.latency_ms_p90 for result in shown)
        for model in _unique(map(_model, shown)):
            forms = [result for result in shown if _model(result) == model]
            ticks.append((y + (len(forms) - 1) / 2, _name(forms[0], shown)))
            for result in forms:
                _bar(axis, y, result, colors[result.form], widest)
                y += 1
            y += 0.8
        axis.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
        for tick, (_, name) in zip(axis.get_yticklabels(), ticks, strict=True):
            ours = name.startswith("shvit")
            tick.set(color=OURS if ours else INK, fontweight="bold" if ours else 400)
        axis.set_ylim(y - 0.9, -0.9)
        axis.grid(visible=False, axis="y")
        axis.set_xlim(0, widest * 1.18)
        _title(axis, device, measurements)
        axis.set_xlabel(f"ms per image, median and 90th percentile; batch {size}, {_threads(shown)}{_disturbed(shown)}")
    handles: list[Artist] = [_handle(name, color, marker="s", linestyle="") for name, color in colors.items()]
    if any(result.ratio_to_first is None for result in measurements.results):
        handles.append(Patch(facecolor=MUTED, alpha=0.45, hatch="////", edgecolor="white", label=NOISY))
    _legend(figure, handles)
    return figure


def draw_batch(measurements: Measurements) -> Figure | None:
    """Return time and memory against the batch size."""
    return _scaling([each for each in measurements.scaling if each.over == "batch_size"], "images in a batch", "batch")


def draw_resolution(measurements: Measurements) -> Figure | None:
    """Return time and memory against the number of pixels."""
    sweeps = [each for each in measurements.scaling if each.over == "pixels"]
    return _scaling(sweeps, "pixels (height × width)", "pixels")


def draw_layers(measurements: Measurements) -> Figure | None:
    """Return a bar for each model, runtime and batch size, with a color for each kind of layer."""
    bars: dict[tuple[str, str, int], list[LayerTime]] = {}
    for each in measurements.layers:
        bars.setdefault((each.model, each.runtime, each.batch_size), []).append(each)
    if not bars:
        return None
    total: dict[str, float] = {}
    for each in measurements.layers:
        total[each.kind] = total.get(each.kind, 0) + each.percent
    kinds = sorted(total, key=lambda kind: -total[kind])
    figure, (axis,) = _panels(1, 1, 10.5, 1.6 + 0.42 * len(bars))
    widest = max(sum(each.ms for each in parts) for parts in bars.values())
    for y, parts in enumerate(bars.values()):
        left = 0.0
        for each in sorted(parts, key=lambda part: kinds.index(part.kind)):
            color = COLORS[kinds.index(each.kind) % len(COLORS)]
            axis.barh(y, each.ms, left=left, color=color, edgecolor="white", linewidth=0.8, label=each.kind)
            if each.ms > 0.045 * widest:
                axis.text(left + each.ms / 2, y, f"{each.percent:.0f} %", ha="center", va="center", fontsize=8,
                          color=_on(color))  # fmt: skip
            left += each.ms
        axis.text(left + 0.008 * widest, y, f"{left:.3g} ms", va="center", fontsize=9, color=INK)
    axis.set_yticks(range(len(bars)), [f"{_plain(model)}, {runtime}, batch {size}" for model, runtime, size in bars])
    axis.grid(visible=False, axis="y")
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlim(0, widest * 1.09)
    axis.set_xlabel("ms per image, by kind of layer, from the runtime's own profiler")
    colors = zip(kinds, cycle(COLORS), strict=False)
    _legend(figure, [_handle(kind, color, marker="s", linestyle="") for kind, color in colors])
    return figure


FIGURES: dict[str, Callable[[Measurements], Figure | None]] = {
    "pareto.png": draw_pareto,
    "bench.png": draw_latency,
    "batch.png": draw_batch,
    "resolution.png": draw_resolution,
    "layers.png": draw_layers,
}


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure that needs no display, and its panels of `width` by `height` inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(MUTED)
        axis.grid(color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, labelsize=9)
    return figure, axes


def _title(axis: Axes, device: str, measurements: Measurements) -> None:
    """Set the device's name as the title, unless everything ran on this machine."""
    if any(result.device for result in measurements.results):
        machine = measurements.machine
        axis.set_title(_plain(device or (machine.processor if machine else "this machine")), fontsize=11, color=INK)


def _disturbed(results: Sequence[BenchResult]) -> str:
    """Return a second line where a busy machine made wall times longer."""
    disturbed = describe_preemption(results)
    return f"\nwall time; {disturbed}" if disturbed else ""


def _handle(label: str, color: str, **look: Any) -> Line2D:
    """Return an entry of a legend."""
    return Line2D([], [], label=label, color=color, **look)


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Put a legend below the panels, in as many columns as the figure is wide enough for."""
    for columns in range(min(5, len(handles)), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _ticks(axis: Axis) -> None:
    """Set plain numbers on a logarithmic axis: 1, 2, 5, 10, …"""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
    axis.set_minor_formatter(NullFormatter())


def _point(axis: Axes, result: BenchResult, marker: str, best: bool) -> None:
    """Draw a point: dark if it is its model's best form, hollow if too noisy to be compared."""
    color, noisy = _color(result), result.ratio_to_first is None
    axis.plot(
        result.latency_ms_p50, result.top1 or 0, marker, color=color, markersize=8 if best else 5,
        alpha=1 if best else 0.4, markerfacecolor="white" if noisy else color, zorder=3 if best else 2,
    )  # fmt: skip


def _bar(axis: Axes, y: float, result: BenchResult, color: str, widest: float) -> None:
    noisy = result.ratio_to_first is None
    above = max(0.0, result.latency_ms_p90 - result.latency_ms_p50)
    axis.barh(
        y, result.latency_ms_p50, xerr=[[0], [above]], height=0.86, color=color, ecolor=INK, capsize=1.5,
        alpha=0.45 if noisy else 1, hatch="////" if noisy else None, error_kw={"linewidth": 0.9}, edgecolor="white",
        linewidth=0,
    )  # fmt: skip
    text = f"{result.latency_ms_p50:.3g}" + (", noisy" if noisy else "")
    axis.text(result.latency_ms_p50 + above + 0.01 * widest, y, text, va="center", fontsize=7.5, color=INK)


def _scaling(sweeps: list[Scaling], quantity: str, short: str) -> Figure | None:
    """Return two panels, time and memory, on logarithmic axes; a line's slope is its exponent."""
    if not sweeps:
        return None
    figure, axes = _panels(1, 2, 7.2, 4.8)
    runtimes = _unique(each.runtime for each in sweeps)
    models = _unique(each.model for each in sweeps)
    for axis, unit in zip(axes, ("ms per image", "peak memory of the process, MB"), strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        ends: list[tuple[float, float, str, str]] = []
        for each in sweeps:
            time = unit.startswith("ms")
            values = each.latency_ms if time else each.peak_memory_mb
            exponent = each.exponent if time else each.memory_exponent
            color = COLORS[models.index(each.model) % len(COLORS)]
            label = f"{_plain(each.model)} {each.runtime}: {short}$^{{{exponent:.2f}}}$"
            look = ("-", "--", ":", "-.")[runtimes.index(each.runtime) % 4]
            points = [point for point in zip(each.values, values, strict=True) if point[1] > 0]  # log has no 0
            axis.plot(*zip(*points, strict=True), look, marker="o", markersize=4, color=color, label=label)
            ends.append((*points[-1], label, color))
        ticks = sorted({value for each in sweeps for value in each.values})
        if short == "batch":
            axis.set_xticks(ticks, list(map(str, ticks)))
        else:
            axis.set_xticks(ticks, list(map(_square, ticks)), rotation=30, ha="right")
        axis.set_xticks([], minor=True)
        axis.set_xlabel(f"{quantity}, log")
        axis.set_ylabel(f"{unit}, log")
        _ticks(axis.yaxis)
        _name_ends(axis, ends)
    return figure


def _square(pixels: int) -> str:
    side = round(pixels**0.5)
    return f"{side}²" if side * side == pixels else f"{pixels:,}"


def _name_ends(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name right of its last point, moved apart where two would touch."""
    low, high = axis.get_ylim()
    step = 0.055 * log(high / low)
    at = float("-inf")
    for x, y, label, color in sorted(ends, key=lambda end: end[1]):
        at = max(log(y / low), at + step)
        axis.annotate(
            label, (x, y), xytext=(1.02, at / log(high / low)), textcoords="axes fraction", fontsize=8.5, color=color,
            va="center", arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.4, "linewidth": 0.7},
        )  # fmt: skip


def _label(figure: Figure, axis: Axes, shown: list[BenchResult]) -> None:
    """Write names beside the points, ours first; where a name would overlap another it takes the next place."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    best = best_forms(shown)
    on_front = front(best)
    points = [_position(axis, result) for result in shown]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in points] + _steps(axis, on_front)
    inside = axis.get_window_extent(renderer)
    for result in sorted(best, key=lambda each: (not _ours(each), each not in on_front)):
        point, size = (result.latency_ms_p50, result.top1 or 0), 10 if _ours(result) else 8.5
        style: dict[str, Any] = {"textcoords": "offset points", "color": _color(result, text=True)}
        for x, y, across, along in PLACES:
            weight = "bold" if _ours(result) else "normal"
            text = axis.annotate(_name(result, shown), point, xytext=(x, y), ha=across, va=along, fontsize=size,
                                 fontweight=weight, **style)  # fmt: skip
            box = text.get_window_extent(renderer)
            if box.x0 > inside.x0 and box.x1 < inside.x1 and box.count_overlaps(taken) == 0:
                break
            text.remove()
        else:
            text = axis.annotate(_name(result, shown), point, xytext=(7, 0), va="center", fontsize=8, **style)
        taken.append(text.get_window_extent(renderer))


def _position(axis: Axes, result: BenchResult) -> tuple[float, float]:
    """Return a result's x and y in pixels."""
    x, y = axis.transData.transform((result.latency_ms_p50, result.top1 or 0))
    return float(x), float(y)


def _steps(axis: Axes, on_front: list[BenchResult]) -> list[Bbox]:
    """Return boxes along the front's line."""
    at = [_position(axis, result) for result in on_front]
    across = [Bbox.from_extents(a[0], a[1] - 1, b[0], a[1] + 1) for a, b in pairwise(at)]
    return across + [Bbox.from_extents(b[0] - 1, a[1], b[0] + 1, b[1]) for a, b in pairwise(at)]


def _ours(result: BenchResult) -> bool:
    return result.model.startswith("shvit")


def _color(result: BenchResult, text: bool = False) -> str:
    return OURS if _ours(result) else INK if text else MUTED


def _on(color: str) -> str:
    """Return black or white, whichever is more legible on a color."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "black"


def _model(result: BenchResult) -> tuple[str, ImgSize]:
    return result.model, result.img_size


def _name(result: BenchResult, among: Sequence[BenchResult]) -> str:
    """Return the model's name, with its size where others of that name have another."""
    several = any(other.model == result.model and other.img_size != result.img_size for other in among)
    name = _plain(result.model)
    return f"{name} @{result.img_size}" if several else name


def _plain(name: str) -> str:
    """Return a third-party name, shortened, in which nothing is a formula."""
    short = name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
    return " ".join(short.split()).replace("$", r"\$")


def _threads(results: Sequence[BenchResult]) -> str:
    counts = _unique(result.threads for result in results)
    return f"{' or '.join(map(str, counts))} thread{'s' if counts != [1] else ''}"


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))
