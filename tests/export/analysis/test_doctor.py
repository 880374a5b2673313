"""What `shvit doctor` tells of a machine, on which something may be missing or broken."""

import importlib.metadata
import json
import re
import sys

import pytest
import torch

from shvit import cli
from shvit.export.analysis import doctor
from shvit.export.analysis.doctor import describe_machine, missing_packages, try_runtimes
from shvit.export.arm64 import emulator
from shvit.export.backends.registry import BACKENDS

LOCAL = ("torch", "torch.compile", *(f"{backend.title} files" for backend in BACKENDS.values()))


def test_each_runtime_is_tried_and_the_last_line_is_json(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shvit", "doctor"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    trials = {each["runtime"]: each for each in result["runtimes"]}
    assert set(trials) == set(doctor.RUNTIMES)
    for name in LOCAL:
        assert trials[name]["works"], trials[name]
        assert 0 <= trials[name]["error"] < doctor.MAX_ERROR
    for name in set(trials) - set(LOCAL):
        assert trials[name]["works"] or trials[name]["reason"]
    assert trials["torch on CUDA"]["works"] == torch.cuda.is_available()
    assert trials["Core ML of macOS"]["works"] == (sys.platform == "darwin")
    assert result["versions"]["torch"] == importlib.metadata.version("torch")
    assert result["extras"]["export"] == []
    assert f"ARM64: {result['arm64']}" in printed.replace("\n", " ")
    assert all(name in printed for name in trials)


def test_missing_qemu_is_said_in_a_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert re.fullmatch(r"--arm64 needs .*", doctor.describe_emulator())


def test_a_missing_compiler_for_arm64_is_said_of_the_format_that_needs_it(monkeypatch, tmp_path):
    monkeypatch.setenv("SHVIT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(emulator, "check_emulator", lambda: None)
    monkeypatch.setattr(doctor, "check_emulator", lambda: None)
    monkeypatch.setattr(doctor, "qemu_version", lambda: "7.2")
    said = doctor.describe_emulator()
    assert re.fullmatch(
        r"files can be verified .*; those of ExecuTorch not yet: --arm64 needs aarch64[^;]*; [^;]*", said
    )


def fail(error):
    def run(tiny):
        raise error

    return run


def test_a_runtime_that_is_missing_broken_or_wrong_is_one_line(monkeypatch):
    missing = ModuleNotFoundError("No module named 'openvino'", name="openvino")
    broken = ImportError("libonnx.so: cannot open shared object file\nmore")
    monkeypatch.setattr(
        doctor,
        "RUNTIMES",
        {
            "OpenVINO files": fail(missing),
            "ONNX files": fail(broken),
            "torch.compile": fail(RuntimeError("")),
            "wrong": lambda tiny: tiny.model(tiny.batch) + 1,
            "nan": lambda tiny: tiny.model(tiny.batch) * torch.nan,
            "torch": lambda tiny: tiny.model(tiny.batch),
        },
    )
    *failed, works = try_runtimes()
    reasons = {each.runtime: each.reason for each in failed}
    assert not any(each.works for each in failed)
    assert not any("\n" in reason for reason in reasons.values())
    assert "pip install 'shvit[openvino]'" in reasons["OpenVINO files"]
    assert reasons["ONNX files"] == "libonnx.so: cannot open shared object file; pip install 'shvit[export]'"
    assert reasons["torch.compile"] == "RuntimeError; install a C++ compiler (g++ or clang)"
    assert "outputs differ" in reasons["wrong"]
    assert "outputs differ" in reasons["nan"]
    assert (works.works, works.error, works.reason) == (True, 0.0, "")


def test_an_extra_whose_package_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"onnx": ("export", "demo"), "no_such_package": ("demo",)})
    assert missing_packages() == {"demo": ["no_such_package"], "export": []}


def test_the_machine_is_described():
    machine = describe_machine()
    assert set(machine) == {"processor", "cores", "memory", "instructions", "system", "GPU"}
    assert all(machine.values())
