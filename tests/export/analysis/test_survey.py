"""A survey of models and formats: real files, refused ones, models that cannot be written, and processes that end."""

import os
import re
import time
from dataclasses import replace

import pytest
import timm

from shvit.errors import InputError
from shvit.export.analysis import survey as module
from shvit.export.analysis.survey import Outcome, markdown, survey
from shvit.export.main import ExportSurvey


def _end(connection, *_):
    os._exit(3)


def _sleep(connection, *_):
    time.sleep(60)


def test_models_are_written_judged_and_not_tried_again(tmp_path):
    lines = []
    outcomes = survey(tmp_path, ["test_efficientnet", "nothing_like_it"], ["onnx"], "fp32", None, lines.append)
    sound, unknown = outcomes["test_efficientnet"]["onnx"], outcomes["nothing_like_it"]["onnx"]
    assert sound.passed is not False
    assert sound.snr_db > 60
    assert unknown.passed is False
    assert unknown.snr_db is None
    assert "nothing_like_it" in unknown.reason
    assert len(lines) == 2
    again = survey(tmp_path, ["test_efficientnet"], ["onnx"], "fp32", None, lines.append)
    assert again == outcomes
    assert len(lines) == 2
    text = (tmp_path / "survey.md").read_text()
    assert f"| `test_efficientnet` | {sound.snr_db:.0f} dB" in text
    assert "| no file |" in text
    assert "- `nothing_like_it`, ONNX: unknown model" in text


@pytest.mark.parametrize(
    ("what", "reason"), [(_end, r"ends the process \(status 3\)"), (_sleep, "does not end in 2 s")]
)
def test_a_process_that_ends_or_does_not_is_an_outcome(monkeypatch, what, reason):
    monkeypatch.setattr(module, "MAX_SECONDS", 2)
    outcome = module._in_own_process(what, "onnx", "test_vit", "fp32", None)
    assert outcome.passed is False
    assert re.search(reason, outcome.reason)


def test_models_have_no_outputs_of_zeros():
    assert timm.create_model("mixer_s32_224").head.weight.any().item() is False
    model = module._settled("mixer_s32_224", None)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].mlp_tokens.fc1.weight.any()


def test_table_marks_what_a_loose_check_accepts():
    wrong = Outcome(False, 12.5, 0.957, "SNR 12.5 dB is below 60 dB | and more")
    table = markdown(
        {"m": {"ncnn": wrong, "onnx": Outcome(True, 111.2, 1.0)}, "n": {"ncnn": replace(wrong, cosine=0.5)}}
    )
    assert "| `m` | **refused**, cosine 0.957 | 111 dB |" in table
    assert "| `n` | **refused** |  |" in table
    assert (
        "3 files were asked for: 1 hold; 2 refused, 1 of them with a cosine of 0.9 or more on every image; 0" in table
    )
    assert "- `m`, ncnn: SNR 12.5 dB is below 60 dB | and more" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["onyx"]}, "unknown format 'onyx'"),
        ({"precision": "int8"}, "ONNX is not tried in int8"),
        ({"models": ["test_vit"]}, "holds survey.json, which no earlier run"),
    ],
)
def test_options_that_contradict_are_one_line(tmp_path, options, message):
    (tmp_path / "survey.json").write_text("{}")
    if "models" not in options:
        (tmp_path / "survey.json").unlink()
    with pytest.raises(InputError, match=message):
        ExportSurvey(output=tmp_path, **options).run()
