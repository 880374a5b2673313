"""What browsers send, made into results; and `shvit bench import`, which reads what they saved."""

import json
from dataclasses import replace
from itertools import chain
from statistics import median

import numpy as np
import pytest

from shvit import cli
from shvit.errors import InputError
from shvit.export.bench.explorer import write_report
from shvit.export.bench.records import Measurements, read_measurements, write_measurements
from shvit.export.browser.phone import qr_code
from shvit.export.browser.phone_record import add_record, describe_record, read_record, read_record_file, save_record
from tests.export.bench.test_explorer import MEASUREMENTS as DRAWN
from tests.export.browser.serving import CASE, RECORD

ROUNDS = 9
FAST = [[2.0, 2.2, 1.8 + 0.01 * i] for i in range(ROUNDS)]
SLOW = [[4.0, 4.4, 3.6 + 0.02 * i] for i in range(ROUNDS)]

MEASUREMENTS = replace(DRAWN, results=DRAWN.results[:-1])
"""Without the numbers that JSON has no words for."""


def record(cases=None, name="Fairphone", **changes):
    cases = cases or [{**CASE, "model": "shvit_s1", "img_size": 224, "rounds": FAST}]
    said = {**RECORD, "cases": cases, "device": {**RECORD["device"], "name": name}, "sustained": [], **changes}
    return read_record(json.dumps(said).encode())


def test_figures_are_those_of_the_calls():
    first = {**CASE, "model": "shvit_s1", "img_size": 224, "rounds": FAST}
    second = {**CASE, "model": "shvit_s4", "img_size": 256, "rounds": SLOW, "threads": 4, "precision": "int8"}
    measured = add_record(Measurements(None, ()), record([first, second]))
    one, other = measured.results
    assert (one.runtime, other.runtime) == ("wasm", "wasm-4-threads")
    assert (one.device, one.latency_ms_p50) == ("Fairphone", median([*chain(*FAST)]))
    assert other.latency_ms_p90 == pytest.approx(np.percentile([*chain(*SLOW)], 90))
    assert (one.rounds, one.calls) == (ROUNDS, 3 * ROUNDS)
    assert (one.ratio_to_first, other.ratio_to_first) == (1.0, pytest.approx(2.0))
    assert other.ratio_low <= 2 <= other.ratio_high
    assert (one.top1, other.top1) == (72.78, 79.362)  # published, whatever a browser may say
    assert (one.load_ms, one.first_ms, one.cpu_ms, one.peak_memory_mb) == (12.5, 3.0, None, None)


def test_no_accuracy_is_published_of_a_file_or_another_size():
    cases = [{**CASE, "model": "mine.onnx"}, *({**CASE, "model": "shvit_s1", "img_size": px} for px in (96, [224, 96]))]
    assert [each.top1 for each in add_record(Measurements(None, ()), record(cases)).results] == [None] * 3


def test_size_of_a_record_is_one_number_or_height_and_width(tmp_path):
    cases = [{**CASE, "model": "a.onnx"}, {**CASE, "model": "b.onnx", "img_size": [64, 96]}]
    measured = add_record(Measurements(None, ()), record(cases))
    assert [each.img_size for each in measured.results] == [(64, 64), (64, 96)]
    write_measurements(measured, tmp_path / "bench.json")
    assert [each["img_size"] for each in json.loads((tmp_path / "bench.json").read_text())["results"]] == [64, [64, 96]]
    assert read_measurements(tmp_path / "bench.json") == measured


def test_a_case_that_did_not_hold_is_a_check_and_no_result():
    broken = {
        **CASE,
        "check": {**CASE["check"], "passed": False, "snr_db": 3.0},
        "error": "wrong outputs",
        "rounds": [],
    }
    absent = {**CASE, "check": None, "error": "it is damaged", "load_ms": None, "first_ms": None, "rounds": []}
    measured = add_record(Measurements(None, ()), record([broken, absent, CASE]))
    assert len(measured.results) == 1
    assert [check.error for check in measured.checks] == ["wrong outputs", "it is damaged", ""]
    assert not any(check.incomplete for check in measured.checks)
    assert [check.images for check in measured.checks] == [7, 0, 7]


def test_ratios_are_to_a_case_that_ran_to_the_end():
    ended_early = {**CASE, "rounds": FAST[:2], "error": "out of memory"}
    measured = add_record(Measurements(None, ()), record([ended_early, {**CASE, "rounds": SLOW}]))
    whole, early = measured.results  # what ratios are to comes first
    assert whole.ratio_to_first == 1.0
    assert early.ratio_to_first is None  # two rounds decide nothing
    assert [(check.error, check.incomplete) for check in measured.checks] == [("", "out of memory"), ("", "")]


def test_times_of_wrong_outputs_do_not_count():
    wrong = {**CASE, "check": {**CASE["check"], "passed": False}}
    measured = add_record(Measurements(None, ()), record([wrong, {**CASE, "check": None}]))
    assert measured.results == ()
    assert all(check.error for check in measured.checks)


def test_more_forms_and_devices_than_marks_and_panels_can_be_drawn(tmp_path, monkeypatch):
    for name, few in (("MARKERS", "o"), ("COLORS", ("#000000",)), ("MAX_PANELS", 2)):
        monkeypatch.setattr(f"shvit.export.bench.plots.{name}", few)
    known = {**CASE, "model": "shvit_s1", "img_size": 224}
    cases = [
        known,
        {**known, "threads": 2},
        {**known, "rounds": [[0.0]]},
        {**known, "gmacs": None, "precision": "int8"},
    ]
    measured = Measurements(None, ())
    for _ in range(3):
        measured = add_record(measured, record(cases))
    assert all(path.stat().st_size for path in write_report(measured, tmp_path))


def test_what_ran_on_two_processors_is_called_so():
    gpu = {**CASE, "backend": "webgpu"}
    measured = add_record(Measurements(None, ()), record([gpu, {**gpu, "cpu_fallback": True}]))
    assert [each.runtime for each in measured.results] == ["webgpu", "webgpu+cpu"]


def test_records_are_saved_beside_each_other(tmp_path):
    paths = [save_record(record(name=name), tmp_path) for name in ("one", "two")]
    assert [path.name for path in paths] == ["record-1.json", "record-2.json"]
    assert [read_record_file(path).device.name for path in paths] == ["one", "two"]


def test_measurements_of_strangers_are_checked(tmp_path):
    write_measurements(add_record(MEASUREMENTS, record()), tmp_path / "bench.json")
    good = json.loads((tmp_path / "bench.json").read_text())
    for place, key, value in (
        ("results", "device", "\x1b[2J"),
        ("results", "latency_ms_p50", "fast"),
        ("results", "threads", 1.5),
        ("devices", "missing", {"webgpu": 1}),
        ("devices", "missing", []),
        ("checks", "images", None),
    ):
        bad = {**good, place: [{**good[place][0], key: value}]}
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(InputError, match=f"holds no measurements of `shvit bench`: .*{key}"):
            read_measurements(tmp_path / "bad.json")


def test_slowdown_is_of_the_last_fifth_over_the_first():
    seconds = [2.0] * 6 + [2.5] * 18 + [3.0] * 6
    measured = add_record(Measurements(None, ()), record(sustained=[{"case": 0, "seconds": seconds}]))
    assert measured.sustained[0].slowdown == 1.5
    assert measured.sustained[0].latency_ms == tuple(seconds)


def test_devices_of_one_name_are_told_apart_and_what_was_measured_before_stays():
    measured = add_record(add_record(MEASUREMENTS, record()), record())
    assert [device.name for device in measured.devices] == ["Fairphone", "Fairphone (2)"]
    assert measured.results[: len(MEASUREMENTS.results)] == MEASUREMENTS.results
    assert [each.device for each in measured.results[-2:]] == ["Fairphone", "Fairphone (2)"]
    assert (measured.machine, measured.layers) == (MEASUREMENTS.machine, MEASUREMENTS.layers)


def test_measurements_with_devices_are_read_back(tmp_path):
    known = replace(MEASUREMENTS, results=MEASUREMENTS.results[:1])
    measured = add_record(known, record(sustained=[{"case": 0, "seconds": [1, 2]}]))
    write_measurements(measured, tmp_path / "bench.json")
    assert read_measurements(tmp_path / "bench.json") == measured
    alone = add_record(Measurements(None, ()), record())
    write_measurements(alone, tmp_path / "alone.json")
    assert read_measurements(tmp_path / "alone.json") == alone


def test_import_puts_devices_beside_each_other(tmp_path, capsys):
    for name in ("Fairphone", "iPhone"):
        (tmp_path / f"{name}.json").write_text(record(name=name).model_dump_json())
    write_measurements(MEASUREMENTS, tmp_path / "bench.json")
    words = ["bench", "import", tmp_path / "Fairphone.json", tmp_path / "iPhone.json", "--output", tmp_path / "out"]
    result = cli.run([*map(str, words), "--beside", str(tmp_path / "bench.json")])
    assert [device["name"] for device in result["devices"]] == ["Fairphone", "iPhone"]
    assert len(result["results"]) == len(MEASUREMENTS.results) + 2
    printed = capsys.readouterr().out
    assert "Fairphone: 1 of 1 cases timed in wasm" in printed
    assert (tmp_path / "out" / "report.html").exists()
    assert read_measurements(tmp_path / "out" / "bench.json").devices[1].name == "iPhone"


def test_import_refuses_in_one_line_and_writes_nothing(tmp_path):
    words = ["bench", "import", "--output", str(tmp_path / "out")]
    with pytest.raises(InputError, match="give at least one file that the page saved"):
        cli.run(words)
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        cli.run([*words, str(tmp_path / "none.json")])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match=r"other\.json: not a record of `shvit bench phone`"):
        cli.run([*words, str(tmp_path / "other.json")])
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(InputError, match="larger than the"):
        read_record_file(tmp_path / "huge.json")
    assert not (tmp_path / "out").exists()


def test_missing_backends_are_told():
    said = {**RECORD["device"], "missing": {"webgpu": "it needs HTTPS"}}
    text = describe_record(read_record(json.dumps({**RECORD, "device": said}).encode()))
    assert text == "Fairphone: 1 of 1 cases timed in wasm (no webgpu: it needs HTTPS)"
    failed = {**CASE, "check": None, "error": "it is damaged"}
    assert describe_record(record([failed])) == "Fairphone: 0 of 1 cases timed"


def test_the_qr_code_is_the_addresss():
    """Each half block is two modules, one above the other; segno's matrix is the reference."""
    import segno

    url = "https://192.168.1.23:8443/abcdefghijklmnopqrstuv/"
    lines = qr_code(url).rstrip("\n").split("\n")
    pairs = {"█": (0, 0), "▀": (0, 1), "▄": (1, 0), " ": (1, 1)}
    drawn = [[pairs[each][half] for each in line] for line in lines for half in (0, 1)]
    matrix = [[int(module) for module in row] for row in segno.make(url, error="l", micro=False).matrix_iter(border=4)]
    assert drawn[: len(matrix)] == matrix
