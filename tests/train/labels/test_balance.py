"""Class weights and balanced sampling: against PyTorch's and scikit-learn's formulas, and counts of long draws."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy

from shvit.checkpoint import write_checkpoint
from shvit.errors import InputError
from shvit.train.data.datasets import Images, Splits
from shvit.train.data.image_folders import Files
from shvit.train.distributed import World
from shvit.train.labels.balance import ClassWeightedCrossEntropy, balanced_class_weight, image_weights
from shvit.train.labels.statistics import LabelStatistics
from shvit.train.loop import train
from shvit.train.recipe import Augment, Compute, Data, Distill, Optim, Recipe
from shvit.train.run.summary import describe_balance
from shvit.train.step.batch import Batch
from shvit.train.step.loader import TrainLoader
from shvit.train.step.samplers import MicroBatchSampler, StepSampler
from shvit.train.step.setup import check_recipe, open_training, set_up
from tests.conftest import PLAIN, SMALL
from tests.train.forked import start_torchrun

CPU = torch.device("cpu")
COUNTS = [240, 45, 15]
A, B = Path("a.png"), Path("b.png")
TARGETS = [0] * 240 + [1] * 45 + [2] * 15


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory):
    """28 red and 4 blue images for training, and 4 of each for validation."""
    root = tmp_path_factory.mktemp("unbalanced")
    rng = np.random.default_rng(0)
    for split, name, count in (("train", "red", 28), ("train", "blue", 4), ("val", "red", 4), ("val", "blue", 4)):
        (root / split / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 80, (40, 40, 3), dtype=np.uint8)
            pixels[..., 0 if name == "red" else 2] += 150
            Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def rare(recipe, unbalanced):
    return replace(recipe, model=SMALL, data=Data(root=unbalanced, workers=0))


def world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, CPU)


def drawn(order: StepSampler, start: int, end: int) -> list[int]:
    return [index for step in range(start, end) for _, index in order.batch(step)]


# --- class weights ----------------------------------------------------------------------------------------------------


def test_class_weights_are_those_of_scikit_learn_and_their_mean_over_images_is_one():
    weights = balanced_class_weight(COUNTS)
    assert weights.tolist() == pytest.approx([300 / (3 * 240), 300 / (3 * 45), 300 / (3 * 15)])
    assert weights[TARGETS].mean().item() == pytest.approx(1)


def test_weighted_loss_without_smoothing_is_pytorchs():
    logits, targets = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    weight = balanced_class_weight(COUNTS)
    each = torch.nn.functional.cross_entropy(logits, targets, weight, reduction="none")
    mixed = mixup_target(targets, 3, lam=0.3)
    found = ClassWeightedCrossEntropy(weight, 0.0)
    assert found(logits, targets).item() == pytest.approx(each.mean().item(), rel=1e-6)
    expected = torch.nn.functional.cross_entropy(logits, mixed, weight)  # of mixed labels it is the mean over images
    assert found(logits, mixed).item() == pytest.approx(expected.item(), rel=1e-6)


def test_smoothed_loss_of_an_image_is_multiplied_by_the_weight_of_its_class():
    logits, targets = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    weight = balanced_class_weight(COUNTS)
    found = ClassWeightedCrossEntropy(weight, 0.1)
    plain = [torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1, reduction="none")
             for y in (targets, targets.flip(0))]  # fmt: skip
    assert found(logits, targets).item() == pytest.approx((weight[targets] * plain[0]).mean().item(), rel=1e-6)
    mixed = 0.3 * weight[targets] * plain[0] + 0.7 * weight[targets.flip(0)] * plain[1]
    assert found(logits, mixup_target(targets, 3, lam=0.3)).item() == pytest.approx(mixed.mean().item(), rel=1e-6)


def test_mixed_labels_are_smoothed_once(rare):
    mixed = replace(rare, class_weight="balanced", augment=replace(PLAIN, mixup=0.4, smoothing=0.1))
    run = set_up(mixed, world(), ["blue", "red"], 4, 1, LabelStatistics(32, [4, 28]))
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = Batch(pixels, torch.tensor([0, 1, 1, 1, 0, 1]))
    images, targets = run.augment(batch, 0, 0)
    assert targets.max() == 1  # of two images of one class, which timm would smooth
    logits = run.model.train()(images)
    smoothed = 0.9 * targets + 0.1 * targets.new_tensor([[0.5, 0.5]])
    unweighted = ClassWeightedCrossEntropy(torch.ones(2), 0.1)(logits, targets)
    assert unweighted.item() == pytest.approx(SoftTargetCrossEntropy()(logits, smoothed).item(), rel=1e-5)
    weight = torch.tensor([32 / 8, 32 / 56])
    each = (targets * weight * -logits.log_softmax(1)).sum(1)
    uniform = -logits.log_softmax(1).mean(1)
    expected = (0.9 * each + 0.1 * (targets @ weight) * uniform).mean()
    assert run.task(images, targets)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def losses(recipe: Recipe, count: int) -> list[float]:
    accum_steps = check_recipe(recipe, world())
    classes, loader = open_training(recipe, world(), accum_steps)
    run = set_up(recipe, world(), classes, loader.steps_per_epoch, accum_steps, loader.statistics)
    batches, found = loader.batches(0, count), []
    for _ in range(count):
        run.train_mode()
        loss = run.forward_backward([next(batches) for _ in range(accum_steps)])
        run.update(loss)
        found.append(loss.item())
    return found


def test_weighted_steps_are_those_of_plain_pytorch_in_any_number_of_parts(rare):
    """The parts of a batch have unequal sums of class weights, by which PyTorch would divide."""
    weighted = replace(
        rare, class_weight="balanced", freeze_bn=True, optim=Optim(lr=1e-1, warmup_epochs=0, clip_grad=None)
    )
    classes, loader = open_training(weighted, world(), 1)
    run = set_up(weighted, world(), classes, 4, 1, loader.statistics)
    run.train_mode()
    images, targets = run.augment(next(loader.batches(0, 1)), 0, 0)
    each = torch.nn.functional.cross_entropy(run.model(images), targets, label_smoothing=0.1, reduction="none")
    whole = losses(weighted, 6)
    assert whole[0] == pytest.approx((torch.tensor([32 / 8, 32 / 56])[targets] * each).mean().item(), rel=1e-5)
    assert whole[0] != pytest.approx(losses(replace(weighted, class_weight=None), 1)[0], rel=1e-2)
    assert losses(replace(weighted, compute=Compute(device_batch_size=3)), 6) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_weighted_loss_is_computed_in_float32_in_bf16_runs(rare, mixup):
    weighted = replace(rare, class_weight="balanced", augment=replace(PLAIN, mixup=mixup))
    (reference,) = losses(weighted, 1)
    (found,) = losses(replace(weighted, compute=Compute(precision="bf16")), 1)
    assert found == pytest.approx(reference, rel=2e-2)


def test_loss_of_the_teacher_has_no_class_weights(rare, tmp_path):
    teacher = timm.create_model("test_efficientnet", num_classes=2).eval()
    write_checkpoint(teacher.state_dict(), tmp_path / "teacher.safetensors")
    distill = Distill("test_efficientnet", tmp_path / "teacher.safetensors", alpha=0.3)
    recipe = replace(rare, model="tiny_vit", distill=distill, class_weight="balanced")
    run = set_up(recipe, world(), ["blue", "red"], 4, 1, LabelStatistics(32, [4, 28]))
    run.model.train()
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0])
    head, second = run.model(images)
    each = torch.nn.functional.cross_entropy(head, targets, label_smoothing=0.1, reduction="none")
    labels = (torch.tensor([32 / 8, 32 / 56])[targets] * each).mean()
    taught = torch.nn.functional.cross_entropy(second, run.task.teacher(
        run.task.teacher.normalize_input(images, run.task.student_mean, run.task.student_std)
    ).argmax(1))  # fmt: skip
    found = run.task(images, targets)["loss"]
    assert found.item() == pytest.approx((0.7 * labels + 0.3 * taught).item(), rel=1e-4)


# --- balanced sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_classes_are_drawn_in_proportion_to_their_images_to_a_power(strength, repeats):
    """In 200 epochs, within five standard deviations; copies of repeated augmentation come in threes."""
    order = StepSampler(300, 50, repeats, 0, image_weights(TARGETS, COUNTS, strength))
    indices = drawn(order, 0, 200 * order.steps_per_epoch)
    counts = np.bincount(np.array(TARGETS)[indices], minlength=3)
    powers = np.array(COUNTS) ** (1 - strength)
    chances = powers / powers.sum()
    n = len(indices)
    assert np.all(np.abs(counts - n * chances) < 5 * np.sqrt(n * repeats * chances * (1 - chances)))
    of_images = np.bincount(indices, minlength=300)[240:]  # of the two rarer classes
    assert of_images.min() > 0
    assert of_images[:45].mean() == pytest.approx(n * chances[1] / 45, rel=0.05)


def test_epoch_keeps_its_length_and_neighbors_their_copies():
    weights = image_weights(TARGETS, COUNTS, 1.0)
    for repeats in (1, 3):
        plain, balanced = (StepSampler(300, 50, repeats, 0, given) for given in (None, weights))
        assert balanced.steps_per_epoch == plain.steps_per_epoch
        assert [place for place, _ in balanced.batch(7)] == [place for place, _ in plain.batch(7)]
    indices = drawn(balanced, 0, 1)
    assert all(len(set(indices[start : start + 3])) == 1 for start in range(0, 48, 3))


def test_draws_follow_from_seed_and_epoch_alone():
    weights = image_weights(TARGETS, COUNTS, 1.0)
    whole = drawn(StepSampler(300, 50, 1, 0, weights), 0, 12)
    torch.manual_seed(1)
    assert drawn(StepSampler(300, 50, 1, 0, weights), 5, 12) == whole[250:]
    other = drawn(StepSampler(300, 50, 1, 1, weights), 0, 12)
    draws = [sorted(epoch) for epoch in (whole[:300], whole[300:], other[:300], other[300:])]
    assert all(draws.count(draw) == 1 for draw in draws)  # other images, not only another order
    order = StepSampler(300, 50, 1, 0, weights)
    shares = [[key for batch in MicroBatchSampler(order, 3, 9, rank, 2, 1) for key in batch] for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == [(150 + place, index) for place, index in enumerate(whole[150:450])]


@pytest.mark.parametrize("workers", [0, 1])
def test_balanced_batches_resume_in_the_middle_of_an_epoch(rare, workers):
    balanced = replace(rare, balanced_sampling=1.0, augment=Augment(repeats=1))
    _, loader = open_training(balanced, world(), 1)
    whole = list(loader.batches(0, 8))
    other = replace(balanced, data=replace(balanced.data, workers=workers))
    again = list(open_training(other, world(), 1)[1].batches(3, 8))
    assert all(torch.equal(a.images, b.images) for a, b in zip(again, whole[3:], strict=True))
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(again, whole[3:], strict=True))
    blue = sum(int((batch.targets == 0).sum()) for batch in whole)
    assert 17 <= blue <= 47  # of 64 with equal chances, within 3.75 standard deviations; 8 as they are


def test_no_balancing_leaves_the_order_as_it_was(rare):
    _, loader = open_training(rare, world(), 1)
    assert loader.statistics.class_counts is None
    assert sorted(drawn(loader.sampler, 0, 4)) == list(range(32))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"class_weight": "balanced"}, {"balanced_sampling": 1.0}])
def test_two_processes_balance_as_one(rare, fields, tmp_path):
    """With BatchNorm frozen, so that a process's part of the batch does not matter."""
    recipe = replace(rare, epochs=1, freeze_bn=True, optim=Optim(lr=1e-2), **fields)
    train(recipe, tmp_path / "one")
    process = start_torchrun(2, recipe, tmp_path / "two", tmp_path / "stdout", tmp_path / "stderr")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "stderr").read_text()
    one, two = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("one", "two"))
    assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
    for name in ("balanced_top1", "ema_balanced_top1"):
        assert two[name] == one[name] >= 0


def test_run_says_what_it_balances_and_logs_the_balanced_accuracy(rare, tmp_path, capsys):
    train(replace(rare, epochs=1, class_weight="balanced"), tmp_path / "run")
    assert "class weights of the loss: 4 for blue (4 training images) to 0.571 for red (28" in capsys.readouterr().out
    entry = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert entry["balanced_top1"] == pytest.approx(entry["top1"])  # four validation images of each
    sampled = describe_balance(replace(rare, balanced_sampling=0.5), ["a", "b"], LabelStatistics(100, [10, 90]))
    assert sampled == (
        "balanced sampling of strength 0.5: an epoch is about 25 % a (10 training images, 10 %) and 75 % b "
        "(90 training images, 90 %)"
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"balanced_sampling": 1.5}, r"--balanced-sampling 1\.5 is out of range; choose 0 to 1"),
        ({"balanced_sampling": float("nan")}, r"--balanced-sampling nan is out of range"),
        ({"balanced_sampling": 0.5, "class_weight": "balanced"}, "--class-weight and --balanced-sampling both make up"),
        (
            {"class_weight": "balanced", "data": Data(name="wds/", num_classes=2)},
            r"--class-weight does not apply: a stream \(wds/\) does not tell the number of images",
        ),
        ({"balanced_sampling": 1.0, "data": Data(name="hfids/x")}, "--balanced-sampling does not apply: a stream"),
    ],
)
def test_balancing_that_cannot_be_done_is_refused(rare, fields, message):
    with pytest.raises(InputError, match=message) as error:
        check_recipe(replace(rare, **fields), world())
    assert "\n" not in str(error.value)


class Unlisted:
    """A dataset that does not list one class for each item: none at all, pairs, or no numbers."""

    def __init__(self, targets: object = None):
        self.targets = targets

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        raise AssertionError("an image was read")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Unlisted(), "this dataset does not list them; leave these options out"),
        (Unlisted(torch.zeros(8, 2, dtype=torch.int64)), "this dataset does not list them"),
        (Unlisted([0, None] * 4), "this dataset does not list them"),
        (Files([(A, 0)] * 8), "no training image of b, so that it cannot be balanced"),
        (
            Files([(A, 0)] * 7 + [(B, 2)]),
            r"b\.png: of class 2, and there are 2, counted from 0",
        ),
    ],
)
def test_classes_that_cannot_be_counted_are_refused(rare, source, message):
    images = Images(source, ["a", "b"])
    with pytest.raises(InputError, match=message):
        open_training(replace(rare, class_weight="balanced"), world(), 1, Splits(images, images))


def test_tars_and_hugging_face_datasets_are_counted_without_reading_an_image(rare, unbalanced, tmp_path, monkeypatch):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(unbalanced / split, arcname="")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(unbalanced)
    monkeypatch.setattr(Images, "__getitem__", None)
    for data in (
        Data(root=tmp_path),
        Data(name="hfds/train", root=tmp_path / "cache", train_split="train", val_split="train"),
        Data(name="torch/image_folder", root=unbalanced, train_split="train", val_split="val"),
    ):
        classes, loader = open_training(replace(rare, balanced_sampling=1.0, data=data), world(), 1)
        assert (classes, loader.statistics.class_counts) == (["blue", "red"], [4, 28])


def test_loader_counts_its_own_part_of_the_images_and_weighs_it_by_the_strength():
    images = Images(Files([(A, 0), (B, 1), (A, 0), (B, 1)]), ["a", "b"], [0, 1, 2])
    recipe = Recipe(img_size=32, batch_size=2, augment=PLAIN, class_weight="balanced")
    assert TrainLoader(recipe, images, world(), 1).statistics.class_counts == [2, 1]
    sampled = TrainLoader(replace(recipe, class_weight=None, balanced_sampling=0.5), images, world(), 1)
    assert np.array(sampled.sampler.weights) * 2**0.5 / sampled.sampler.weights[1] == pytest.approx([1, 2**0.5, 1])
