"""A run from recipe to weights: its folder, going on, stopping, and several processes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shvit.checkpoint import write_checkpoint
from shvit.cli import run
from shvit.errors import CheckFailed, InputError
from shvit.train.distributed import World
from shvit.train.loop import train
from shvit.train.recipe import Augment, Compute, Data, Distill, Optim, Recipe, Save
from shvit.train.setup import check_recipe, open_training, set_up

PLAIN = Augment(auto_augment=None, color_jitter=0.0, random_erasing=0.0, mixup=0.0, cutmix=0.0, repeats=1)
SMALL = "test_resnet"  # timm's own model for tests, with BatchNorm


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
        img_size=32,
        epochs=2,
        batch_size=8,
        ema_decay=0.9,
        data=Data(root=photographs, workers=0),
        augment=PLAIN,
        optim=Optim(lr=2e-2, warmup_epochs=1),
    )


@pytest.fixture
def small(recipe):
    """The same, with everything that draws random numbers, on a small model."""
    return replace(recipe, model=SMALL, epochs=4, augment=Augment(repeats=1), optim=Optim(lr=1e-1, warmup_epochs=1))


def state(folder: Path) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


def assert_same_end(first: Path, second: Path) -> None:
    """Bit for bit: weights, their average, the optimiser's moments, and what was logged of the loss."""
    one, other = state(first), state(second)
    for name in ("model", "model_ema"):
        assert all(torch.equal(one[name][key], tensor) for key, tensor in other[name].items()), name
    for key, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(moments[name], value) for name, value in other["optimizer"]["state"][key].items())
    logged = ("epoch", "step", "train_loss", "grad_norm", "top1", "ema_top1", "lr")
    assert [[e[name] for name in logged] for e in one["log"]] == [[e[name] for name in logged] for e in other["log"]]


# --- the run folder ---------------------------------------------------------------------------------------------------


def test_run_folder_holds_everything_that_was_promised(recipe, tmp_path):
    result = train(recipe, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "tensorboard", "curves.png", "last.pt", "last-1.pt", "best.safetensors",
        "best_ema.safetensors",
    }  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["epoch"], entry["step"]) for entry in log] == [(1, 4), (2, 8)]
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


def test_scalars_are_in_tensorboard(small, tmp_path):
    train(replace(small, save=Save(log_steps=2)), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {f"train/{name}" for name in ("loss", "lr", "grad_norm", "images_per_s", "loader_wait")}
    assert names | {"val/top1", "val/ema_top1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == list(range(2, 17, 2))
    log = state(tmp_path)["log"]
    assert [event.value for event in events.Scalars("val/top1")] == pytest.approx([entry["top1"] for entry in log])


def test_curves_can_be_drawn_again(recipe, tmp_path):
    train(replace(recipe, epochs=1), tmp_path)
    (tmp_path / "curves.png").unlink()
    run(["train", "--plot", str(tmp_path)])
    assert (tmp_path / "curves.png").stat().st_size > 1000
    with pytest.raises(InputError, match=r"metrics\.jsonl: No such file"):
        run(["train", "--plot", str(tmp_path / "nowhere")])


def test_schedule_warms_up_and_ends_where_the_recipe_says(small, tmp_path):
    recipe = replace(small, save=Save(log_steps=1))
    train(recipe, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rates = [event.value for event in events.Scalars("train/lr")]  # of the next step
    peak, total, warm = recipe.peak_lr, 16, 4
    assert rates[0] == pytest.approx(1e-6 + (peak - 1e-6) / warm, rel=1e-4)
    cosine = [1e-5 + (peak - 1e-5) * (1 + np.cos(np.pi * step / total)) / 2 for step in range(warm, total)]
    assert rates[warm - 1 : total - 1] == pytest.approx(cosine, rel=1e-4)
    assert rates[-1] == pytest.approx(1e-5)


def test_model_that_takes_one_size_is_made_for_it(recipe, tmp_path):
    assert train(replace(recipe, model="test_vit", epochs=1), tmp_path)["n_val"] == 12


# --- going on ---------------------------------------------------------------------------------------------------------


def interrupt_after(steps: int, monkeypatch, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal in the forward pass behind that many finished steps."""
    from shvit.train.setup import Run

    forward_backward = Run.forward_backward

    def stopped(self, batches):
        loss = forward_backward(self, batches)
        if self.step == steps:
            os.kill(os.getpid(), number)
        return loss

    monkeypatch.setattr(Run, "forward_backward", stopped)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_run_goes_on_and_ends_as_if_it_had_not_been(small, tmp_path, monkeypatch, workers):
    small = replace(small, data=replace(small.data, workers=workers))
    train(small, tmp_path / "whole")
    for steps, number, status in ((5, signal.SIGTERM, 143), (10, signal.SIGINT, 130)):
        with monkeypatch.context() as patch:
            interrupt_after(steps, patch, number)
            with pytest.raises(SystemExit) as stop:
                train(small, tmp_path / "cut")
        assert stop.value.code == status
        assert state(tmp_path / "cut")["step"] == steps
    train(small, tmp_path / "cut")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_run_goes_on_from_the_state_before_a_damaged_one(small, tmp_path, capsys):
    train(small, tmp_path / "whole")
    train(small, tmp_path / "cut")
    (tmp_path / "cut" / "last.pt").write_bytes(b"torn")
    train(small, tmp_path / "cut")
    assert "last.pt is damaged" in capsys.readouterr().err
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_stopping_in_an_evaluation_repeats_it(small, tmp_path, monkeypatch):
    from shvit.train.loop import Training

    train(small, tmp_path / "whole")
    accuracy = Training._accuracy

    def stopped(self, model):
        if self.run.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return accuracy(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_accuracy", stopped)
        with pytest.raises(SystemExit):
            train(small, tmp_path / "cut")
    assert len(state(tmp_path / "cut")["log"]) == 1
    train(small, tmp_path / "cut")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_finished_run_gives_its_result_again(recipe, tmp_path):
    first = train(recipe, tmp_path)
    before = (tmp_path / "last.pt").stat().st_mtime_ns
    second = train(recipe, tmp_path)
    assert (tmp_path / "last.pt").stat().st_mtime_ns == before
    assert first == second


def test_folder_with_another_recipes_run_is_refused(small, tmp_path):
    train(small, tmp_path)
    with pytest.raises(InputError, match=r"differs in optim\.lr \(0\.1 and 0\.001\);"):
        train(replace(small, optim=replace(small.optim, lr=1e-3)), tmp_path)


def test_state_of_another_model_is_refused(small, tmp_path):
    train(small, tmp_path)
    other = state(tmp_path)
    other["model"] = {name + "x": value for name, value in other["model"].items()}
    torch.save(other, tmp_path / "last.pt")
    with pytest.raises(InputError, match="does not fit its recipe"):
        train(small, tmp_path)


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_diverged_loss_stops_with_figures_and_names_the_last_good_state(small, tmp_path):
    wild = replace(small, epochs=20, optim=Optim(lr=1e25, warmup_epochs=0, clip_grad=None), save=Save(log_steps=1))
    with pytest.raises(
        CheckFailed, match=r"the loss is .* gradient norm .* learning rate .*no state was saved"
    ) as failed:
        train(wild, tmp_path / "new")
    json.dumps(failed.value.result, allow_nan=False)
    train(replace(small, epochs=4), tmp_path / "old")
    poisoned = state(tmp_path / "old")
    poisoned |= {"step": 4, "log": poisoned["log"][:1]}
    for group in poisoned["optimizer"]["param_groups"]:
        group["lr"] = float("inf")
    torch.save(poisoned, tmp_path / "old" / "last.pt")
    with pytest.raises(CheckFailed, match=r"old/last\.pt holds the last good state"):
        train(replace(small, epochs=4), tmp_path / "old")
    assert all(torch.isfinite(tensor).all() for tensor in state(tmp_path / "old")["model"].values())


@pytest.fixture
def damaged(photographs, tmp_path):
    """The photographs, four of them damaged: three to train on and one held out."""
    import shutil

    root = tmp_path / "damaged"
    shutil.copytree(photographs, root)
    for name in ("train/red/1.png", "train/red/2.png", "train/blue/9.png", "val/red/0.png"):
        (root / name).write_bytes((root / name).read_bytes()[:60])
    return root


def test_damaged_photographs_are_named_once_and_passed_over(small, damaged, tmp_path, capsys):
    recipe = replace(small, data=Data(root=damaged, workers=0))
    result = train(recipe, tmp_path / "run")
    said = capsys.readouterr().err
    for name in ("train/red/1.png", "train/red/2.png", "train/blue/9.png"):
        assert said.count(name) == 1
    assert "val/red/0.png: damaged, and not counted" in said
    assert result["n_val"] == 11


def test_too_many_damaged_photographs_are_an_error(small, damaged, tmp_path):
    recipe = replace(small, data=Data(root=damaged, workers=0, max_corrupt=2))
    with pytest.raises(
        InputError, match=r"3 damaged photographs, and 2 are allowed; .*\.png: not a readable photograph"
    ):
        train(recipe, tmp_path / "run")


def test_only_damaged_photographs_are_an_error(small, damaged, tmp_path):
    for path in (damaged / "train").rglob("*.png"):
        path.write_text("x")
    with pytest.raises(InputError, match="damaged photographs"):
        train(replace(small, data=Data(root=damaged, workers=0, max_corrupt=1000)), tmp_path / "run")


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
        (["demo", "--img-size", "100000"], "--img-size 100000 is out of range"),
        (["demo", "--augment.smoothing", "3"], "--augment.smoothing 3.0 is out of range"),
        (["demo", "--model", "shvit_s9"], "unknown model 'shvit_s9'"),
        (["demo", "--model", "test_vit", "--first-img-size", "64"], "test_vit takes one size of images only"),
        (["demo", "--data.root", "nowhere"], "nowhere: no such folder"),
        (["demo", "--data.name", "imagenet"], "data.name 'imagenet' is not known"),
        (["demo", "--batch-size", "5000"], "fewer than the batch of 5000"),
        (["demo", "--optim.opt", "adamx"], "--optim.opt adamx"),
        (["demo", "--optim.schedule", "sine"], "--optim.schedule"),
        (["demo", "--augment.auto-augment", "nonsense"], "--augment.auto-augment nonsense"),
        (["demo", "--compute.sync-bn"], "--compute.sync-bn needs CUDA"),
        (["demo", "--compute.precision", "fp16"], "fp16 needs CUDA"),
        (["demo", "--augment.mixup", "1", "--batch-size", "63"], "mixup and cutmix pair photographs"),
        (["demo", "--distill.teacher", "nobody"], "unknown teacher 'nobody'"),
        (["demo", "--checkpoint", "nowhere.pth"], "nowhere.pth: no such file"),
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


def test_any_field_can_be_given_on_the_command_line(photographs, tmp_path):
    options = ["--epochs", "1", "--img-size", "32", "--batch-size", "8", "--data.workers", "0", "--optim.lr", "0.01"]
    run(["train", "debug", "--data.root", str(photographs), "--output", str(tmp_path / "run"), *options])
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["recipe"]
    assert (stored["optim"]["lr"], stored["data"]["root"]) == (0.01, str(photographs))
    again = run(["train", "--recipe", str(tmp_path / "run" / "recipe.yaml"), "--output", str(tmp_path / "run")])
    assert again["epochs"] == 1


# --- what a step computes ---------------------------------------------------------------------------------------------


def steps(recipe: Recipe, count: int, turns: int | None = None):
    """The losses of the first steps, and the run behind them."""
    world = World(0, 1, torch.device("cpu"))
    turns = turns or check_recipe(recipe, world)
    classes, feed = open_training(recipe, world, turns)
    run = set_up(recipe, world, classes, feed.steps_per_epoch, turns)
    run.train_mode()
    batches = feed.batches(0, count)
    losses = []
    for _ in range(count):
        loss = run.forward_backward([next(batches) for _ in range(turns)])
        run.update(loss)
        losses.append(loss.item())
    return losses, run


def test_step_is_that_of_plain_pytorch(recipe):
    """Against torch's own AdamW on the same batches, without clipping."""
    plain = replace(recipe, model=SMALL, optim=Optim(lr=1e-1, warmup_epochs=0, clip_grad=None, weight_decay=0.1))
    losses, run = steps(plain, 3)
    world = World(0, 1, torch.device("cpu"))
    classes, feed = open_training(plain, world, 1)
    fresh = set_up(plain, world, classes, feed.steps_per_epoch, 1)
    model = fresh.model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plain.peak_lr, eps=1e-8, betas=(0.9, 0.999))
    expected = []
    for step, batch in enumerate(feed.batches(0, 3)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-5 + (plain.peak_lr - 1e-5) * (1 + np.cos(np.pi * step / 8)) / 2
        images, targets = fresh.augment(batch, step, 0)
        loss = torch.nn.functional.cross_entropy(model(images), targets, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_turns_add_up_to_the_step_of_the_whole_batch(recipe):
    """With BatchNorm's statistics frozen: each turn would otherwise have its own."""
    whole = replace(recipe, model=SMALL, freeze_bn=True)
    small_device = replace(whole, compute=Compute(device_batch_size=2))
    (one, first), (four, second) = steps(whole, 6), steps(small_device, 6)
    assert (first.turns, second.turns) == (1, 4)
    assert four == pytest.approx(one, rel=1e-5)
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(value, second.model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_average_is_timms_and_batchnorm_can_stay_frozen(recipe):
    _, run = steps(replace(recipe, model=SMALL, freeze_bn=True, ema_warmup=False), 2)
    fresh = timm.create_model(SMALL, num_classes=2)
    assert torch.equal(run.model.bn1.running_mean, fresh.bn1.running_mean)
    assert not torch.equal(run.ema.fc.weight, run.model.fc.weight)


@pytest.mark.parametrize(
    "compute", [Compute(precision="bf16"), Compute(grad_checkpointing=True), Compute(deterministic=True)]
)
def test_ways_to_compute_agree(recipe, compute):
    reference, _ = steps(recipe, 2)
    losses, _ = steps(replace(recipe, compute=compute), 2)
    torch.use_deterministic_algorithms(False)
    if compute.precision == "bf16":
        assert losses[0] != reference[0]
        assert losses[0] == pytest.approx(reference[0], rel=2e-2)
    else:
        assert losses == pytest.approx(reference, rel=1e-5)


def test_run_begins_with_weights_and_a_new_head_for_other_classes(recipe, tmp_path):
    source = timm.create_model("shvit_s1", num_classes=5)
    write_checkpoint(source.state_dict(), tmp_path / "five.safetensors")
    world = World(0, 1, torch.device("cpu"))
    run = set_up(replace(recipe, checkpoint=tmp_path / "five.safetensors"), world, ["a", "b"], 4, 1)
    assert torch.equal(run.model.patch_embed[0].c.weight, source.patch_embed[0].c.weight)
    assert run.model.head.l.weight.shape[0] == 2
    write_checkpoint(timm.utils.reparameterize_model(source.eval()).state_dict(), tmp_path / "deployed.safetensors")
    with pytest.raises(InputError, match="holds a deployed model"):
        set_up(replace(recipe, checkpoint=tmp_path / "deployed.safetensors"), world, ["a", "b"], 4, 1)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_teacher_teaches_the_second_head_in_its_own_normalisation(recipe, kind, tmp_path):
    """Against the loss written out by hand."""
    teacher = timm.create_model("test_efficientnet", num_classes=2).eval()  # mean and std of 0.5
    write_checkpoint(teacher.state_dict(), tmp_path / "teacher.safetensors")
    distill = Distill("test_efficientnet", tmp_path / "teacher.safetensors", kind=kind, alpha=0.3, tau=2.0)
    world = World(0, 1, torch.device("cpu"))
    recipe = replace(recipe, distill=distill)
    classes, feed = open_training(recipe, world, 1)
    run = set_up(recipe, world, classes, 4, 1)
    run.model.train()
    batch = next(feed.batches(0, 1))
    images, targets = run.augment(batch, 0, 0)
    head, second = run.model(images)
    mean, std = (torch.tensor(teacher.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    assert mean.flatten().tolist() != list(run.model.pretrained_cfg["mean"])
    answers = teacher((batch.images / 255 - mean) / std)
    labels = torch.nn.functional.cross_entropy(head, targets, label_smoothing=0.1)
    if kind == "soft":
        p, q = (answers / 2).softmax(1), (second / 2).log_softmax(1)
        taught = 4 * (p * (p.log() - q)).sum(1).mean()
    else:
        taught = torch.nn.functional.cross_entropy(second, answers.argmax(1))
    found = run.task(images, targets)["loss"]
    assert found.item() == pytest.approx((0.7 * labels + 0.3 * taught).item(), rel=1e-4)
    found.backward()
    assert all(p.grad is None for p in run.task.teacher.parameters() if p.requires_grad is False)
    result = train(replace(recipe, epochs=1), tmp_path / "run")
    assert timm.create_model("shvit_s1", num_classes=2, distilled=True, checkpoint_path=result["checkpoint"])


# --- other processes --------------------------------------------------------------------------------------------------


def command(recipe: Recipe, folder: Path, *options: str) -> list[str]:
    """`shvit train` of this recipe in a process of its own."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe.as_dict()))
    return [sys.executable, *options, "-m", "shvit.train", "--recipe", str(file), "--output", str(folder)]


def torchrun(*options: str) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", *options)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_sigterm_leaves_a_state_within_two_seconds_in_the_middle_of_a_long_step(photographs, tmp_path):
    slow = Recipe(  # a step of many seconds
        model="shvit_s2", img_size=384, epochs=1, batch_size=32, data=Data(root=photographs, workers=1), augment=PLAIN
    )
    folder = tmp_path / "run"
    process = subprocess.Popen(command(slow, folder), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    wait_for(lambda: (folder / "tensorboard").exists())
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    wait_for((folder / "last.pt").exists, seconds=2)
    assert process.wait(timeout=30) == 143
    assert state(folder)["step"] == 0


def test_two_processes_train_as_one(small, tmp_path):
    """With BatchNorm frozen, and nothing drawn for a process's own part of the batch, the losses are equal."""
    recipe = replace(small, epochs=5, freeze_bn=True, augment=PLAIN, optim=Optim(lr=1e-2), save=Save(log_steps=1))
    train(recipe, tmp_path / "one")
    out = finish(command(recipe, tmp_path / "two", *torchrun("--standalone", "--nproc-per-node=2")))
    assert "batch 8 = 2 processes × 1 turns × 4" in out
    result = json.loads(out.splitlines()[-1])
    assert result["n_val"] == 12  # each once
    losses = []
    for name in ("one", "two"):
        events = EventAccumulator(str(tmp_path / name / "tensorboard"))
        events.Reload()
        losses.append([event.value for event in events.Scalars("train/loss")])
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    one, two = (state(tmp_path / name)["log"] for name in ("one", "two"))
    assert [entry["train_loss"] for entry in two] == pytest.approx([entry["train_loss"] for entry in one], abs=1e-5)
    assert [entry["top1"] for entry in two] == [entry["top1"] for entry in one]


def test_benchmark_measures_all_that_it_promises(small, capsys):
    from shvit.train.speed import benchmark

    recipe = replace(small, data=replace(small.data, workers=1))
    result = benchmark(recipe, 3)
    assert (result["model"], result["batch_size"], result["steps"], result["workers"]) == (SMALL, 8, 3, 1)
    speeds = {name: value for name, value in result.items() if name.endswith("_per_s")}
    assert len(speeds) == 5
    assert all(value > 0 for value in [*speeds.values(), result["speedup"], result["peak_memory_mb"]])
    assert result["loader_scaling"] == 1
    assert "loader alone, 1 worker" in capsys.readouterr().out


# --- long proofs ------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kills_change_nothing(small, tmp_path, workers):
    often = replace(small, epochs=150, data=replace(small.data, workers=workers), save=Save(every_minutes=0.003))
    finish(command(often, tmp_path / "whole"))
    draw, kills = random.Random(workers), 0
    while kills < 10:
        process = subprocess.Popen(command(often, tmp_path / "cut"), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        last = tmp_path / "cut" / "last.pt"
        before = last.stat().st_mtime_ns if last.exists() else 0
        wait_for(lambda: process.poll() is not None or (last.exists() and last.stat().st_mtime_ns > before))  # noqa: B023
        time.sleep(draw.uniform(0, 0.5))
        assert process.poll() is None, f"finished after {kills} kills"
        process.kill()
        process.wait()
        kills += 1
    finish(command(often, tmp_path / "cut"))
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_elastic_restarts_a_killed_process_and_ends_the_same(small, tmp_path):
    often = replace(small, epochs=100, save=Save(every_minutes=0.003))
    elastic = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=3")
    finish(command(often, tmp_path / "whole", *elastic))
    process = subprocess.Popen(command(often, tmp_path / "cut", *elastic), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "cut" / "last-1.pt").exists())
    listed = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(listed[-1]), signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_two_nodes_end_as_one_node_of_two(small, tmp_path):
    recipe = replace(small, epochs=10)
    finish(command(recipe, tmp_path / "one", *torchrun("--standalone", "--nproc-per-node=2")))
    nodes = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    argv = command(recipe, tmp_path / "two", *torchrun(*nodes))
    processes = [subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert_same_end(tmp_path / "one", tmp_path / "two")
