"""What the benchmark does, not how fast anything is."""

import json

import pytest
import timm
import torch

from shvit.cli import run
from shvit.export.bench import Case, run_rounds, summarize
from shvit.export.info import describe_layers
from shvit.export.spec import open_model


def test_cases_take_turns_and_the_order_is_reversed_every_other_round(monkeypatch):
    monkeypatch.setattr("shvit.export.bench.MIN_TURN_S", 0)
    calls: list[str] = []
    cases = [Case(name, "torch", 8, 1, lambda name=name: calls.append(name)) for name in "abc"]
    seconds = run_rounds(cases, rounds=4)
    assert "".join(calls) == "aabbcc" + "abc" + "cba" + "abc" + "cba"
    assert [len(times) for times in seconds] == [4, 4, 4]


def test_summary_divides_by_the_batch_and_takes_ratios_round_by_round():
    cases = [Case("a", "torch", 8, 2, print), Case("b", "torch", 8, 2, print)]
    first, second = summarize(cases, [[0.2, 0.4, 0.6], [0.4, 0.4, 1.8]], threads=1)
    assert first.latency_ms_p50 == pytest.approx(200)
    assert first.latency_ms_p10 == pytest.approx(120)
    assert first.images_per_s == pytest.approx(5)
    assert second.ratio_to_first == pytest.approx(2)


def test_bench_command_times_models_and_artefacts_and_draws_them(tmp_path):
    artefact = tmp_path / "s1.onnx"
    run(["export", "onnx", "--model", "shvit_s1", "--img-size", "64", "--output", str(artefact)])
    options = ["--runtimes", "torch", "--batch-sizes", "1", "2", "--img-size", "64", "--rounds", "2"]
    result = run(["bench", "--models", "shvit_s1", str(artefact), *options, "--output", str(tmp_path)])
    found = {(item["model"], item["runtime"], item["batch_size"]) for item in result["results"]}
    assert found == {(n, r, b) for n, r in (("shvit_s1", "torch"), ("s1.onnx", "onnxruntime")) for b in (1, 2)}
    assert json.loads((tmp_path / "bench.json").read_text()) == result["results"]
    assert all(item["latency_ms_p10"] <= item["latency_ms_p50"] <= item["latency_ms_p90"] for item in result["results"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "gmacs"), [("shvit_s1", 0.241), ("shvit_s4", 0.986)])
def test_layers_add_up_to_the_published_counts(name, gmacs):
    """MACs: the paper's table; parameters: PyTorch's count."""
    model, spec = open_model(name)
    rows = describe_layers(model, spec)
    assert sum(row.macs for row in rows) / 1e9 == pytest.approx(gmacs, abs=6e-4)
    assert sum(row.params for row in rows) == sum(p.numel() for p in model.parameters())
    assert [row.tokens for row in rows if row.kind == "attention"] == ([49, 16] if name == "shvit_s1" else [64, 16])


def test_info_of_a_peer_counts_every_parameter():
    model = timm.create_model("mobilenetv4_conv_small")
    result = run(["info", "mobilenetv4_conv_small"])
    assert result["params"] == sum(p.numel() for p in model.parameters())
    assert sum(row["params"] for row in result["layers"]) == result["params"]


def test_random_weights_are_always_the_same_and_have_no_zero_branch():
    first, _ = open_model("shvit_s1")
    second, _ = open_model("shvit_s1")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any((p == 0).all() for name, p in first.named_parameters() if name.endswith("bn.weight"))
