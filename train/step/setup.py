"""From a recipe to everything that a step needs: model, task, optimizer, schedule and batches."""

from dataclasses import replace
from typing import Any

import torch
from timm.data import create_transform, resolve_data_config
from timm.task import ClassificationTask, TokenDistillationTask
from timm.task.task import TrainingTask
from timm.utils import random_seed
from torch import nn

import shvit.shvit  # noqa: F401  (registers the models)
from shvit.errors import InputError

from ..checks import check_fields
from ..data.datasets import Splits, any_readable, open_splits
from ..data.eval_loader import EvalBatches, eval_loader
from ..data.streams import is_stream, open_stream
from ..distributed import World
from ..recipe import Recipe
from .augment import DeviceAugment
from .loader import Feed
from .model import check_model, create_train_model, trained_on_others
from .optim import create_optimizer, create_scheduler
from .samplers import micro_batch_sizes
from .state import Run
from .teacher import Teacher, create_teacher


def check_recipe(recipe: Recipe, world: World) -> int:
    """The number of turns in which a process does its share of a batch.

    Raises:
        InputError: a field is out of range or does not apply, or the batch cannot be divided.
    """
    check_fields(recipe)
    if recipe.compute.sync_bn and world.device.type != "cuda":
        raise InputError("--compute.sync-bn needs CUDA; PyTorch has no SyncBatchNorm on the CPU")
    if recipe.compute.precision == "fp16" and world.device.type != "cuda":
        raise InputError("--compute.precision fp16 needs CUDA; the CPU has bf16")
    turns = _turns(recipe, world)
    alone = micro_batch_sizes(recipe.batch_size // world.size, turns, recipe.pairs)[-1] == 1
    if alone and not (recipe.compute.sync_bn and world.size > 1):
        untrained = replace(recipe, checkpoint=None, pretrained=False)
        check_model(create_train_model(untrained, 2), recipe, 2, alone=True)
    return turns


def _turns(recipe: Recipe, world: World) -> int:
    """The fewest turns whose parts fit the device; of a stream, whose loader gives equal ones alone, equal parts."""
    share, rest = divmod(recipe.batch_size, world.size)
    if rest or not share:
        raise InputError(f"--batch-size {recipe.batch_size} is over all {world.size} processes; give a multiple of it")
    whole, single = divmod(share, recipe.pairs)
    largest = min(recipe.compute.device_batch_size // recipe.pairs, whole)
    if single or not largest:
        size = share if single else recipe.compute.device_batch_size
        raise InputError(f"mixup and cutmix pair images, and {size} of a batch are done at once; choose "
                         "--batch-size and --compute.device-batch-size so that this is even")  # fmt: skip
    turns = -(-whole // largest)
    if is_stream(recipe.data):
        turns = next(turns for turns in range(turns, whole + 1) if whole % turns == 0)
    return turns


def set_up(recipe: Recipe, world: World, classes: list[str], steps_per_epoch: int, turns: int) -> Run:
    """A run at its first step. The model is made and loaded alike in every process."""
    random_seed(recipe.seed)
    torch.use_deterministic_algorithms(recipe.compute.deterministic)
    torch.backends.cudnn.benchmark = not recipe.compute.deterministic
    model = create_train_model(recipe, len(classes), classes)
    config = resolve_data_config({"input_size": (3, recipe.img_size, recipe.img_size)}, model=model)
    check_model(model, recipe, len(classes))
    if recipe.compute.grad_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]  # every model of timm has it
        except AssertionError as error:
            raise InputError(f"{recipe.model} cannot do --compute.grad-checkpointing; leave it out") from error
    if recipe.compute.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(world.device)
    if recipe.compute.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer(recipe, model)
    if recipe.distill.checkpoint is not None and trained_on_others(recipe.distill.checkpoint, classes):
        raise InputError(f"{recipe.distill.checkpoint}: the teacher was trained on other classes than these images', "
                         "or on the same in another order; give one of these classes")  # fmt: skip
    task = _create_task(recipe, model, world.device, len(classes))
    task.setup_ema(recipe.ema_decay, recipe.ema_warmup)
    if recipe.compute.compile:
        task.compile()
    if world.size > 1:
        task.prepare_distributed(world.device_ids)
    return Run(
        recipe=recipe,
        world=world,
        model=model,
        task=task,
        optimizer=optimizer,
        scheduler=create_scheduler(recipe, optimizer, steps_per_epoch),
        scaler=torch.amp.GradScaler(world.device.type, enabled=recipe.compute.precision == "fp16"),
        augment=DeviceAugment(recipe, len(classes), config["mean"], config["std"], world),
        turns=turns,
        steps_per_epoch=steps_per_epoch,
    )


def _create_task(recipe: Recipe, model: nn.Module, device: torch.device, num_classes: int) -> TrainingTask:
    """The loss of one batch: timm's classification, or distillation into a second head."""
    loss = {"smoothing": recipe.augment.smoothing, "soft_targets": recipe.mixes}
    distill = recipe.distill
    if distill.teacher is None:
        return ClassificationTask(model, criterion_kwargs=loss, device=device, verbose=False)
    return TokenDistillationTask(
        model,
        Teacher(create_teacher(recipe, num_classes).to(device), device, recipe),
        criterion_kwargs=loss,
        distill_type=distill.kind,
        task_loss_weight=1 - distill.alpha,
        temperature=distill.tau,
        device=device,
        verbose=False,
    )


def open_training(recipe: Recipe, world: World, turns: int, splits: Splits | None = None) -> tuple[list[str], Feed]:
    """Class names and this process's training batches, of `splits` where they are open already."""
    if is_stream(recipe.data):
        classes = open_stream(recipe.data, "train", is_training=True).classes
        feed = Feed(recipe, None, world, turns)
    else:
        dataset = (splits or open_splits(recipe.data)).train
        classes, feed = dataset.classes, Feed(recipe, dataset, world, turns)
    if not classes:
        raise InputError(f"{recipe.data.name}: does not tell its classes; give --data.num-classes")
    return classes, feed


def open_held_out(
    recipe: Recipe, world: World, config: dict[str, Any], splits: Splits | None
) -> tuple[EvalBatches, int | None]:
    """This process's validation images, and how many all processes have where that is known."""
    size = 2 * min(recipe.compute.device_batch_size, recipe.batch_size)
    transform = create_transform(**config)
    workers = recipe.data.workers
    if splits is None:
        allowed = recipe.data.max_corrupt
        return eval_loader(open_stream(recipe.data, "val"), transform, size, workers, allowed, allowed), None
    dataset = splits.val
    if not any_readable(dataset, range(len(dataset))):
        raise InputError(f"none of the {len(dataset)} validation images can be read, {dataset.name(0)} for one; "
                         "replace them")  # fmt: skip
    mine = dataset.every(world.size, world.rank)
    return eval_loader(mine, transform, size, workers, max_corrupt=None), len(dataset)
