"""A run from recipe to weights: its folder, going on, and stopping."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from shvit.cli import run
from shvit.errors import CheckFailed, InputError
from shvit.train.loop import train
from shvit.train.recipe import Data, Optim, Recipe
from shvit.train.recipes import DEMO, RECIPES


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Red noise and blue noise, easy to tell apart."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for channel, name in ((0, "red"), (2, "blue")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (40, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def recipe(photographs):
    return Recipe(
        img_size=32, epochs=2, batch_size=8, ema_decay=0.9, data=Data(root=photographs, workers=0), optim=Optim(lr=2e-2)
    )


def test_run_folder_holds_everything_that_was_promised(recipe, tmp_path):
    result = train(recipe, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "curves.png", "last.pt", "best.safetensors", "best_ema.safetensors"
    }  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [1, 2]
    assert result["top1"] == max(entry["top1"] for entry in log)
    assert result["classes"] == ["blue", "red"]
    assert result["n_val"] == 12
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["recipe"] == recipe.as_dict()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_weights_load_into_timm_and_score_what_the_log_says(recipe, photographs, tmp_path):
    train(recipe, tmp_path)
    model = timm.create_model("shvit_s1", num_classes=2, checkpoint_path=tmp_path / "best.safetensors")
    assert not any(torch.isnan(p).any() for p in model.parameters())
    options = ["--model", "shvit_s1", "--data", str(photographs), "--img-size", "32"]
    result = run(["eval", *options, "--checkpoint", f"{tmp_path}/best.safetensors"])
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result["top1"] == pytest.approx(max(entry["top1"] for entry in log))
    assert result["n"] == 12


def test_training_learns(recipe, tmp_path):
    result = train(replace(recipe, epochs=16), tmp_path)
    assert result["top1"] >= 90


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(recipe, tmp_path, monkeypatch, workers):
    from shvit.train import loop

    recipe = replace(recipe, data=replace(recipe.data, workers=workers))
    train(recipe, tmp_path / "whole")

    train_epoch = loop._train_epoch

    def stop_in_second_epoch(run, *rest):
        if run.log:
            raise KeyboardInterrupt
        return train_epoch(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_train_epoch", stop_in_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "cut")
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 1
    train(recipe, tmp_path / "cut")
    whole, cut = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert [entry["train_loss"] for entry in cut["log"]] == [entry["train_loss"] for entry in whole["log"]]
    assert all(torch.equal(cut["model"][name], tensor) for name, tensor in whole["model"].items())
    assert all(torch.equal(cut["model_ema"][name], tensor) for name, tensor in whole["model_ema"].items())


def test_finished_run_gives_its_result_again(recipe, tmp_path):
    first = train(recipe, tmp_path)
    before = (tmp_path / "last.pt").stat().st_mtime_ns
    second = train(recipe, tmp_path)
    assert (tmp_path / "last.pt").stat().st_mtime_ns == before
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_folder_with_another_recipes_run_is_refused(recipe, tmp_path):
    train(replace(recipe, epochs=1), tmp_path)
    with pytest.raises(InputError, match=r"differs in optim\.lr \(0\.02 and 0\.001\);"):
        train(replace(recipe, epochs=1, optim=replace(recipe.optim, lr=1e-3)), tmp_path)


def test_damaged_state_is_named(recipe, tmp_path):
    train(replace(recipe, epochs=1), tmp_path)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"last\.pt: damaged"):
        train(replace(recipe, epochs=1), tmp_path)


def test_diverged_loss_stops_with_figures_and_keeps_what_was_finished(recipe, tmp_path):
    with pytest.raises(CheckFailed, match=r"the loss is .* learning rate .*, epoch 1, step \d+"):
        train(replace(recipe, optim=Optim(lr=1e30, warmup_epochs=0, clip_grad=1e30)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}


def test_learning_rate_scales_with_the_batch():
    assert Recipe(batch_size=2048).peak_lr == pytest.approx(4e-3)  # the reference's peak at 8 × 256
    assert replace(DEMO, batch_size=128).peak_lr == 2 * DEMO.peak_lr


def test_any_field_can_be_given_on_the_command_line(photographs, tmp_path):
    options = ["--epochs", "1", "--img-size", "32", "--batch-size", "8", "--data.workers", "0", "--optim.lr", "0.01"]
    run(["train", "debug", "--data.root", str(photographs), "--output", str(tmp_path / "run"), *options])
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["recipe"]
    assert (stored["optim"]["lr"], stored["data"]["root"]) == (0.01, str(photographs))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--optim.lx", "1"], "did you mean --optim.lr"),
        (["demi"], "demo, debug"),
        (["demo", "--epochs", "0"], "--epochs 0 must be 1 or more"),
        (["demo", "--model", "shvit_s9"], "unknown model 'shvit_s9'"),
        (["demo", "--data.root", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_unusable_options_are_one_clear_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        run(["train", *argv])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_every_recipe_names_a_model_of_ours():
    assert {recipe.model for recipe in RECIPES.values()} <= set(timm.list_models(module="shvit"))
