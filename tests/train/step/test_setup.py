"""What a step computes: against plain PyTorch, with gradient accumulation, in other precisions, and with a teacher."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from shvit.checkpoint import write_checkpoint
from shvit.errors import InputError
from shvit.train.distributed import World
from shvit.train.loop import train
from shvit.train.recipe import Augment, Compute, Data, Distill, Optim, Recipe
from shvit.train.step.batch import Batch
from shvit.train.step.samplers import micro_batch_sizes
from shvit.train.step.setup import check_recipe, open_training, set_up
from tests.conftest import SMALL


def steps(recipe: Recipe, count: int, accum_steps: int | None = None):
    """The losses of the first steps, and the run behind them."""
    world = World(0, 1, torch.device("cpu"))
    accum_steps = accum_steps or check_recipe(recipe, world)
    classes, loader = open_training(recipe, world, accum_steps)
    run = set_up(recipe, world, classes, loader.steps_per_epoch, accum_steps)
    run.train_mode()
    batches = loader.batches(0, count)
    losses = []
    for _ in range(count):
        loss = run.forward_backward([next(batches) for _ in range(accum_steps)])
        run.update(loss)
        losses.append(loss.item())
    return losses, run


def test_step_is_that_of_plain_pytorch(recipe):
    """Against torch's own AdamW on the same batches, without clipping."""
    plain = replace(recipe, model=SMALL, optim=Optim(lr=1e-1, warmup_epochs=0, clip_grad=None, weight_decay=0.1))
    losses, run = steps(plain, 3)
    world = World(0, 1, torch.device("cpu"))
    classes, loader = open_training(plain, world, 1)
    fresh = set_up(plain, world, classes, loader.steps_per_epoch, 1)
    model = fresh.model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plain.peak_lr, eps=1e-8, betas=(0.9, 0.999))
    expected = []
    for step, batch in enumerate(loader.batches(0, 3)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-5 + (plain.peak_lr - 1e-5) * (1 + np.cos(np.pi * step / 8)) / 2
        images, targets = fresh.augment(batch, step, 0)
        loss = torch.nn.functional.cross_entropy(model(images), targets, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(run.model.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_are_those_of_the_whole_batch(recipe):
    """With BatchNorm's statistics frozen: each micro-batch would otherwise have its own."""
    whole = replace(recipe, model=SMALL, freeze_bn=True)
    small_device = replace(whole, compute=Compute(device_batch_size=2))
    (one, first), (four, second) = steps(whole, 6), steps(small_device, 6)
    assert (first.accum_steps, second.accum_steps) == (1, 4)
    assert four == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "device", "mixup", "sizes"),
    [
        (67, 64, 0.0, [34, 33]),
        (65, 64, 0.0, [33, 32]),
        (7, 3, 0.0, [3, 2, 2]),
        (96, 64, 0.0, [48, 48]),
        (66, 64, 0.2, [34, 32]),
        (10, 5, 0.2, [4, 4, 2]),
    ],
)
def test_micro_batches_fit_the_device_and_leave_no_image_alone(recipe, batch, device, mixup, sizes):
    augment = replace(recipe.augment, mixup=mixup)
    whole = replace(recipe, batch_size=batch, augment=augment, compute=Compute(device_batch_size=device))
    accum_steps = check_recipe(whole, World(0, 1, torch.device("cpu")))
    assert micro_batch_sizes(batch, accum_steps, whole.pairs) == sizes


def test_unequal_micro_batches_count_every_image_alike(recipe):
    """With BatchNorm's statistics frozen, 8 images as 3 + 3 + 2 are the step of 8."""
    whole = replace(recipe, model=SMALL, freeze_bn=True)
    (one, first), (three, second) = steps(whole, 4), steps(replace(whole, compute=Compute(device_batch_size=3)), 4)
    assert (first.accum_steps, second.accum_steps) == (1, 3)
    assert three == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(first.model.state_dict(), second.model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "fields", "processes"),
    [
        ("tiny_vit", {"batch_size": 1}, 1),
        ("tiny_vit", {"batch_size": 2}, 2),
        ("tiny_vit", {"compute": Compute(device_batch_size=1)}, 1),
        ("tiny_vit", {"batch_size": 3, "compute": Compute(device_batch_size=2)}, 1),
        ("test_resnet", {"batch_size": 1, "first_img_size": 16}, 1),
    ],
)
def test_batchnorm_is_never_given_one_image(recipe, model, fields, processes):
    """timm's test_resnet has maps of one pixel where an image has 16: that PyTorch refuses, and 32 px it takes."""
    alone = replace(recipe, model=model, **fields)
    world = World(0, processes, torch.device("cpu"))
    with pytest.raises(InputError, match=r"needs two images .* leaves one; choose a larger one, or give --freeze"):
        check_recipe(alone, world)
    assert check_recipe(replace(alone, freeze_bn=True), world)


def test_models_that_take_one_image_are_trained_on_one(recipe):
    """LayerNorm sees one image at a time anyway; frozen BatchNorm sees none."""
    one = replace(recipe, batch_size=1)
    for each in (replace(one, model="test_vit"), replace(one, model="tiny_vit", freeze_bn=True)):
        losses, _ = steps(each, 2)
        assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("model", "img_size", "message"),
    [
        ("test_vit", 40, r"test_vit cannot be trained on images of 40 px \(.*\); choose another size, such as 160 px"),
        ("xcit_nano_12_p16_224", 33, r"cannot be created at 33 px \(`patch_size` should .*\); choose .* such as 224"),
        ("levit_128s", 33, "levit_128s cannot be trained on images of 33 px"),
    ],
)
def test_model_that_does_not_take_the_images_is_reported_before_training(recipe, model, img_size, message):
    with pytest.raises(InputError, match=message):
        set_up(replace(recipe, model=model, img_size=img_size), World(0, 1, torch.device("cpu")), ["a", "b"], 4, 1)


def test_trying_a_model_leaves_it_as_it_was(recipe):
    run = set_up(replace(recipe, model=SMALL), World(0, 1, torch.device("cpu")), ["a", "b"], 4, 1)
    assert int(run.model.bn1.num_batches_tracked) == 0
    assert torch.equal(run.model.bn1.running_mean, torch.zeros_like(run.model.bn1.running_mean))


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
    recipe, world = replace(recipe, model="shvit_s1"), World(0, 1, torch.device("cpu"))
    run = set_up(replace(recipe, checkpoint=tmp_path / "five.safetensors"), world, ["a", "b"], 4, 1)
    assert torch.equal(run.model.patch_embed[0].c.weight, source.patch_embed[0].c.weight)
    assert run.model.head.l.weight.shape[0] == 2
    write_checkpoint(timm.utils.reparameterize_model(source.eval()).state_dict(), tmp_path / "deployed.safetensors")
    with pytest.raises(InputError, match="holds a deployed model"):
        set_up(replace(recipe, checkpoint=tmp_path / "deployed.safetensors"), world, ["a", "b"], 4, 1)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_teacher_teaches_the_second_head_in_its_own_normalization(recipe, kind, tmp_path):
    """Against the loss written out by hand."""
    teacher = timm.create_model("test_efficientnet", num_classes=2).eval()  # mean and std of 0.5
    write_checkpoint(teacher.state_dict(), tmp_path / "teacher.safetensors")
    distill = Distill("test_efficientnet", tmp_path / "teacher.safetensors", kind=kind, alpha=0.3, tau=2.0)
    world = World(0, 1, torch.device("cpu"))
    recipe = replace(recipe, distill=distill)
    classes, loader = open_training(recipe, world, 1)
    run = set_up(recipe, world, classes, 4, 1)
    run.model.train()
    batch = next(loader.batches(0, 1))
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
    assert timm.create_model("tiny_vit", num_classes=2, distilled=True, checkpoint_path=result["checkpoint"])


@pytest.mark.parametrize(("img_size", "first_img_size"), [(32, None), (32, 16), ((32, 64), 32)])
def test_teacher_of_one_size_sees_resized_images(recipe, img_size, first_img_size, tmp_path):
    """Against torchvision's resize. timm's test_vit takes 160 px alone, and has another mean and standard deviation."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    teacher = timm.create_model("test_vit", num_classes=2).eval()
    write_checkpoint(teacher.state_dict(), tmp_path / "teacher.safetensors")
    distill = Distill("test_vit", tmp_path / "teacher.safetensors")
    recipe = replace(recipe, distill=distill, img_size=img_size, first_img_size=first_img_size)
    run = set_up(recipe, World(0, 1, torch.device("cpu")), ["a", "b"], 4, 1)
    for size in {recipe.img_size_at(epoch) for epoch in range(recipe.epochs)}:
        images = torch.randn(2, 3, *size)
        expected = teacher(resize(images, [160, 160], InterpolationMode.BICUBIC, antialias=True))
        torch.testing.assert_close(run.task.teacher(images), expected)
    run.train_mode()
    loss = run.forward_backward([Batch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]))])
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_resnet", {"num_classes": 3}, "the teacher test_resnet knows 3 classes and the images have 2"),
        ("test_resnet", {"in_chans": 1}, "does not fit ResNet of this variant"),
        ("shvit_s1", {"in_chans": 1}, "the teacher shvit_s1 accepts no images of three channels"),
        ("test_vit", {"img_size": 64}, "does not fit VisionTransformer of this variant: pos_embed is"),
    ],
)
def test_teacher_that_cannot_teach_is_refused(recipe, name, options, message, tmp_path):
    teacher = timm.create_model(name, **{"num_classes": 2, **options})
    write_checkpoint(teacher.state_dict(), tmp_path / "teacher.safetensors")
    distill = Distill(name, tmp_path / "teacher.safetensors")
    with pytest.raises(InputError, match=message):
        set_up(replace(recipe, distill=distill), World(0, 1, torch.device("cpu")), ["a", "b"], 4, 1)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_teacher_trained_at_the_students_size_is_built_for_it(recipe, size, tmp_path):
    teacher = timm.create_model("test_vit", num_classes=2, img_size=size).eval()
    write_checkpoint(teacher.state_dict(), tmp_path / "teacher.safetensors")
    recipe = replace(recipe, img_size=size, distill=Distill("test_vit", tmp_path / "teacher.safetensors"))
    run = set_up(recipe, World(0, 1, torch.device("cpu")), ["a", "b"], 4, 1)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(run.task.teacher(images), teacher(images))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optim": Optim(eps=0.0)}, r"--optim\.eps 0\.0 is out of range"),
        ({"optim": Optim(betas=(0.9, 1.0))}, r"--optim\.betas 0\.9 1\.0: choose from 0 to below 1"),
        ({"optim": Optim(betas=(float("nan"), 0.9))}, r"--optim\.betas nan 0\.9"),
        ({"augment": Augment(scale=(0.5, 0.1))}, r"--augment\.scale 0\.5 0\.1 is out of range"),
        ({"augment": Augment(scale=(0.0, 0.0))}, r"--augment\.scale 0\.0 0\.0 is out of range"),
        ({"augment": Augment(ratio=(float("nan"), 1.0))}, r"--augment\.ratio nan 1\.0 is out of range"),
        ({"data": Data(num_classes=-1)}, "--data.num-classes -1 is out of range"),
        ({"data": Data(num_classes=3)}, "--data.num-classes does not apply: there is no --data.name; leave it out"),
        ({"data": Data(val_split="test")}, "--data.val-split does not apply: there is no --data.name"),
        (
            {"distill": Distill(checkpoint=Path("x.pt"), tau=2.0)},
            "--distill.checkpoint and --distill.tau do not apply: there is no --distill.teacher; leave them out",
        ),
        ({"model": "test_resnet", "distill": Distill("test_vit")}, "test_resnet has no second head for a teacher"),
    ],
)
def test_fields_that_make_no_sense_are_refused(recipe, fields, message):
    with pytest.raises(InputError, match=message):
        steps(replace(recipe, **fields), 1)
