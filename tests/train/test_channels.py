"""Training on images of other channels than RGB: from files to weights, resuming, first layers, and what is refused."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.models import adapt_input_conv

from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.create import checkpoint_chans, create_model
from shvit.errors import InputError
from shvit.train.data.pixels import preprocessing
from shvit.train.loop import train
from shvit.train.recipe import Augment, Data, Distill, Recipe, read_recipe
from shvit.train.step.state import Run
from tests.channels import CHANS, CLASSES, draw_bands, run_info
from tests.conftest import SMALL, assert_same_end, state


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    return draw_bands(tmp_path_factory.mktemp("bands"))


@pytest.fixture(scope="module")
def five(small, bands):
    """Of everything that draws random numbers, with RandAugment, which is left out."""
    return replace(small, in_chans=CHANS, data=Data(root=bands, workers=0))


@pytest.fixture(scope="module")
def five_run(five, tmp_path_factory):
    folder = tmp_path_factory.mktemp("five") / "run"
    return folder, train(five, folder)


def test_a_run_computes_its_constants_and_keeps_them_everywhere(five_run, bands):
    folder, result = five_run
    stored = yaml.safe_load((folder / "recipe.yaml").read_text())["preprocessing"]
    assert stored["pixel_type"] == "uint16"
    assert stored["mean"] == pytest.approx([750 / 65535] * 4 + [1750 / 65535], rel=0.02)
    assert len(stored["std"]) == CHANS
    for text in (run_info(folder / "best.safetensors"), state(folder)["shvit.run"]):
        info = json.loads(text)
        assert {name: info[name] for name in stored} == stored
    assert result["n_val"] == 18  # of valid/
    evaluated = run(["eval", "--checkpoint", result["checkpoint"], "--data", str(bands)])
    assert evaluated["top1"] == max(result["top1"], result["ema_top1"])
    assert evaluated["n"] == 18


def test_what_is_left_out_and_computed_is_printed_once(five, tmp_path, capsys):
    train(replace(five, epochs=1), tmp_path)
    printed = " ".join(capsys.readouterr().out.split())
    assert "5 channels of uint16: mean 0.01" in printed
    assert "no value needs more than 12 of the 16 bits" in printed
    assert "--augment.auto-augment rand-m9-mstd0.5-inc1 is for RGB images and is left out for 5 channels" in printed
    train(replace(five, epochs=1), tmp_path)
    assert "mean" not in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_resumes_with_its_constants_and_ends_the_same(five, five_run, tmp_path, monkeypatch, workers):
    five = replace(five, data=replace(five.data, workers=workers))
    forward_backward = Run.forward_backward

    def stopped(self, batches):
        loss = forward_backward(self, batches)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Run, "forward_backward", stopped)
        with pytest.raises(SystemExit):
            train(five, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "channel_statistics", None)  # not computed again
        train(five, tmp_path / "cut")
    assert_same_end(five_run[0], tmp_path / "cut")
    assert run_info(tmp_path / "cut" / "best.safetensors") == run_info(five_run[0] / "best.safetensors")


def test_added_images_do_not_change_the_constants_of_a_run(five, five_run, tmp_path):
    root = draw_bands(tmp_path / "bands")
    kept = replace(five, data=Data(root=root, workers=0, changed="continue"), epochs=1)
    train(kept, tmp_path / "run")
    before = run_info(tmp_path / "run" / "best.safetensors")
    np.save(root / "train" / "wet" / "new.npy", np.full((40, 44, CHANS), 4000, "uint16"))
    folder = tmp_path / "run"
    content = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**content, "recipe": {**content["recipe"], "epochs": 2}}))
    train(replace(kept, epochs=2), folder)
    after = state(folder)["shvit.run"]
    assert json.loads(before)["mean"] == json.loads(after)["mean"]
    assert state(folder)["log"][-1]["epoch"] == 2


@pytest.mark.parametrize(("kind", "suffix"), [("float32", ".npy"), ("uint8", ".npy")])
def test_every_type_and_format_trains(five, tmp_path, kind, suffix):
    root = draw_bands(tmp_path / "data", kind, suffix, (4, 2))
    result = train(replace(five, epochs=1, data=Data(root=root, workers=0)), tmp_path / "run")
    assert result["n_val"] == 6
    assert json.loads(run_info(tmp_path / "run" / "best.safetensors"))["pixel_type"] == kind


def test_gray_images_train_a_model_of_one_channel(recipe, image_folder, tmp_path):
    train(replace(recipe, model=SMALL, in_chans=1, epochs=1, augment=Augment(repeats=1)), tmp_path)
    info = json.loads(run_info(tmp_path / "best.safetensors"))
    assert (info["pixel_type"], len(info["mean"])) == ("uint8", 1)
    assert run(["eval", "--checkpoint", f"{tmp_path}/best.safetensors", "--data", str(image_folder)])["n"] == 12


def test_given_constants_are_used_for_rgb_too(recipe, tmp_path):
    given = replace(recipe.data, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 1e-05))
    train(replace(recipe, epochs=1, data=given), tmp_path)
    info = json.loads(run_info(tmp_path / "best.safetensors"))
    assert (info["mean"], info["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 1e-05])
    again = read_recipe(tmp_path / "recipe.yaml")
    assert (again.data.mean, again.data.std) == (given.mean, given.std)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "weight"), [("shvit_s1", "patch_embed.0.c.weight"), (SMALL, "conv1.0.weight")])
@pytest.mark.parametrize("chans", [1, 4, 5])
def test_the_first_layer_of_a_checkpoint_is_adapted_as_timm_does(tmp_path, name, weight, chans):
    source = timm.create_model(name, num_classes=3)
    path = tmp_path / "rgb.safetensors"
    write_checkpoint(source.state_dict(), path)
    found = create_model(name, path, num_classes=3, in_chans=chans).state_dict()
    expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 3},
                                 num_classes=3, in_chans=chans).state_dict()  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert torch.equal(found[weight], adapt_input_conv(chans, source.state_dict()[weight]))
    assert checkpoint_chans(name, path) == 3
    write_checkpoint(found, tmp_path / "other.safetensors")
    assert checkpoint_chans(name, tmp_path / "other.safetensors") == chans
    assert torch.equal(create_model(name, tmp_path / "other.safetensors", 3, in_chans=chans).state_dict()[weight],
                       found[weight])  # fmt: skip
    with pytest.raises(InputError, match=f"first layer takes {chans} channels, and 6 are asked for; only"):
        create_model(name, tmp_path / "other.safetensors", 3, in_chans=6)


def test_adapting_is_said(five, tmp_path, capsys):
    write_checkpoint(timm.create_model(SMALL).state_dict(), tmp_path / "rgb.safetensors")
    train(replace(five, epochs=1, checkpoint=tmp_path / "rgb.safetensors"), tmp_path / "run")
    assert "the first layer's weights, of 3 channels, are adapted to 5 as timm does" in capsys.readouterr().out


# --- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_how_images_are_fitted_travels_with_the_weights(recipe, tmp_path, capsys, mode):
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = rng.integers(0, 100, (24, 90, 3), dtype=np.uint8)
                pixels[:, :8] += 100 * (name == "wet")  # at the left end, which the usual crop cuts off
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.png")
    data = replace(recipe.data, root=tmp_path, crop_mode=mode)
    train(replace(recipe, epochs=1, data=data), tmp_path / "run")
    assert f"--data.crop-mode {mode} is for evaluation; training takes crops of 8 %" in " ".join(
        capsys.readouterr().out.split()
    )
    info = json.loads(run_info(tmp_path / "run" / "best.safetensors"))
    assert (info["crop_mode"], info["crop_pct"]) == (mode, 1.0)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_chans": 0}, "--in-chans 0 is out of range; choose 1 to 16"),
        ({"in_chans": 17}, "--in-chans 17 is out of range"),
        ({"in_chans": 5, "data": Data(mean=(0.5,) * 3)}, "--data.mean has 3 values; give one for each of 5 channels"),
        ({"data": Data(std=(0.5, float("inf"), 0.5))}, "--data.std has 3 values"),
        ({"data": Data(std=(0.5, 0.0, 0.5))}, "--data.std 0.5 0.0 0.5: must be above 0"),
        ({"data": Data(crop_pct=3.0)}, "--data.crop-pct 3.0 is out of range"),
        ({"in_chans": 5, "data": Data(name="torch/cifar10")}, "--in-chans 5: torch/cifar10 has images in RGB"),
        ({"in_chans": 5, "distill": Distill(teacher=SMALL)}, "--in-chans 5: a teacher takes images in RGB"),
    ],
)
def test_unusable_fields_are_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(replace(Recipe(model=SMALL), **changes), tmp_path)


def test_a_folder_of_images_in_rgb_is_refused_for_five_channels(recipe, tmp_path):
    with pytest.raises(InputError, match=r"blue: an empty class; .*files skipped: \d+ \.png"):
        train(replace(recipe, in_chans=5), tmp_path)
