"""Runs on tables of labels: what they learn, resume, save and say, for each task."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform

from shvit.checkpoint import write_checkpoint
from shvit.cli import run as run_command
from shvit.create import create_model
from shvit.errors import InputError
from shvit.train.checks import check_fields
from shvit.train.labels.scale import OutputScale
from shvit.train.labels.splits import open_recipe_splits
from shvit.train.loop import train
from shvit.train.recipe import Augment, Compute, Data, Optim, Recipe
from shvit.train.step.loader import Augmented
from shvit.train.step.state import Run
from shvit.weights.run_info import RunInfo, read_run_info
from tests.conftest import PLAIN, SMALL, assert_same_end, create_tiny, randomize, state
from tests.train.forked import start_torchrun

SPLIT = ("train", "train", "train", "val")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 images with a table for each task: brightness of red and blue decides."""
    root = tmp_path_factory.mktemp("labeled")
    rng = np.random.default_rng(0)
    rows = {"labels": [], "soft": [], "value": []}
    for index in range(48):
        red, blue = map(float, rng.uniform(size=2))
        pixels = rng.uniform(0.8, 1, (32, 32, 3)) * np.array([red, 0.2, blue])
        Image.fromarray((255 * pixels).astype(np.uint8)).save(root / f"{index}.png")
        start = f"{index}.png,{SPLIT[index % 4]}"
        rows["labels"].append(f"{start},{'|'.join(['red'] * (red > 0.5) + ['blue'] * (blue > 0.5))}")
        rows["soft"].append(f"{start},{red / (red + blue):.3f},{blue / (red + blue):.3f}")
        rows["value"].append(f"{start},{1000 + 200 * red:.1f}")
    for name, columns in (("labels", "labels"), ("soft", "red,blue"), ("value", "weight")):
        (root / f"{name}.csv").write_text(f"file,split,{columns}\n" + "\n".join(rows[name]) + "\n")
    return root


def recipe(folder, name, task, **fields):
    return Recipe(model=SMALL, task=task, img_size=32, epochs=8, batch_size=12, ema_decay=0.9, augment=PLAIN,
                  data=Data(labels=folder / f"{name}.csv", workers=0), compute=Compute(device="cpu"),
                  optim=Optim(lr=0.2, warmup_epochs=1, clip_grad=None), **fields)  # fmt: skip


def entries(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- several labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"multi_label_loss": "asl"}, {"class_weight": "balanced"}])
def test_labels_are_learned(folder, tmp_path, fields, capsys):
    result = train(recipe(folder, "labels", "multi_label", **fields), tmp_path / "run")
    assert result["map"] > 90
    assert result["classes"] == ["blue", "red"]
    assert {"map", "micro_f1", "ema_map", "ema_micro_f1"} <= entries(tmp_path / "run")[-1].keys()
    said = capsys.readouterr().out
    assert "36 images with 2 labels, 12 for validation" in said
    assert f"best on validation images: mAP {result['map']:.2f} %" in said
    info = read_run_info(tmp_path / "run" / "best.safetensors")
    assert (info.task, info.classes, len(info.thresholds)) == ("multi_label", ("blue", "red"), 2)
    assert all(0 < threshold < 1 for threshold in info.thresholds)


def test_a_stopped_run_of_labels_resumes_bit_for_bit(folder, tmp_path, monkeypatch):
    whole = replace(recipe(folder, "labels", "multi_label"), epochs=2, augment=Augment(repeats=1))
    train(whole, tmp_path / "whole")
    stop_after(3, monkeypatch, lambda: train(whole, tmp_path / "cut"))
    train(whole, tmp_path / "cut")
    assert_same_end(tmp_path / "cut", tmp_path / "whole")


def stop_after(steps, monkeypatch, call):
    """Stop a run by a signal, after some steps."""
    update = Run.update

    def stopped(run, loss):
        update(run, loss)
        if run.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", stopped)
        with pytest.raises(SystemExit):
            call()


@pytest.mark.parametrize(("name", "task", "figure"), [("labels", "multi_label", "map"), ("value", "regression", "r2")])
def test_two_processes_are_one(folder, tmp_path, name, task, figure):
    one = replace(recipe(folder, name, task, freeze_bn=True), epochs=1, optim=Optim(lr=1e-2))
    train(one, tmp_path / "one")
    process = start_torchrun(2, one, tmp_path / "two", tmp_path / "out", tmp_path / "err")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    first, second = (entries(tmp_path / each)[0] for each in ("one", "two"))
    assert second["n_val"] == first["n_val"] == 12
    for value in ("train_loss", "val_loss", figure, f"ema_{figure}"):
        assert second[value] == pytest.approx(first[value], abs=1e-4), value


def test_damaged_images_are_replaced_and_left_out(folder, tmp_path, capsys):
    """In training by the next image with its own labels; where no other can be read, by what teaches nothing."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(b"" if path.name in ("0.png", "3.png") else path.read_bytes())
    damaged = replace(recipe(tmp_path, "labels", "multi_label"), epochs=1)
    assert train(damaged, tmp_path / "run")["n_val"] == 11
    said = capsys.readouterr().err
    assert "0.png" in said
    assert "3.png" in said
    images = open_recipe_splits(damaged).train
    item = Augmented(images, lambda place: np.asarray, seed=0, tries=0)[(0, 0)]  # of 0.png
    assert item[1] == pytest.approx(images.chosen.mean(0))


def test_images_of_five_channels_with_a_table(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for index in range(32):
        values = rng.uniform(size=(5, 16, 16)).astype("f4")
        values[4] += index % 2
        np.save(tmp_path / f"{index}.npy", values)
        lines.append(f"{index},{SPLIT[index // 2 % 4]},{'bright' if index % 2 else ''}")
    (tmp_path / "labels.csv").write_text("id,split,labels\n" + "\n".join(lines) + "\n")
    run = tmp_path / "run"
    result = train(recipe(tmp_path, "labels", "multi_label", in_chans=5), run)
    assert result["map"] > 90
    evaluated = run_command(["eval", "--checkpoint", str(run), "--data", str(tmp_path), "--data.labels",
                             f"{tmp_path}/labels.csv"])  # fmt: skip
    assert evaluated["map"] == pytest.approx(max(result["map"], result["ema_map"]))


# --- proportions of classes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [PLAIN, replace(PLAIN, mixup=0.4, cutmix=0.4), replace(PLAIN, smoothing=0.0)])
def test_proportions_are_learned_as_soft_targets(folder, tmp_path, augment):
    result = train(replace(recipe(folder, "soft", "classification"), augment=augment), tmp_path / "run")
    assert result["top1"] > 70
    assert result["classes"] == ["red", "blue"]


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_are_learned_and_saved_in_their_unit(folder, tmp_path):
    run = tmp_path / "run"
    result = train(recipe(folder, "value", "regression"), run)
    assert result["r2"] > 0.5
    assert result["classes"] == ["weight"]
    table = (folder / "value.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in table if ",val," in line]
    info = read_run_info(run / "best.safetensors")
    transform = create_transform((3, 32, 32), mean=info.mean, std=info.std, interpolation=info.interpolation,
                                 crop_pct=info.crop_pct, crop_mode=info.crop_mode)  # fmt: skip
    model = create_model(SMALL, run / "best.safetensors").eval()
    with torch.no_grad():
        values = model(torch.stack([transform(Image.open(folder / row[0])) for row in rows]))[:, 0].numpy()
    truth = np.array([float(row[2]) for row in rows])
    assert 1 - np.square(truth - values).mean() / truth.var() == pytest.approx(result["r2"], abs=1e-3)
    saved = state(run)["model"]
    last = load_file(run / "best.safetensors")
    assert saved.keys() == last.keys()
    assert 1000 < saved["fc.bias"].item() < 1200


def test_a_stopped_regression_resumes_bit_for_bit(folder, tmp_path, monkeypatch):
    whole = replace(recipe(folder, "value", "regression"), epochs=2)
    train(whole, tmp_path / "whole")
    stop_after(3, monkeypatch, lambda: train(whole, tmp_path / "cut"))
    train(whole, tmp_path / "cut")
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    one, other = (state(tmp_path / name)["output"] for name in ("cut", "whole"))
    assert torch.equal(one["model"]["fc.weight"], other["model"]["fc.weight"])


def test_a_regression_starts_from_the_weights_of_another(folder, tmp_path):
    first = recipe(folder, "value", "regression")
    result = train(first, tmp_path / "first")
    still = replace(first, epochs=1, optim=replace(first.optim, lr=1e-9, warmup_epochs=0, min_lr=0.0), freeze_bn=True,
                    checkpoint=tmp_path / "first" / "best.safetensors")  # fmt: skip
    assert train(still, tmp_path / "second")["r2"] == pytest.approx(result["r2"], abs=1e-3)


@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "tiny"])
def test_scale_of_an_output_is_exact(model):
    made = create_tiny() if model == "tiny" else create_model(model, num_classes=1)
    made = randomize(made).eval()
    if model == "tiny":
        made.reset_classifier(1)
        made.eval()
    scale = OutputScale.of(made, model, mean=1000.0, std=8.0)
    image = torch.randn(2, 3, 64, 64) if model == "tiny" else torch.randn(2, 3, *made.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        before = made(image)
        made.load_state_dict(scale.natural(made.state_dict()))
        natural = made(image)
        made.load_state_dict(scale.standardized(made.state_dict()))
        assert torch.allclose(natural, before * 8 + 1000, atol=1e-2)
        assert torch.allclose(made(image), before, atol=1e-4)


def test_model_without_one_output_layer_is_refused():
    with pytest.raises(InputError, match="levit_128s is not that of one layer with a bias"):
        OutputScale.of(create_model("levit_128s", num_classes=1), "levit_128s", 0.0, 1.0)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "multi_label"}, "--task multi_label needs labels that folders do not tell; give --data.labels"),
        ({"data": Data(val_labels="x.csv")}, "--data.val-labels does not apply: there is no --data.labels"),
        ({"data": Data(labels="x.csv", name="wds/")}, "--data.name does not apply: labels are a table's"),
        ({"multi_label_loss": "asl"}, "--multi-label-loss does not apply: the task is classification"),
        ({"data": Data(labels="x.csv", label_separator=";")}, "--data.label-separator does not apply: the task is cl"),
        ({"task": "multi_label", "balanced_sampling": 0.5, "data": Data(labels="x.csv")},
         "--balanced-sampling does not apply: an image has any number of labels; --class-weight balances these"),
        ({"task": "regression", "class_weight": "balanced", "data": Data(labels="x.csv")}, "has no classes"),
    ],
)  # fmt: skip
def test_fields_of_other_tasks_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        check_fields(Recipe(**fields))


def test_labels_that_teach_nothing_are_refused(folder, tmp_path):
    constant = tmp_path / "constant.csv"
    constant.write_text("file,split,age\n" + "".join(f"{index}.png,{SPLIT[index % 4]},7\n" for index in range(8)))
    data = Data(root=folder, labels=constant, workers=0)
    with pytest.raises(InputError, match="age is 7 for every training image"):
        train(replace(recipe(folder, "value", "regression"), data=data, batch_size=4), tmp_path / "run")
    with pytest.raises(InputError, match="proportions of classes; leave these options out"):
        train(recipe(folder, "soft", "classification", class_weight="balanced"), tmp_path / "run")


def test_another_task_starts_with_a_new_head(folder, tmp_path):
    torch.manual_seed(1)  # not the run's
    model = create_model(SMALL, num_classes=2)
    path = tmp_path / "classes.safetensors"
    write_checkpoint(model.state_dict(), path, RunInfo(SMALL, ("blue", "red"), 32).metadata)
    still = replace(recipe(folder, "labels", "multi_label"), epochs=1, checkpoint=path, freeze_bn=True,
                    optim=Optim(lr=1e-9, warmup_epochs=0, min_lr=0.0))  # fmt: skip
    train(still, tmp_path / "run")
    saved = load_file(tmp_path / "run" / "best.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items() if "running" in key)
    assert not torch.allclose(saved["fc.weight"], model.fc.weight)
