"""Certificates, measurements, and what checkpoints say and hold: read strictly, with one line for all else."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from shvit import cli
from shvit.certificate import certificate_path, check_unchanged, read_origin
from shvit.checkpoint import MAX_VALUE, read_checkpoint
from shvit.errors import InputError
from shvit.export.bench.records import read_measurements, write_measurements
from shvit.export.browser.phone_record import read_record, read_record_file
from shvit.export.labels import find_labels
from shvit.weights.run_info import RUN_KEY, read_run_info
from tests.conftest import create_tiny
from tests.export.bench.test_explorer import PHONES
from tests.export.browser.serving import CASE, RECORD

from .artifacts import class_folders, write_onnx

DEEP = "[" * 40_000
CERTIFICATE = {"format_version": 1, "artifact": "m.onnx", "artifact_sha256": "0" * 64, "model": "shvit_s1", "more": [1]}


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        '{"a":' * 40_000,
        "[]",
        "",
        "\xff",
        json.dumps({**CERTIFICATE, "model": 5}),
        json.dumps({**CERTIFICATE, "artifact_sha256": None}),
        json.dumps({**CERTIFICATE, "ema": "yes"}),
        json.dumps({**CERTIFICATE, "data": [1]}),
        json.dumps({**CERTIFICATE, "accuracy": math.nan}),
        json.dumps(CERTIFICATE)[:-1] + ', "model": "other"}',
        json.dumps({**CERTIFICATE, "n": 1})[:-2] + "1" * 5000 + "}",
    ],
    ids=range(12),
)
def test_a_certificate_that_is_none_is_refused(tmp_path, text):
    path = write_onnx(tmp_path / "m.onnx")
    certificate_path(path).write_bytes(text.encode("latin-1"))
    for read in (read_origin, lambda path: check_unchanged(path, "0" * 64)):
        with pytest.raises(InputError, match="not a readable certificate") as error:
            read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="not a readable certificate"):
        cli.run(["verify", str(path), "--model", "tiny_vit"])


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_a_certificate_is_a_file(tmp_path, kind):
    path = write_onnx(tmp_path / "m.onnx")
    (os.mkfifo if kind == "fifo" else os.mkdir)(certificate_path(path))
    with pytest.raises(InputError):
        read_origin(path)


def test_a_certificate_is_read(tmp_path):
    path = write_onnx(tmp_path / "m.onnx")
    certificate_path(path).write_text(json.dumps(CERTIFICATE))
    assert read_origin(path).model == "shvit_s1"
    certificate_path(path).write_text(json.dumps({**CERTIFICATE, "model": None}))
    check_unchanged(path, "0" * 64)  # as a detector's, which does not name it


# --- measurements -----------------------------------------------------------------------------------------------------

ROW = {"model": "m", "runtime": "r", "precision": "fp32"}
SCALING = {"model": "m", "runtime": "r", "over": "pixels", "values": [4, 9], "latency_ms": [1, 2],
           "peak_memory_mb": [1, 2], "exponent": 1, "memory_exponent": 1}  # fmt: skip


@pytest.fixture
def measured(tmp_path):
    """The content of a bench.json, and a function that writes one."""
    known = [each for each in PHONES.checks if each.snr_db is None or math.isfinite(each.snr_db)]
    write_measurements(replace(PHONES, checks=tuple(known)), tmp_path / "bench.json")
    return json.loads((tmp_path / "bench.json").read_text())


def test_measurements_are_read(measured, tmp_path):
    assert len(read_measurements(tmp_path / "bench.json").results) == len(measured["results"])


CHANGES = {
    "huge": ("results", {"latency_ms_p50": 10**400}),
    "infinite": ("results", {"latency_ms_p50": math.inf}),
    "nan": ("results", {"latency_ms_p50": math.nan}),
    "large": ("results", {"latency_ms_p50": 1e300}),
    "negative": ("results", {"latency_ms_p50": -1.0}),
    "text": ("results", {"latency_ms_p50": "1"}),
    "true": ("results", {"threads": True}),
    "control": ("results", {"model": "\x1b[2J"}),
    "line": ("results", {"runtime": "a\nshvit bench: all is well"}),
    "no size": ("results", {"img_size": 0}),
    "three sides": ("results", {"img_size": [1, 2, 3]}),
    "side of text": ("results", {"img_size": ["a", 1]}),
    "large size": ("results", {"img_size": [64, 10**30]}),
    "unknown field": ("results", {"evil": 1}),
    "unknown device": ("checks", {"device": "x"}),
    "device of sustained": ("sustained", {"device": "x"}),
    "not sustained": ("sustained", {"latency_ms": []}),
}
WHOLE = {
    "empty sweep": {"scaling": [{**SCALING, "values": [], "latency_ms": [], "peak_memory_mb": []}]},
    "uneven sweep": {"scaling": [{**SCALING, "latency_ms": [1]}]},
    "sweep of nothing": {"scaling": [{**SCALING, "values": [0, 0]}]},
    "no machine": {"machine": None},
    "results of another kind": {"results": {}},
    "no results": {"results": None},
}


@pytest.mark.parametrize("case", [*CHANGES, *WHOLE])
def test_measurements_that_are_none_are_refused(measured, tmp_path, case):
    if case in CHANGES:
        place, change = CHANGES[case]
        measured[place][0] |= change
    else:
        measured |= WHOLE[case]
    (tmp_path / "bad.json").write_text(json.dumps(measured))
    (tmp_path / "record.json").write_text(json.dumps({**RECORD, "cases": [CASE]}))
    words = ["bench", "import", tmp_path / "record.json", "--beside", tmp_path / "bad.json", "--output", tmp_path / "r"]
    with pytest.raises(InputError, match=r"bad\.json: ") as error:
        cli.run([str(word) for word in words])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("text", [DEEP, "", "null", "{", '{"machine": null, "machine": null, "results": []}'])
def test_a_bench_json_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(InputError):
        read_measurements(tmp_path / "bench.json")


def test_a_record_of_a_phone_is_read_by_the_same_rules(tmp_path):
    for text in (DEEP, json.dumps(RECORD)[:-1] + ', "format": "shvit-phone-1"}', '{"format": NaN}'):
        with pytest.raises(InputError, match="not a record"):
            read_record(text.encode())
    os.mkfifo(tmp_path / "record.json")
    with pytest.raises(InputError, match="is a FIFO"):
        read_record_file(tmp_path / "record.json")


def test_labels_are_a_file(tmp_path):
    os.mkfifo(tmp_path / "labels.txt")
    with pytest.raises(InputError, match="is a FIFO"):
        find_labels(tmp_path / "labels.txt", 2)
    with pytest.raises(InputError, match="cannot be read"):
        find_labels(tmp_path / ("a" * 300), 2)


# --- checkpoints ------------------------------------------------------------------------------------------------------

VALUES = {
    "negative variance": ("running_var", -1.0, "negative variances"),
    "slightly negative variance": ("running_var", -1e-9, "negative variances"),
    "largest weights": ("weight", 3e38, "do not fit float32"),
    "large bias": ("bias", -1e30, "do not fit float32"),
    "large variance": ("running_var", 3e38, "do not fit float32"),
    "nan": ("weight", math.nan, "NaN or infinite"),
    "infinite": ("running_mean", -math.inf, "NaN or infinite"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_of_no_training_run_are_refused(tmp_path, case):
    ending, value, said = VALUES[case]
    state = create_tiny(num_classes=2).state_dict()
    [tensor.fill_(value) for name, tensor in state.items() if name.endswith(ending)]
    save_file(state, tmp_path / "ck.safetensors")
    data = class_folders(tmp_path / "d")
    words = ["eval", "--model", "tiny_vit", "--checkpoint", tmp_path / "ck.safetensors", "--data", data]
    with pytest.raises(InputError, match=said):
        cli.run([*map(str, words), "--img-size", "64"])


def test_values_that_training_gives_are_read(tmp_path):
    state = create_tiny(num_classes=2).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.fill_(0.0)
        if name.endswith("running_mean"):
            tensor.fill_(1e6)
    state = {name: tensor.half() if name.endswith("bias") else tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "ck.safetensors")
    assert torch.isfinite(read_checkpoint(tmp_path / "ck.safetensors").state_dict["head.l.weight"]).all()
    assert torch.finfo(torch.float16).max < MAX_VALUE


@pytest.mark.parametrize(
    "said",
    [
        DEEP,
        '{"format": 1, "model": "shvit_s1", "classes": [], "img_size": "64x"}',
        '{"format": 1, "model": "shvit_s1", "classes": [], "img_size": 64, "crop_pct": Infinity}',
        '{"format": 1, "model": "shvit_s1", "classes": [], "img_size": 64, "img_size": 65}',
        '{"format": 1, "model": "shvit_s1", "classes": [], "img_size": ' + "1" * 5000 + "}",
        '{"format": 1, "model": "shvit_s1", "classes": ["\\u001b[2J"], "img_size": 64}',
        "5",
    ],
    ids=range(7),
)
def test_what_a_checkpoint_says_of_its_run_is_read_strictly(tmp_path, said):
    path = tmp_path / "ck.safetensors"
    save_file(create_tiny(num_classes=2).state_dict(), path, {"format": "pt", RUN_KEY: said})
    with pytest.raises(InputError) as error:
        read_run_info(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "beside"), [("best.safetensors", "recipe.yaml"), ("model.safetensors", "config.json")]
)
@pytest.mark.parametrize("text", [DEEP, "a: &a [*a]\n", "a: 1\na: 2\n", "fifo"])
def test_files_beside_a_checkpoint_are_read_strictly(tmp_path, name, beside, text):
    save_file(create_tiny(num_classes=2).state_dict(), tmp_path / name)
    if text == "fifo":
        os.mkfifo(tmp_path / beside)
    else:
        (tmp_path / beside).write_text(text)
    with pytest.raises(InputError):
        read_run_info(tmp_path / name)
