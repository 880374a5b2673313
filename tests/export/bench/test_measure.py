"""What the benchmark does, not how fast anything is."""

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from shvit import sessions
from shvit.cli import run
from shvit.documents import to_json
from shvit.errors import InputError
from shvit.export.backends import worker
from shvit.export.bench import measure as bench_module
from shvit.export.bench.cases import BenchCase, BenchModel, Settings, choose_cores, create_file_case, create_timm_model
from shvit.export.bench.layer_times import convolution_kind, layer_kind, measure_layers
from shvit.export.bench.measure import RunningCase, exponent, ratio_interval, run_rounds, summarize
from shvit.export.bench.records import BenchResult, Machine, Measurements, parse_measurements, read_measurements
from shvit.export.bench.roofline import measure_bandwidth, measure_peaks
from shvit.export.bench.runtimes import RUNTIMES, check_runtimes
from shvit.export.bench.tables import show_machine, show_results
from shvit.export.formats.openvino import core
from shvit.export.spec import open_model
from shvit.img_size import ImgSize
from tests.conftest import SMALL

MACHINE = Machine("a processor", 2, ("avx2",), "unknown", 1, {"fp32": 100.0}, 10.0, {})


def case(name: str = "a", batch_size: int = 1, macs: int | None = 10**9) -> BenchCase:
    return BenchCase(
        name,
        "onnxruntime",
        "fp32",
        ImgSize(8, 8),
        batch_size,
        macs,
        {"runner": "onnx", "provider": "cpu", "threads": 1},
        {},
    )


@pytest.fixture
def settings():
    return Settings(threads=1, img_size=ImgSize(64, 64))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench_module, "ROUND_S", 0.0)
    monkeypatch.setattr(bench_module, "measure_machine", lambda: MACHINE)


@pytest.fixture
def foreign(tmp_path):
    """An ONNX file that someone else made, for batches of one."""
    path = tmp_path / "foreign.onnx"
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    torch.onnx.export(model, (torch.rand(1, 3, 32, 32),), str(path), dynamo=False, input_names=["pixels"])
    return path


# --- turns and figures ------------------------------------------------------------------------------------------------


def test_cases_take_turns_and_the_order_is_reversed_every_other_round(monkeypatch):
    order: list[str] = []

    @contextmanager
    def start(case):
        yield SimpleNamespace(
            case=case, open=lambda: order.append(case.model.upper()), run_round=lambda: order.append(case.model)
        )

    monkeypatch.setattr(bench_module, "start", start)
    run_rounds([case(name) for name in "abc"], rounds=4)
    assert "".join(order) == "ABC" + "abc" + "cba" + "abc" + "cba"


def measured(rounds: list[list[float]], cpu: list[float] | None = None, **of_case: object) -> RunningCase:
    """Seconds of the calls of each round and, where others had the core meanwhile, of a call's processor time."""
    process = SimpleNamespace()
    cpu = cpu or [float(np.mean(times)) for times in rounds]
    return RunningCase(replace(case(), **of_case), process, 0.5, 0.25, 10**8, rounds, cpu)


def test_summary_divides_by_the_batch_and_takes_ratios_round_by_round():
    rounds = [[0.2, 0.4, 0.6]] * 12
    slower = [[0.4, 0.8, 9.0]] * 12  # a round's median counts
    first, second = summarize([measured(rounds, batch_size=2), measured(slower, batch_size=2)], MACHINE)
    assert first.latency_ms_p50 == pytest.approx(200)
    assert first.latency_ms_p99 == pytest.approx(300)
    assert first.ratio_to_first == 1
    assert second.ratio_to_first == pytest.approx(2)
    assert (first.calls, first.rounds) == (36, 12)
    assert first.cpu_ms == pytest.approx(200)
    assert (second.ratio_basis, second.preempted_percent) == ("wall time", pytest.approx(0))
    assert (first.load_ms, first.first_ms, first.peak_memory_mb) == (500, 250, 100)
    assert first.percent_of_peak == pytest.approx(100 * 2 / 0.2 / 100)  # 2 GFLOP in 0.2 s, of 100 GFLOP/s


HALVES = [[0.1 * (1 + i % 3), 0.4] for i in range(12)]
"""Calls of 0.1 s of which others had the core for a half and more."""


def test_processor_time_decides_where_others_had_the_core():
    first, second = (measured(HALVES, [seconds] * 12) for seconds in (0.1, 0.05))
    shuffled = replace(second, rounds=[HALVES[(5 * i) % 12] for i in range(12)])
    one, other = summarize([first, shuffled], MACHINE)
    assert (one.ratio_to_first, one.ratio_basis) == (1, "processor time")
    assert other.ratio_to_first == pytest.approx(0.5)
    assert (other.ratio_low, other.ratio_high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert other.ratio_basis == "processor time"
    assert one.preempted_percent == pytest.approx(100 * (1 - 0.1 / 0.3))
    assert one.percent_of_peak == pytest.approx(100 * 2 / 0.1 / 100)  # what it took, not what others took
    assert one.latency_ms_p50 > 200


def test_one_thread_of_each_runtime_on_the_cpu_has_processor_time_and_no_other_device(foreign, settings):
    elsewhere = ["cuda", "cuda-bf16", "onnxruntime-cuda", "onnxruntime-tensorrt", "coreml"]
    assert [name for name, runtime in RUNTIMES.items() if not runtime.on_cpu] == elsewhere
    assert create_file_case(foreign, 1, settings, [], tuned=False).is_one_cpu_thread


@pytest.mark.parametrize("other", [{"job": {"runner": "onnx", "threads": 2}}, {"on_cpu": False}])
def test_wall_time_alone_counts_for_several_threads_and_other_devices(other):
    alone, second = measured(HALVES, [0.1] * 12), measured(HALVES[::-1], [0.05] * 12, **other)
    for pair in ([alone, second], [second, alone]):
        one, other = summarize(pair, MACHINE)
        assert other.ratio_basis == "wall time"
        assert {one.preempted_percent is None, other.preempted_percent is None} == {True, False}


def test_table_says_what_the_processor_lacks(capsys):
    lacking = [replace(measured([[0.1]] * 12), case=replace(case(), runtime="openvino-bf16"))]
    show_results(summarize(lacking, MACHINE))
    show_machine(MACHINE)
    said = " ".join(capsys.readouterr().out.split())
    assert "openvino-bf16 fp32" in said
    assert "peak GFLOP/s: fp32 100 (no instructions for bf16 and int8: not above fp32)" in said


def test_one_disturbed_case_is_enough_for_processor_time():
    quiet, disturbed = measured([[0.1, 0.1]] * 12), measured(HALVES, [0.2] * 12)
    for pair, ratio in (([quiet, disturbed], 2), ([disturbed, quiet], 0.5)):
        result = summarize(pair, MACHINE)[1]
        assert (result.ratio_basis, result.ratio_to_first) == ("processor time", pytest.approx(ratio))
    hardly = measured([[0.1, 0.102]] * 12, [0.1] * 12)  # 1 % is no reason
    assert summarize([quiet, hardly], MACHINE)[1].ratio_basis == "wall time"


@contextmanager
def neighbors(count: int):
    """Busy processes on the core that a case of one thread is measured on."""
    code = f"import os\nos.sched_setaffinity(0, {choose_cores(1)})\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="macOS and Windows cannot pin a process to a core")
def test_beside_busy_processes_processor_time_is_chosen_and_said(foreign, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_module, "measure_machine", lambda: MACHINE)
    monkeypatch.setattr(bench_module, "ROUND_S", 0.06)
    options = ["--models", str(foreign), "--rounds", "6", "--output", str(tmp_path / "out")]
    with neighbors(2):
        result = run(["bench", *options, "--against", str(foreign)])["results"][1]
    assert result["ratio_basis"] == "processor time"
    assert result["preempted_percent"] > 20
    said = " ".join(capsys.readouterr().out.split())
    assert "CPU: a ratio of processor times, as other programs had the core for up to" in said
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["results"][1] == json.loads(to_json(result))


def test_a_file_has_no_percentage_and_no_accuracy():
    (result,) = summarize([measured([[0.1]] * 3, macs=None, model="x.onnx")], MACHINE)
    assert (result.gmacs, result.percent_of_peak, result.top1) == (None, None, None)


def test_published_accuracy_stands_beside_a_model_at_its_own_size():
    (result,) = summarize([measured([[0.1]] * 3, model="shvit_s4", img_size=ImgSize(256, 256))], MACHINE)
    assert result.top1 == pytest.approx(79.362)


def test_noise_decides_nothing_and_one_outlier_is_harmless():
    quiet = [0.5 + 0.001 * i for i in range(15)]
    ratio, low, high = ratio_interval(quiet)
    assert ratio == pytest.approx(0.507)
    assert low < ratio < high
    assert high - low < 0.05 * ratio
    assert ratio_interval([*quiet[:-1], 40.0])[0] == pytest.approx(0.507)
    noisy, low, high = ratio_interval([0.7, 1.3] * 8)
    assert noisy is None
    assert (low, high) == (0.7, 1.3)
    assert ratio_interval([0.5, 0.51])[0] is None  # two rounds are too few for any interval


def test_interval_holds_the_true_median_19_times_in_20():
    generator = np.random.default_rng(0)
    within = 0
    for _ in range(200):
        _, low, high = ratio_interval(generator.lognormal(0.0, 0.02, 15).tolist())
        within += low <= 1 <= high
    assert within >= 185


@pytest.mark.parametrize("power", [0.5, 1.0, 1.3])
def test_exponent_is_that_of_a_power_law(power):
    values = [1, 2, 8, 64]
    assert exponent(values, [3 * value**power for value in values]) == pytest.approx(power)


# --- the worker -------------------------------------------------------------------------------------------------------


def talk(job: dict, *commands: dict) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-I", worker.__file__, json.dumps({"threads": 1, "cores": [], **job})],
        input="".join(json.dumps(command) + "\n" for command in commands),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("runner", ["onnx", "openvino"])
def test_worker_times_a_file_and_tells_its_memory(foreign, runner):
    job = {"runner": runner, "path": str(foreign), "provider": "cpu", "bf16": False, "batch_size": 1,
           "sessions": sessions.__file__}  # fmt: skip
    opened, first, turn = talk(job, {"batch": 1}, {"seconds": 0.05})
    assert opened["load"] > 0
    assert first["first"] > 0
    assert len(turn["wall"]) >= 2
    assert 0.02 < sum(turn["wall"]) < 1
    assert 2e7 < turn["peak"] < 4e8  # a runtime without PyTorch


@pytest.mark.parametrize("runner", ["onnx", "openvino"])
def test_worker_runs_images_that_are_given_one_by_one(foreign, tmp_path, runner):
    job = {"runner": runner, "path": str(foreign), "provider": "cpu", "bf16": False, "batch_size": 1,
           "sessions": sessions.__file__}  # fmt: skip
    batch = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    np.save(tmp_path / "images.npy", batch)
    _, done = talk(job, {"images": str(tmp_path / "images.npy"), "outputs": str(tmp_path)})
    session = onnxruntime.InferenceSession(str(foreign), providers=["CPUExecutionProvider"])
    expected = np.concatenate([session.run(None, {"pixels": image[None]})[0] for image in batch])
    np.testing.assert_allclose(np.load(tmp_path / "0.npy"), expected, rtol=1e-4, atol=1e-5)
    assert done["machine"] == platform.machine()
    assert len(done["hwcap"]) == 2


def test_a_turn_by_processor_time_goes_on_while_others_have_the_core():
    def spend() -> float:
        time.sleep(0.004)  # as if others had it
        end = time.process_time() + 0.001
        while time.process_time() < end:
            pass
        return 0.005

    wall = worker.time_calls(spend, 0.02, lambda call: call())
    processor = worker.time_calls(spend, 0.02, lambda call: call(), processor=True)
    assert len(wall["wall"]) <= 5
    assert 2 * len(wall["wall"]) < len(processor["wall"]) <= 20
    assert processor["cpu"] == pytest.approx(0.001, rel=0.5)


def test_worker_says_in_one_line_what_is_wrong(foreign, tmp_path):
    job = {"runner": "onnx", "path": str(foreign), "provider": "cpu", "sessions": sessions.__file__}
    assert talk(job, {"batch": 4})[-1] == {"error": "RuntimeError: the file takes batches of 1, not of 4"}
    (answer,) = talk({**job, "path": str(tmp_path / "none.onnx")})
    assert "none.onnx" in answer["error"]


# --- cases ------------------------------------------------------------------------------------------------------------


def test_reference_is_timms_own_model_and_gives_the_same_answers(tmp_path, settings):
    subject = BenchModel("shvit_s1", settings, tmp_path)
    model, spec = subject.opened
    assert type(create_timm_model("shvit_s1", model)).__module__ == "timm.models.shvit"
    proto = onnx.load(subject.reference(1))
    assert proto.opset_import[0].version == 11
    batch = torch.rand(1, *spec.shape)
    (found,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"image": batch.numpy()})
    with torch.no_grad():
        expected = model(batch)
    assert np.abs(found - expected.numpy()).max() < 1e-4 * expected.abs().max()
    assert subject.macs == pytest.approx(0.241e9 * 64**2 / 224**2, rel=0.2)


def test_files_of_others_are_read_as_far_as_needed(foreign, settings, tmp_path):
    found = create_file_case(foreign, 1, settings, [], tuned=False)
    assert (found.img_size, found.precision, found.runtime, found.environment) == ((32, 32), "fp32", "onnxruntime", {})
    with pytest.raises(InputError, match=r"takes batches of 1, not of 2; choose --batch-sizes 1"):
        create_file_case(foreign, 2, settings, [], tuned=False)
    with pytest.raises(InputError, match="no such file"):
        create_file_case(tmp_path / "none.onnx", 1, settings, [], tuned=False)
    with pytest.raises(InputError, match=r"unknown artifact '\.pt'"):
        create_file_case(tmp_path / "model.pt", 1, settings, [], tuned=False)
    (tmp_path / "torn.onnx").write_bytes(foreign.read_bytes()[:100])
    with pytest.raises(InputError, match=r"torn\.onnx"):
        create_file_case(tmp_path / "torn.onnx", 1, settings, [], tuned=False)


def test_what_does_not_run_here_is_refused_before_anything_is_measured(settings):
    with pytest.raises(InputError, match=r"unknown runtime 'tensorflow'; choose from torch, "):
        check_runtimes(["tensorflow"])
    if sys.platform != "darwin":
        with pytest.raises(InputError, match="coreml needs macOS"):
            check_runtimes(["coreml"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="needs a CUDA device"):
            check_runtimes(["cuda"])
    with pytest.raises(InputError, match="nothing to try; give at least one model"):
        run(["bench", "--models"])
    with pytest.raises(InputError, match="nothing to time"):
        run(["bench", "--batch-sizes"])
    with pytest.raises(InputError, match=r"--rounds 0 must be 1 or more"):
        run(["bench", "--rounds", "0"])
    with pytest.raises(InputError, match=r"--threads 1000 is more than the \d+ cores"):
        run(["bench", "--threads", "1000"])
    with pytest.raises(InputError, match="unknown model 'shvit_s9'"):
        run(["bench", "--models", "shvit_s9"])


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_bench_times_runtimes_against_a_strangers_file(tmp_path, foreign):
    options = ["--runtimes", "onnxruntime", "onnxruntime-int8", "openvino", "openvino-bf16", "openvino-int8"]
    options += ["--img-size", "64", "--rounds", "2", "--profile", "--output", str(tmp_path / "out")]
    result = run(["bench", "--models", "tiny_vit", *options, "--against", str(foreign)])
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == json.loads(to_json(result))
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "tiny_vit" in (tmp_path / "out" / "report.html").read_text()
    rows = {(each["model"], each["runtime"]): each for each in result["results"]}
    assert list(rows) == [("foreign.onnx", "onnxruntime"), *(("tiny_vit", name) for name in options[1:6])]
    here = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert rows["tiny_vit", "openvino-bf16"]["precision"] == ("bf16" if "BF16" in here else "fp32")
    assert {name for (_, name), each in rows.items() if each["precision"] == "int8"} == {options[2], options[5]}
    for each in rows.values():
        assert each["latency_ms_p50"] <= each["latency_ms_p90"] <= each["latency_ms_p99"]
    for name in options[1:6]:
        kinds = {each["kind"]: each["percent"] for each in result["layers"] if each["runtime"] == name}
        assert sum(kinds.values()) == pytest.approx(100)
        assert "1×1 convolution" in kinds
        assert kinds.get("other", 0) < 2


@pytest.mark.usefixtures("quick")
def test_bench_times_pytorch_and_exported_files(mine):
    options = ["--runtimes", "torch-bf16", "--img-size", "64", "--rounds", "1"]
    result = run(["bench", "--models", str(mine), "shvit_s1", *options])
    assert [(each["model"], each["precision"]) for each in result["results"]] == [
        ("mine.onnx", "fp32"),
        ("shvit_s1", "bf16"),
    ]
    assert result["results"][1]["ratio_to_first"] is None  # one round decides nothing


@pytest.mark.usefixtures("quick")
def test_a_model_that_one_format_cannot_hold_is_timed_in_the_others(capsys, tmp_path):
    options = ["--runtimes", "ncnn", "onnxruntime", "--rounds", "1", "--profile", "--output", str(tmp_path)]
    result = run(["bench", "--models", "test_vit", *options])
    assert [(each["model"], each["runtime"]) for each in result["results"]] == [("test_vit", "onnxruntime")]
    assert {each["runtime"] for each in result["layers"]} == {"onnxruntime"}
    (left_out,) = read_measurements(tmp_path / "bench.json").left_out
    assert (left_out.model, left_out.runtime) == ("test_vit", "ncnn")
    said = " ".join(capsys.readouterr().out.split())
    assert "test_vit was left out of ncnn: test_vit has operations that ncnn lacks: Tensor.reshape" in said
    with pytest.raises(InputError, match="test_vit has operations that ncnn lacks"):
        run(["bench", "--models", "test_vit", "--runtimes", "ncnn", "--rounds", "1"])


@pytest.mark.usefixtures("quick")
def test_sweep_fits_time_and_memory(monkeypatch, tmp_path):
    monkeypatch.setattr("shvit.export.bench.measure.SWEEP_SIDES", (32, 64))
    monkeypatch.setattr("shvit.export.bench.measure.SWEEP_BATCHES", (1, 4))
    options = ["--runtimes", "onnxruntime", "--img-size", "64", "--rounds", "1", "--sweep"]
    by_pixels, by_batch = run(["bench", "--models", SMALL, *options])["scaling"]
    assert (by_pixels["over"], by_pixels["values"]) == ("pixels", (1024, 4096))
    assert (by_batch["over"], by_batch["values"]) == ("batch_size", (1, 4))
    assert all(value > 0 for each in (by_pixels, by_batch) for value in each["latency_ms"] + each["peak_memory_mb"])


def test_kinds_of_layers_by_operators_and_weights():
    assert convolution_kind((32, 3, 3, 3)) == "k×k convolution"
    assert convolution_kind((32, 16, 1, 1)) == "1×1 convolution"
    assert convolution_kind((32, 1, 3, 3)) == "depthwise convolution"
    names = {"FusedMatMul": "attention", "LayerNormalization": "normalization", "ReorderInput": "reordering"}
    assert {name: layer_kind(name) for name in names} == names
    assert layer_kind("NonMaxSuppression") == "other"


def test_pytorchs_profile_knows_convolutions(settings, tmp_path):
    rows = measure_layers(BenchModel("tiny_vit", settings, tmp_path), "torch", 1)
    kinds = {row.kind for row in rows}
    assert {"1×1 convolution", "k×k convolution", "depthwise convolution", "attention"} <= kinds
    assert sum(row.percent for row in rows) == pytest.approx(100)


# --- the machine and the records --------------------------------------------------------------------------------------


def test_machine_is_measured(quick_machine):
    peaks = measure_peaks()
    assert {"fp32"} <= set(peaks) <= {"fp32", "bf16", "int8"}  # those that the processor has instructions for
    assert min(peaks.values()) == peaks["fp32"]
    assert all(0.1 < peak < 1e5 for peak in peaks.values())
    assert 0.1 < measure_bandwidth() < 1e4


def test_records_are_read_back_and_others_refused(tmp_path):
    (result,) = summarize([measured([[0.1]] * 3)], MACHINE)
    measurements = Measurements(MACHINE, (result,))
    told = json.loads(to_json(asdict(measurements)))
    assert parse_measurements(told) == measurements
    for name in ("ratio_basis", "preempted_percent"):  # of files that were written before there was any
        del told["results"][0][name]
    del told["machine"]["environment"]
    assert parse_measurements(told).results[0].ratio_basis == "wall time"
    for name, text in (
        ("torn", '{"machine": {'),
        ("list", "[]"),
        ("other", '{"machine": {"cores": 1}, "results": []}'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=r"holds no measurements|not readable as JSON"):
            read_measurements(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read_measurements(tmp_path / "none")
    assert isinstance(result, BenchResult)


def test_random_weights_are_always_the_same_and_have_no_zero_branch():
    first, _ = open_model("shvit_s1")
    second, _ = open_model("shvit_s1")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any((p == 0).all() for name, p in first.named_parameters() if name.endswith("bn.weight"))


def test_worker_is_a_script_that_needs_nothing_of_the_project_for_files():
    imports = [line.split()[1] for line in Path(worker.__file__).read_text().splitlines() if line.startswith("from")]
    assert not any(name.startswith((".", "shvit")) for name in imports)
