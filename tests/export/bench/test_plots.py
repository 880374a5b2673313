"""Plots of measurements: what is drawn, and that files are images."""

from dataclasses import replace

import pytest
from PIL import Image

from shvit.export.bench.layer_times import KINDS
from shvit.export.bench.plots import (
    FIGURES,
    best_forms,
    draw_batch,
    draw_latency,
    draw_layers,
    draw_pareto,
    draw_plots,
    draw_resolution,
    front,
)
from shvit.export.bench.records import LayerTime, Measurements
from tests.export.bench.test_explorer import MEASUREMENTS, OTHER, PHONE, PHONES, result

NONE = replace(MEASUREMENTS, results=(), layers=(), scaling=())


def texts(axis) -> set[str]:
    return {text.get_text() for text in axis.texts}


def test_every_plot_is_written(tmp_path):
    written = draw_plots(MEASUREMENTS, tmp_path / "bench")
    assert [path.name for path in written] == list(FIGURES)
    assert set(written) == set((tmp_path / "bench").iterdir())
    for path in written:
        with Image.open(path) as opened:
            assert opened.format == "PNG"
            assert min(opened.size) > 200


def test_only_what_was_measured_is_drawn(tmp_path):
    assert draw_plots(NONE, tmp_path) == []
    unrated = replace(NONE, results=(result("mine.onnx", None, 3.0),))
    assert [path.name for path in draw_plots(unrated, tmp_path)] == ["bench.png"]
    swept = replace(NONE, scaling=MEASUREMENTS.scaling[:1])
    assert [path.name for path in draw_plots(swept, tmp_path)] == ["batch.png"]


def test_front_is_what_nothing_dominates():
    """Against the definition, point by point, with equal accuracies and equal latencies."""
    levels = ((71, 4), (72, 4), (72, 6), (73, 9), (73, 5), (70, 3), (75, 20), (74.9, 20), (75, 21), (60, 30))
    points = [result(f"m{i}", float(top1), float(ms)) for i, (top1, ms) in enumerate(levels)]

    def dominates(a, b):
        return (a.latency_ms_p50 <= b.latency_ms_p50 and a.top1 >= b.top1) and (
            a.latency_ms_p50 < b.latency_ms_p50 or a.top1 > b.top1
        )

    expected = [each for each in points if not any(dominates(other, each) for other in points)]
    found = front([*points, result("unrated", None, 0.1)])
    assert found == sorted(expected, key=lambda each: each.latency_ms_p50)
    assert len(found) == 4


@pytest.fixture(scope="module")
def pareto():
    """Of `MEASUREMENTS`; to be left as it is."""
    return draw_pareto(MEASUREMENTS)


def test_pareto_has_a_panel_for_each_batch_size_and_names_every_model_once(pareto):
    assert [axis.get_xscale() for axis in pareto.axes] == ["log", "log"]
    for axis, size in zip(pareto.axes, (1, 16), strict=True):
        rated = [each for each in MEASUREMENTS.results if each.batch_size == size and each.top1 is not None]
        (line,) = [line for line in axis.lines if line.get_gid() == "front"]
        expected = [(each.latency_ms_p50, each.top1) for each in front(best_forms(rated))]
        assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == expected
        assert len(axis.texts) == len({each.model for each in rated})
        assert len([line for line in axis.lines if line.get_gid() != "front"]) == len(rated)
        assert f"batch {size}" in axis.get_xlabel()
    assert expected == [(3.0, 72.8), (4.5, 75.2)]
    ours = next(text for text in pareto.axes[0].texts if text.get_text() == "shvit_s2")
    baseline = next(text for text in pareto.axes[0].texts if text.get_text() == "heavy")
    assert ours.get_fontweight() == "bold"
    assert baseline.get_color() != ours.get_color()


@pytest.mark.parametrize(("machine", "name"), [(PHONES.machine, "A & B <cpu>"), (None, "this machine")])
def test_every_device_has_panels_of_its_own(machine, name, tmp_path, pareto):
    measured = replace(PHONES, machine=machine)
    drawn = [make(measured) for make in (draw_pareto, draw_latency)]
    for axes in (figure.axes for figure in drawn):
        assert [axis.get_title() for axis in axes] == [name, name, PHONE, OTHER]
        assert ["batch 16" in axis.get_xlabel() for axis in axes] == [False, True, False, False]
    assert [len(axis.patches) for axis in axes] == [2, 1, 4, 2]
    fronts = [line for axis in drawn[0].axes for line in axis.lines if line.get_gid() == "front"]
    assert [list(line.get_xdata()) for line in fronts] == [[4.0, 15.0], [3.0], [3.5, 5.0, 30.0], [19.0, 60.0]]
    assert len(draw_plots(measured, tmp_path)) == 2
    assert pareto.axes[0].get_title() == ""


def test_legend_of_many_runtimes_is_within_the_figure():
    names = ("torch", "onnxruntime", "openvino", "litert", "ncnn", "executorch", "onnxruntime-int8", "openvino-int8")
    cases = tuple(replace(result("m", None, 3.0), runtime=name, ratio_to_first=None) for name in names)
    figure = draw_latency(replace(NONE, results=cases))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    shown = legend.get_window_extent()
    assert len(legend.get_texts()) == len(names) + 1
    assert shown.x0 >= 0
    assert shown.x1 <= figure.bbox.width


def test_one_bar_for_each_case_with_a_whisker_and_a_mark_if_too_noisy():
    figure = draw_latency(MEASUREMENTS)
    first, second = figure.axes
    assert len(first.patches) == 9
    assert len(second.patches) == 2
    assert sorted(bar.get_width() for bar in first.patches) == [2, 3, 4, 5.5, 6, 7, 9, 15, 40]
    assert "5.5, noisy" in texts(first)
    assert sum("noisy" in text for text in texts(first)) == 2
    whiskers = [lines.get_segments()[0] for lines in first.collections]
    assert {tuple(segment[:, 0]) for segment in whiskers} >= {(40.0, 50.0), (2.0, 2.5)}
    assert [tick.get_text() for tick in first.get_yticklabels()][:3] == ["shvit_s1", "shvit_s2", "shvit_s4"]


def test_growth_has_time_and_memory_with_the_fitted_exponents():
    for figure, exponents in (
        (draw_batch(MEASUREMENTS), ("-0.21", "0.04")),
        (draw_resolution(MEASUREMENTS), ("1.00", "0.04")),
    ):
        for axis, exponent in zip(figure.axes, exponents, strict=True):
            (label,) = texts(axis)
            assert f"^{{{exponent}}}" in label
            assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    time, memory = draw_batch(MEASUREMENTS).axes
    assert list(time.lines[0].get_ydata()) == [8.0, 6.0]
    assert list(memory.lines[0].get_ydata()) == [200.0, 210.0]
    assert [tick.get_text() for tick in draw_resolution(MEASUREMENTS).axes[0].get_xticklabels()] == ["112²", "224²"]


def test_layers_add_up_to_their_model():
    (axis,) = draw_layers(MEASUREMENTS).axes
    assert [(bar.get_x(), bar.get_width()) for bar in axis.patches] == [(0, 6.0), (6.0, 4.0)]
    assert {"60 %", "40 %", "10 ms"} <= texts(axis)


def test_kinds_of_layers_that_a_profiler_tells_have_colors_of_their_own():
    kinds = [*KINDS, "1×1 convolution", "k×k convolution", "depthwise convolution", "other"]
    (axis,) = draw_layers(
        replace(NONE, layers=tuple(LayerTime("m", "torch", 1, kind, 1.0, 9.0) for kind in kinds))
    ).axes
    assert len({bar.get_facecolor() for bar in axis.patches}) == len(kinds)


def test_names_lie_on_neither_the_front_nor_each_other(pareto):
    pareto.draw_without_rendering()
    for axis in pareto.axes:
        boxes = [text.get_window_extent() for text in axis.texts]
        assert all(a.count_overlaps([b for b in boxes if b is not a]) == 0 for a in boxes)
        (line,) = [line for line in axis.lines if line.get_gid() == "front"]
        path = line.get_transform().transform_path(line.get_path())
        assert not any(path.intersects_bbox(box, filled=False) for box in boxes)


def test_any_name_can_be_drawn(tmp_path):
    names = ["$x", "a$b$c", r"$\undefined$", "_hidden", "x" * 200, "\n"]
    renamed = [
        tuple(replace(each, model=name) for name in names for each in records)
        for records in (MEASUREMENTS.results[:2], MEASUREMENTS.layers, MEASUREMENTS.scaling)
    ]
    assert len(draw_plots(Measurements(MEASUREMENTS.machine, *renamed), tmp_path)) == 5
