"""Predictions of multi-label models and regressions against PyTorch's own, in every output."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from PIL import Image
from torch import nn

from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.errors import InputError
from shvit.export import Predictor
from shvit.export.predict.cluster import Part, divide, predict_part
from shvit.export.predict.inputs import find_inputs
from shvit.export.predict.job import Job
from shvit.export.predict.loading import BEGINNING
from shvit.export.predict.outputs import write_parquet
from shvit.export.predict.show import _predictions, prediction_table
from shvit.export.spec import Spec
from shvit.weights.run_info import RunInfo, Task
from tests.task_models import INFOS, LABELS, PX, THRESHOLDS, VALUE, draw_labeled, train_for

TASKS: tuple[Task, ...] = ("multi_label", "regression")


def predict(*words: object) -> dict:
    return run(["predict", *map(str, words)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("tasks")
    draw_labeled(folder / "images", 14, seed=2)
    (folder / "images" / "bad.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def models(folder) -> dict[Task, nn.Module]:
    """The model of each task, whose checkpoint has the task's name."""
    return {task: train_for(task, folder / f"train-{task}", folder / f"{task}.safetensors") for task in TASKS}


@pytest.fixture(scope="module")
def outputs(folder, models) -> dict[Task, dict[str, torch.Tensor]]:
    """What PyTorch gives for each image, by its path."""
    found: dict[Task, dict[str, torch.Tensor]] = {}
    for task, model in models.items():
        transform = Spec.of("", model, PX, INFOS[task]).transform()
        with torch.no_grad():
            found[task] = {str(path): model(transform(Image.open(path))[None])[0].double()
                           for path in sorted((folder / "images").glob("0*.png"))}  # fmt: skip
    return found


@pytest.fixture(scope="module")
def written(folder, models) -> dict[Task, list[dict]]:
    """The records of both, of their checkpoints."""
    for task in TASKS:
        predict(folder / "images", "--checkpoint", folder / f"{task}.safetensors", "--output", folder / f"{task}.jsonl")
    return {task: lines(folder / f"{task}.jsonl") for task in TASKS}


def expected_labels(logits: torch.Tensor) -> dict[str, float]:
    """Labels and their probabilities, the most probable first."""
    likely = {name: p for name, p, t in zip(LABELS, logits.sigmoid().tolist(), THRESHOLDS, strict=True) if p >= t}
    return dict(sorted(likely.items(), key=lambda each: -each[1]))


def test_labels_are_those_that_reach_their_thresholds(written, outputs):
    *good, bad = written["multi_label"]
    expected = [expected_labels(each) for each in outputs["multi_label"].values()]
    assert [record["labels"] for record in good] == [[*each] for each in expected]
    for record, each in zip(good, expected, strict=True):
        np.testing.assert_allclose(record["probabilities"], [*each.values()], rtol=1e-4)
    assert {len(each) for each in expected} >= {0, 1, 2}
    assert bad.keys() == {"path", "error"}
    firsts = {record["labels"].index("dog") for record in good if "dog" in record["labels"]}
    assert len(firsts) > 1  # else any order would do


def test_values_are_those_of_the_model(written, outputs):
    *good, bad = written["regression"]
    assert all(record.keys() == {"path", "value"} for record in good)
    for record in good:
        assert record["value"] == pytest.approx(outputs["regression"][record["path"]].item(), rel=1e-6)
    assert bad.keys() == {"path", "error"}


def test_csv_and_parquet_say_the_same(folder, written, tmp_path):
    for task, names in (("multi_label", ["labels", "probabilities"]), ("regression", ["value"])):
        for suffix in ("csv", "parquet"):
            predict(folder / "images", "--checkpoint", folder / f"{task}.safetensors", "--output",
                    tmp_path / f"{task}.{suffix}")  # fmt: skip
        with (tmp_path / f"{task}.csv").open(newline="") as file:
            rows = [*csv.DictReader(file)]
        table = pandas.read_parquet(tmp_path / f"{task}.parquet")
        assert list(rows[0]) == list(table) == ["path", *names, "error"]
        *good, bad = zip(written[task], rows, table.to_dict("records"), strict=True)
        for record, row, entry in good:
            assert row["path"] == entry["path"] == record["path"]
            assert row["error"] == ""
            assert pandas.isna(entry["error"])
            if task == "regression":
                assert float(row["value"]) == record["value"]
                assert np.float32(entry["value"]) == np.float32(record["value"])
            else:
                assert [each for each in row["labels"].split("|") if each] == record["labels"] == list(entry["labels"])
                assert [float(p) for p in row["probabilities"].split("|") if p] == record["probabilities"]
                assert entry["probabilities"].tolist() == np.float32(record["probabilities"]).tolist()
        assert [bad[1][name] for name in names] == [""] * len(names)
        assert all(pandas.isna(bad[2][name]) for name in names)
        assert bad[1]["error"] == bad[2]["error"] == bad[0]["error"]


def test_the_most_probable_of_all_labels_may_be_asked_for(folder, outputs, tmp_path):
    for suffix in ("jsonl", "csv"):
        predict(folder / "images", "--checkpoint", folder / "multi_label.safetensors", "--top", 2, "--output",
                tmp_path / f"p.{suffix}")  # fmt: skip
    for record, logits in zip(lines(tmp_path / "p.jsonl")[:-1], outputs["multi_label"].values(), strict=True):
        expected = logits.sigmoid().sort(descending=True)
        assert record["labels"] == [LABELS[index] for index in expected.indices[:2]]
        np.testing.assert_allclose(record["probabilities"], expected.values[:2], rtol=1e-4)
    header = (tmp_path / "p.csv").read_text().splitlines()[0]
    assert header == "path,label_1,probability_1,label_2,probability_2,error"


@pytest.mark.parametrize("task", TASKS)
def test_an_exported_file_predicts_as_its_checkpoint_does(folder, written, tmp_path, task):
    artifact = tmp_path / "m.onnx"
    run(["export", "onnx", "--checkpoint", f"{folder}/{task}.safetensors", "--raw-pixels", "--output", str(artifact)])
    predict(folder / "images", "--artifact", artifact, "--output", tmp_path / "p.jsonl")
    for record, expected in zip(lines(tmp_path / "p.jsonl"), written[task], strict=True):
        assert record.keys() == expected.keys()
        assert record.get("labels") == expected.get("labels")
        for name in ("probabilities", "value"):
            if name in expected:
                np.testing.assert_allclose(record[name], expected[name], rtol=1e-4)


def test_terminal_and_sheet_show_labels_and_values(folder, written, tmp_path, capsys):
    for task, words in (("multi_label", ["no label", *LABELS]), ("regression", [VALUE])):
        result = predict(folder / "images", "--checkpoint", folder / f"{task}.safetensors", "--draw",
                         tmp_path / f"{task}.png")  # fmt: skip
        assert result["predictions"] == written[task]
        shown = capsys.readouterr().out
        assert all(word in shown for word in [*words, "cannot be read"])
        assert Image.open(tmp_path / f"{task}.png").size[0] > 800
    assert "19" in shown
    many = {"path": "a.png", "labels": ["a", "b", "c", "d"], "probabilities": [0.9, 0.8, 0.7, 0.6]}
    assert _predictions(many, "labels", LABELS) == ["a 90 %", "b 80 %", "and 2 more"]
    assert _predictions({**many, "labels": [], "probabilities": []}, "labels", LABELS) == ["no label"]
    assert _predictions({"path": "a.png", "value": 1234567.0}, "value", (VALUE,)) == ["year 1234567"]
    assert _predictions({"path": "a.png", "value": -0.0123456}, "value", (VALUE,)) == ["year -0.012346"]
    assert prediction_table([], "value", (VALUE,)).columns[1].header == VALUE


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_batches_have_the_same_predictions(folder, written, task):
    predictor = Predictor(checkpoint=folder / f"{task}.safetensors")
    paths = [record["path"] for record in written[task]]
    names = ["value"] if task == "regression" else ["labels", "probabilities"]
    found = predictor({"path": paths})
    assert list(found) == ["path", *names, "error"]
    for name in names:
        assert found[name] == [record.get(name) for record in written[task]]
    tables = [predictor(pyarrow.table({"path": pyarrow.array(each, pyarrow.string())})) for each in (paths, [])]
    assert tables[0].schema == tables[1].schema
    assert tables[0].column_names == ["path", *names, "error"]
    dataset = datasets.Dataset.from_dict({"path": paths})
    mapped = dataset.map(predictor, batched=True, batch_size=2, features=predictor.output_features(dataset.features))
    assert mapped.column_names == ["path", *names, "error"]
    assert [each is None for each in mapped[names[0]]] == [False] * 14 + [True]


@pytest.mark.parametrize("task", TASKS)
def test_parts_of_a_job_have_the_same_predictions(folder, written, tmp_path, task):
    """As a worker of Ray predicts them, and a folder of Parquet files holds them."""
    predictor, inputs = (
        Predictor(checkpoint=folder / f"{task}.safetensors"),
        find_inputs([str(folder / "images")], 1, str),
    )
    job = Job(predictor.open(), inputs, 0, 4, 0)
    records, parts = [], list(divide(inputs, BEGINNING, 8))
    for part in parts:
        predicted = predict_part(predictor, part, job.top, 4, str(Path.cwd()))
        write_parquet(Part(predicted, 0), tmp_path / f"{len(records)}.parquet", job.columns)
        records += predicted.records
    assert (len(parts), records) == (2, written[task])
    values = pandas.read_parquet(tmp_path)["value" if task == "regression" else "labels"]
    assert [each is None or (task == "regression" and np.isnan(each)) for each in values] == [False] * 14 + [True]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_top_of_a_value_is_one_line(folder, models):
    with pytest.raises(InputError, match="--top does not apply: the model predicts a value") as refused:
        predict(folder / "images", "--checkpoint", folder / "regression.safetensors", "--top", 1)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="--top 5: the model has 4 classes"):
        predict(folder / "images", "--checkpoint", folder / "multi_label.safetensors", "--top", 5)


def test_labels_that_csv_cannot_tell_apart_are_one_line(folder, models, tmp_path):
    info = RunInfo("tiny_labels", ("a", "b|c", "d", "e"), PX, task="multi_label")
    write_checkpoint(models["multi_label"].state_dict(), tmp_path / "m.safetensors", info.metadata)
    options = (folder / "images", "--checkpoint", tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"the label 'b\|c' holds \|.*give --output F\.jsonl") as refused:
        predict(*options, "--output", tmp_path / "p.csv")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "p.csv").exists()
    predict(*options, "--output", tmp_path / "p.jsonl")
    predict(*options, "--output", tmp_path / "p.csv", "--top", 1)


def test_a_job_knows_its_task_and_thresholds(folder, models, tmp_path, monkeypatch):
    """Both are named by what differs, besides the hash of the file."""
    path = tmp_path / "m.safetensors"
    jobs = []
    monkeypatch.setattr("shvit.export.predict.journal.check_job", lambda _, job: jobs.append(job))
    for info in (INFOS["multi_label"], RunInfo("tiny_labels", LABELS, PX, task="multi_label"),
                 RunInfo("tiny_labels", LABELS, PX)):  # fmt: skip
        write_checkpoint(models["multi_label"].state_dict(), path, info.metadata)
        predict(folder / "images", "--checkpoint", path, "--output", tmp_path / "p.jsonl")
    assert [(job["task"], tuple(job["thresholds"])) for job in jobs] == [
        ("multi_label", THRESHOLDS), ("multi_label", ()), ("classification", ()),
    ]  # fmt: skip
    assert jobs[0]["preprocessing"] == jobs[1]["preprocessing"] == jobs[2]["preprocessing"]
