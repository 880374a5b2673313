"""A run from recipe to weights: its folder, resuming, and trouble."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shvit.cli import run
from shvit.errors import CheckFailed, InputError
from shvit.train.loop import train
from shvit.train.recipe import Data, Optim, Save
from tests.conftest import SMALL, assert_same_end, state

# --- the run folder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_run(recipe, tmp_path_factory):
    """A finished run of `recipe`, and its result; to be left as it is."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, train(recipe, folder)


@pytest.fixture(scope="module")
def small_run(small, tmp_path_factory):
    """A finished run of `small` with four states and scalars of every step; to be left as it is."""
    folder = tmp_path_factory.mktemp("small") / "run"
    train(replace(small, save=Save(log_steps=1, keep=4)), folder)
    return folder


@pytest.fixture
def small_copy(small_run, tmp_path):
    """A copy of that run."""
    return shutil.copytree(small_run, tmp_path / "copy")


def test_run_folder_holds_everything_that_was_promised(recipe, plain_run):
    folder, result = plain_run
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "tensorboard", "curves.png", "last.pt", "last-1.pt", "best.safetensors",
        "best_ema.safetensors", ".lock",
    }  # fmt: skip
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["epoch"], entry["step"]) for entry in log] == [(1, 4), (2, 8)]
    assert result["top1"] == max(entry["top1"] for entry in log)
    assert result["classes"] == ["blue", "red"]
    assert result["n_val"] == 12
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["recipe"] == recipe.as_dict()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_weights_load_into_timm_and_score_what_the_log_says(recipe, image_folder, tmp_path):
    train(replace(recipe, model="shvit_s1", epochs=1), tmp_path)
    model = timm.create_model("shvit_s1", num_classes=2, checkpoint_path=tmp_path / "best.safetensors")
    assert not any(torch.isnan(p).any() for p in model.parameters())
    options = ["--model", "shvit_s1", "--data", str(image_folder), "--img-size", "32"]
    result = run(["eval", *options, "--checkpoint", f"{tmp_path}/best.safetensors"])
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert result["top1"] == pytest.approx(max(entry["top1"] for entry in log))
    assert result["n"] == 12


@pytest.mark.parametrize(
    ("model", "epochs", "lr"), [(SMALL, 10, 5e-2), pytest.param("shvit_s1", 16, 2e-2, marks=pytest.mark.slow)]
)
def test_training_learns(recipe, tmp_path, model, epochs, lr):
    result = train(replace(recipe, model=model, epochs=epochs, optim=replace(recipe.optim, lr=lr)), tmp_path)
    assert result["top1"] >= 90


def test_scalars_are_in_tensorboard(small, tmp_path):
    train(replace(small, save=Save(log_steps=2)), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {f"train/{name}" for name in ("loss", "lr", "grad_norm", "images_per_s", "loader_wait")}
    assert names | {"val/top1", "val/ema_top1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == list(range(2, 17, 2))
    log = state(tmp_path)["log"]
    assert [event.value for event in events.Scalars("val/top1")] == pytest.approx([entry["top1"] for entry in log])


def test_curves_can_be_drawn_again(small_copy, tmp_path):
    (small_copy / "curves.png").unlink()
    run(["train", "--plot", str(small_copy)])
    assert (small_copy / "curves.png").stat().st_size > 1000
    with pytest.raises(InputError, match=r"metrics\.jsonl: no such file"):
        run(["train", "--plot", str(tmp_path / "nowhere")])


def test_schedule_warms_up_and_ends_where_the_recipe_says(small, small_run):
    events = EventAccumulator(str(small_run / "tensorboard"))
    events.Reload()
    rates = [event.value for event in events.Scalars("train/lr")]  # of the next step
    peak, total, warm = small.peak_lr, 16, 4
    assert rates[0] == pytest.approx(1e-6 + (peak - 1e-6) / warm, rel=1e-4)
    cosine = [1e-5 + (peak - 1e-5) * (1 + np.cos(np.pi * step / total)) / 2 for step in range(warm, total)]
    assert rates[warm - 1 : total - 1] == pytest.approx(cosine, rel=1e-4)
    assert rates[-1] == pytest.approx(1e-5)


@pytest.mark.parametrize("size", [32, (32, 48)])
def test_model_that_takes_one_size_is_made_for_it(recipe, image_folder, size, tmp_path):
    result = train(replace(recipe, model="test_vit", epochs=1, img_size=size), tmp_path)
    assert result["n_val"] == 12
    evaluated = run(["eval", "--checkpoint", str(tmp_path), "--data", str(image_folder)])
    assert evaluated["top1"] == max(result["top1"], result["ema_top1"])


# --- images that are not square ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(recipe):
    return replace(recipe, model=SMALL, img_size=(32, 48), first_img_size=32)


@pytest.fixture(scope="module")
def wide_run(wide, tmp_path_factory):
    """A finished run of `wide`, and its result; to be left as it is."""
    folder = tmp_path_factory.mktemp("wide") / "run"
    return folder, train(wide, folder)


def test_commands_take_the_size_that_a_run_had(wide_run, image_folder, tmp_path):
    folder, result = wide_run
    assert str(result["img_size"]) == "32x48"
    for name, top1 in (("best", result["top1"]), ("best_ema", result["ema_top1"])):
        shutil.copy(folder / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
        checkpoint = ["--checkpoint", f"{tmp_path}/{name}.safetensors"]
        assert run(["eval", *checkpoint, "--data", str(image_folder)])["top1"] == pytest.approx(top1)
    exported = run(["export", "onnx", *checkpoint, "--images", str(image_folder), "--output", f"{tmp_path}/m.onnx"])
    assert exported["certificate"]["spec"]["img_size"] == (32, 48)
    assert run(["verify", f"{tmp_path}/m.onnx", "--images", str(image_folder)])["passed"] is not False
    found = run(["eval", "--artifact", f"{tmp_path}/m.onnx", "--data", str(image_folder), "--img-size", "32x48"])
    assert found["top1"] == pytest.approx(top1)
    with pytest.raises(InputError, match=r"m\.onnx takes 32x48 px; leave out --img-size 48x32"):
        run(["eval", "--artifact", f"{tmp_path}/m.onnx", "--data", str(image_folder), "--img-size", "48x32"])


def test_run_of_a_size_resumes_with_that_size_alone(wide, wide_run, recipe, plain_run):
    folder, result = wide_run
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["recipe"]["img_size"] == "32x48"
    assert train(wide, folder) == result
    assert run(["train", "--recipe", f"{folder}/recipe.yaml", "--output", str(folder)]) == result
    with pytest.raises(InputError, match=r"img_size \(32x48 and 48x32\)"):
        train(replace(wide, img_size=(48, 32)), folder)
    with pytest.raises(InputError, match=r"img_size \(32 and 32x48\)"):
        train(replace(recipe, img_size=(32, 48)), plain_run[0])


def test_run_of_a_square_has_one_number_in_its_recipe_as_older_runs_have(recipe, plain_run):
    folder, result = plain_run
    stored = yaml.safe_load((folder / "recipe.yaml").read_text())["recipe"]
    assert (stored["img_size"], stored["first_img_size"]) == (32, None)
    assert train(replace(recipe, img_size=(32, 32)), folder) == result


# --- resuming ---------------------------------------------------------------------------------------------------------


def interrupt_after(steps: int, monkeypatch, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the forward pass behind that many finished steps."""
    from shvit.train.step.state import Run

    forward_backward = Run.forward_backward

    def stopped(self, batches):
        loss = forward_backward(self, batches)
        if self.step == steps:
            os.kill(os.getpid(), number)
        return loss

    monkeypatch.setattr(Run, "forward_backward", stopped)


@pytest.fixture
def loaders_end():
    """Ends what loaders leave behind, as the end of a program does: left to be collected they take 5 s each."""
    yield
    for child in multiprocessing.active_children():
        child.terminate()


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_run_resumes_and_ends_as_if_it_had_not_been(
    small, small_run, tmp_path, monkeypatch, loaders_end, workers
):
    small = replace(small, data=replace(small.data, workers=workers))
    for steps, number, status in ((5, signal.SIGTERM, 143), (10, signal.SIGINT, 130)):
        with monkeypatch.context() as patch:
            interrupt_after(steps, patch, number)
            with pytest.raises(SystemExit) as stop:
                train(small, tmp_path / "cut")
        assert stop.value.code == status
        assert state(tmp_path / "cut")["step"] == steps
    train(small, tmp_path / "cut")
    assert_same_end(small_run, tmp_path / "cut")


def test_run_resumes_from_the_state_before_a_damaged_one(small, small_run, small_copy, capsys):
    (small_copy / "last.pt").write_bytes(b"torn")
    train(small, small_copy)
    assert "last.pt is damaged" in capsys.readouterr().err
    assert_same_end(small_run, small_copy)


def test_stopping_in_an_evaluation_repeats_it(small, small_run, tmp_path, monkeypatch):
    from shvit.train.loop import Training

    accuracy = Training._evaluate

    def stopped(self, model):
        if self.run.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return accuracy(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_evaluate", stopped)
        with pytest.raises(SystemExit):
            train(small, tmp_path / "cut")
    assert len(state(tmp_path / "cut")["log"]) == 1
    train(small, tmp_path / "cut")
    assert_same_end(small_run, tmp_path / "cut")


def test_finished_run_gives_its_result_again(recipe, plain_run):
    folder, first = plain_run
    before = (folder / "last.pt").stat().st_mtime_ns
    second = train(recipe, folder)
    assert (folder / "last.pt").stat().st_mtime_ns == before
    assert first == second


def test_run_resumes_with_added_images_by_a_schedule_that_fits(small, image_folder, small_copy, tmp_path):
    root = shutil.copytree(image_folder, tmp_path / "images")
    recipe = replace(small, data=replace(small.data, root=root), save=replace(small.save, keep=4))
    folder = small_copy
    for newer in ("last.pt", "last-1.pt"):  # as it was after two of four epochs
        (folder / newer).unlink()
    log = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(log[:2]) + "\n")
    for path in list((root / "train").rglob("*.png")):
        shutil.copy(path, path.with_stem(f"{path.stem}-more"))
    with pytest.raises(InputError, match=r"32 train, 12 val then, 64 train, 12 val now"):
        train(recipe, folder)
    changed = replace(recipe, data=replace(recipe.data, changed="continue"))
    assert train(changed, folder)["steps"] == 4 * 8
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [1, 2, 3, 4]
    assert [entry["step"] for entry in entries] == [4, 8, 24, 32]
    whole = train(recipe, tmp_path / "whole")
    expected = [json.loads(line)["lr"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert whole["steps"] == 32
    assert [entry["lr"] for entry in entries[2:]] == pytest.approx(expected[2:])


def test_folder_with_another_recipes_run_is_refused(small, small_copy):
    with pytest.raises(InputError, match=r"differs in optim\.lr \(0\.1 and 0\.001\);"):
        train(replace(small, optim=replace(small.optim, lr=1e-3)), small_copy)


def test_state_of_another_model_is_refused(small, small_copy):
    other = state(small_copy)
    other["model"] = {name + "x": value for name, value in other["model"].items()}
    torch.save(other, small_copy / "last.pt")
    with pytest.raises(InputError, match="does not fit its recipe"):
        train(small, small_copy)


def test_state_of_a_step_that_the_run_does_not_have_is_refused(small, small_copy):
    for step in (17, 10**9):
        torch.save({**state(small_copy), "step": step}, small_copy / "last.pt")
        with pytest.raises(InputError, match=rf"does not fit its recipe \(step {step} of 4 epochs with 4 steps each\)"):
            train(small, small_copy)


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_diverged_loss_stops_with_figures_and_names_the_last_good_state(small, small_copy, tmp_path):
    wild = replace(small, epochs=20, optim=Optim(lr=1e25, warmup_epochs=0, clip_grad=None), save=Save(log_steps=1))
    with pytest.raises(
        CheckFailed, match=r"the loss is .* gradient norm .* learning rate .*no state was saved"
    ) as failed:
        train(wild, tmp_path / "new")
    json.dumps(failed.value.result, allow_nan=False)
    poisoned = state(small_copy)
    poisoned |= {"step": 4, "log": poisoned["log"][:1]}
    for moments in poisoned["optimizer"]["state"].values():
        moments["exp_avg"].fill_(float("inf"))
    torch.save(poisoned, small_copy / "last.pt")
    with pytest.raises(CheckFailed, match=r"copy/last\.pt holds the last good state"):
        train(replace(small, epochs=4), small_copy)
    assert all(torch.isfinite(tensor).all() for tensor in state(small_copy)["model"].values())


@pytest.fixture
def damaged(image_folder, tmp_path):
    """The images, four of them damaged: three for training and one for validation."""
    import shutil

    root = tmp_path / "damaged"
    shutil.copytree(image_folder, root)
    for name in ("train/red/1.png", "train/red/2.png", "train/blue/9.png", "val/red/0.png"):
        (root / name).write_bytes((root / name).read_bytes()[:60])
    return root


def test_damaged_images_are_named_once_and_skipped(small, damaged, tmp_path, capsys):
    recipe = replace(small, data=Data(root=damaged, workers=0))
    result = train(recipe, tmp_path / "run")
    said = capsys.readouterr().err
    for name in ("train/red/1.png", "train/red/2.png", "train/blue/9.png"):
        assert said.count(name) == 1
    assert re.search(r"val/red/0\.png: not a readable image .*: not counted", said)
    assert result["n_val"] == 11


def test_too_many_damaged_images_are_an_error(small, damaged, tmp_path):
    recipe = replace(small, data=Data(root=damaged, workers=0, max_corrupt=2))
    with pytest.raises(InputError, match=r"3 damaged images, and 2 are allowed; .*\.png: not a readable image"):
        train(recipe, tmp_path / "run")


def test_only_damaged_images_are_an_error(small, damaged, tmp_path):
    for path in (damaged / "train").rglob("*.png"):
        path.write_text("x")
    with pytest.raises(InputError, match=r"none of the 16 training images of .* can be read"):
        train(replace(small, data=Data(root=damaged, workers=0, max_corrupt=1000)), tmp_path / "run")


def test_validation_images_of_which_none_can_be_read_are_refused_before_training(small, damaged, tmp_path):
    for path in (damaged / "val").rglob("*.png"):
        path.write_text("x")
    with pytest.raises(InputError, match=r"none of the 12 validation images can be read, such as .*\.png;"):
        train(replace(small, data=Data(root=damaged, workers=0)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_class_of_which_no_image_can_be_read_ends_the_run(small, damaged, tmp_path):
    for path in (damaged / "train" / "red").glob("*.png"):
        path.write_text("x")
    with pytest.raises(InputError, match=r"none of the 16 training images of red can be read, such as .*\.png;"):
        train(replace(small, data=Data(root=damaged, workers=0, max_corrupt=100)), tmp_path / "run")


def test_empty_class_is_named(small, damaged, tmp_path):
    (damaged / "train" / "green").mkdir()
    with pytest.raises(InputError, match="green: an empty class"):
        train(replace(small, data=Data(root=damaged)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--optim.lx", "1"], "did you mean --optim.lr"),
        (["demi"], "did you mean 'demo'"),
        ([], "which recipe? it comes first"),
        (["--epochs", "3"], "which recipe? it comes first"),
        (["--recipe"], "--recipe wants a YAML file"),
        (["demo", "--epochs", "0"], "--epochs 0 is out of range; choose 1 to 1e+06"),
        (["demo", "--data.workers", "-1"], "--data.workers -1 is out of range"),
        (["demo", "--optim.lr", "nan"], "--optim.lr nan is out of range"),
        (["demo", "--ema-decay", "2"], "--ema-decay 2.0 is out of range"),
        (["demo", "--img-size", "100000"], "--img-size: 100000 is not an image size; give 1 to 4096 px"),
        (["demo", "--augment.smoothing", "3"], "--augment.smoothing 3.0 is out of range"),
        (["demo", "--model", "shvit_s9"], "unknown model 'shvit_s9'"),
        (["demo", "--model", "test_vit", "--first-img-size", "64"], "test_vit accepts one image size only"),
        (["demo", "--data.root", "nowhere"], "nowhere: no such folder"),
        (["demo", "--data.name", "imagenet"], "data.name 'imagenet' is not known"),
        (["demo", "--batch-size", "5000"], "fewer than the batch of 5000"),
        (["demo", "--optim.opt", "adamx"], "--optim.opt adamx"),
        (["demo", "--optim.schedule", "sine"], "--optim.schedule"),
        (["demo", "--augment.auto-augment", "nonsense"], "--augment.auto-augment nonsense"),
        (["demo", "--compute.sync-bn"], "--compute.sync-bn needs CUDA"),
        (["demo", "--compute.precision", "fp16"], "fp16 needs CUDA"),
        (["demo", "--augment.mixup", "1", "--batch-size", "63"], "mixup and cutmix pair images"),
        (["demo", "--distill.teacher", "nobody"], "unknown teacher 'nobody'"),
        (["demo", "--distill.teacher", "nobody", "--distill.checkpoint", "x.pt"], "unknown teacher 'nobody'"),
        (["demo", "--data.name", "wds/", "--data.group", "(x)"], "--data.group does not apply: a named dataset"),
        (["demo", "--checkpoint", "nowhere.pth"], "nowhere.pth: no such file"),
        (["demo", "--checkpoint", "shvit_s1.in1k"], "a name of published weights; `shvit weights pull shvit_s1.in1k`"),
        (["demo", "--benchmark", "0"], "--benchmark 0 must be 1 or more"),
    ],
)
def test_unusable_options_are_one_clear_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        run(["train", *argv])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_any_field_can_be_given_on_the_command_line(image_folder, tmp_path):
    options = ["--epochs", "1", "--img-size", "32", "--batch-size", "8", "--data.workers", "0", "--optim.lr", "0.01"]
    options += ["--model", "tiny_vit"]
    run(["train", "debug", "--data.root", str(image_folder), "--output", str(tmp_path / "run"), *options])
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["recipe"]
    assert (stored["optim"]["lr"], stored["data"]["root"]) == (0.01, str(image_folder))
    again = run(["train", "--recipe", str(tmp_path / "run" / "recipe.yaml"), "--output", str(tmp_path / "run")])
    assert again["epochs"] == 1
