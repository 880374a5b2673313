"""The whole line on a few images, and its page."""

import re

import numpy as np
import pytest
from PIL import Image

from shvit.cli import run
from shvit.export.bench.records import read_measurements
from shvit.export.demo.report import Prediction, Section, gallery, table, write_page
from tests.conftest import SMALL


def test_demo_runs_the_whole_line_on_the_users_images(tmp_path, monkeypatch, tiny_demo):
    rng = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "<blue>")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(45):
            pixels = rng.integers(0, 80, (40, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    out = tmp_path / "out"
    monkeypatch.setattr("shvit.export.demo.run.TIMED", (SMALL,))
    monkeypatch.setattr("shvit.export.demo.run.FORMATS", ("onnx", "coreml", "ncnn"))  # the quickest to write
    monkeypatch.setattr("shvit.export.bench.measure.ROUND_S", 0.0)  # no time that is measured means anything
    result = run(["demo", "--output", str(out), "--data", str(tmp_path / "data"), "--epochs", "1"])
    assert result["top1"] == pytest.approx(result["top1_onnx"], abs=0.5)
    assert result["certificate"]["passed"] is not False  # after one epoch outputs hardly differ between the images
    assert set(result["seconds"]) == {"train", "export to ONNX", "export to Core ML", "export to ncnn", "time"}
    names = {path.name for path in out.iterdir()}
    assert {
        "train",
        "model.onnx",
        "model.onnx.certificate.json",
        "model.mlpackage",
        "bench",
        "report.html",
    } <= names
    timed = {(each.model, each.runtime) for each in read_measurements(out / "bench" / "bench.json").results}
    files = {("model.onnx", "onnxruntime"), ("model.ncnn.param", "ncnn")}
    assert timed == {(SMALL, "torch"), (SMALL, "onnxruntime"), *files}
    assert (out / "bench" / "report.html").exists()
    page = (out / "report.html").read_text()
    assert "<th>figure</th><th>ONNX</th><th>Core ML</th><th>ncnn</th>" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)  # nothing is fetched
    assert page.count("data:image/jpeg") >= 10
    assert "&lt;blue&gt;" in page
    assert "<blue>" not in page
    assert f"{result['top1']:.2f} %" in page


def test_page_marks_mistakes_and_escapes_what_others_wrote(tmp_path):
    image = Image.new("RGB", (300, 200))
    shown = gallery([Prediction(image, "cat", "cat", 0.9), Prediction(image, "<b>", "dog", 0.6)])
    assert shown.count('class="right"') == 1
    assert shown.count('class="wrong"') == 1
    assert "dog 60 %, is &lt;b&gt;" in shown
    write_page(tmp_path / "page.html", "T & U", "lead", [Section("S", "text", table(("a",), [("<x>",)]))], "foot")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>T &amp; U</title>" in page
    assert "<td>&lt;x&gt;</td>" in page
