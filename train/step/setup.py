"""Setup of a run: from a recipe to model, task, optimizer, schedule and data loaders."""

from collections.abc import Callable
from dataclasses import replace

import torch
from timm.task import ClassificationTask, TokenDistillationTask
from timm.task.task import TrainingTask
from timm.utils import random_seed
from torch import nn

import shvit.shvit  # noqa: F401  (registers the models)
from shvit.errors import InputError
from shvit.weights.run_info import RunInfo

from ..checks import check_fields
from ..data.datasets import Splits, any_readable
from ..data.eval_loader import EvalBatches, eval_loader
from ..data.pixels.preprocessing import Preprocessing, resolve_preprocessing
from ..data.streams import is_stream, open_stream
from ..distributed import World
from ..labels.losses import create_criterion
from ..labels.scale import OutputScale
from ..labels.splits import open_recipe_splits
from ..labels.statistics import LabelStatistics
from ..recipe import Recipe
from .augment import DeviceAugment
from .loader import TrainLoader
from .model import check_model, create_train_model, trained_on_others
from .optim import create_optimizer, create_scheduler
from .samplers import micro_batch_sizes
from .state import Run
from .teacher import Teacher, create_teacher


def check_recipe(recipe: Recipe, world: World) -> int:
    """Check a recipe, and return the number of gradient accumulation steps.

    Raises:
        InputError: a field is out of range or does not apply, or the batch cannot be divided.
    """
    check_fields(recipe)
    if recipe.compute.sync_bn and world.device.type != "cuda":
        raise InputError("--compute.sync-bn needs CUDA; PyTorch has no SyncBatchNorm on the CPU")
    if recipe.compute.precision == "fp16" and world.device.type != "cuda":
        raise InputError("--compute.precision fp16 needs CUDA; the CPU has bf16")
    accum_steps = _accum_steps(recipe, world)
    alone = micro_batch_sizes(recipe.batch_size // world.size, accum_steps, recipe.pairs)[-1] == 1
    if alone and not (recipe.compute.sync_bn and world.size > 1):
        untrained = replace(recipe, checkpoint=None, pretrained=False)
        check_model(create_train_model(untrained, 2), recipe, 2, alone=True)
    return accum_steps


def _accum_steps(recipe: Recipe, world: World) -> int:
    """Return the smallest number of accumulation steps that fits the device; equal parts, for a stream."""
    share, rest = divmod(recipe.batch_size, world.size)
    if rest or not share:
        raise InputError(
            f"--batch-size {recipe.batch_size} is divided over {world.size} processes; give a multiple of that"
        )
    whole, single = divmod(share, recipe.pairs)
    largest = min(recipe.compute.device_batch_size // recipe.pairs, whole)
    if single or not largest:
        size = share if single else recipe.compute.device_batch_size
        raise InputError(f"mixup and cutmix pair images, and {size} images are computed at once; choose "
                         "--batch-size and --compute.device-batch-size that make this number even")  # fmt: skip
    smallest = -(-whole // largest)
    if is_stream(recipe.data):
        return next(count for count in range(smallest, whole + 1) if whole % count == 0)
    return smallest


def set_up(
    recipe: Recipe,
    world: World,
    classes: list[str],
    steps_per_epoch: int,
    accum_steps: int,
    statistics: LabelStatistics = LabelStatistics(),  # noqa: B008  (frozen)
    preprocessing: Preprocessing | None = None,
) -> Run:
    """Create a run at its first step. Every process creates and loads the same model.

    Args:
        statistics: of the labels of all training images, for losses and scales that need them.
        preprocessing: by default that of images in RGB.
    """
    random_seed(recipe.seed)
    torch.use_deterministic_algorithms(recipe.compute.deterministic)
    torch.backends.cudnn.benchmark = not recipe.compute.deterministic
    model = create_train_model(recipe, len(classes), classes)
    scale = None
    if recipe.task == "regression":
        scale = OutputScale.of(model, recipe.model, statistics.mean, statistics.std)
        if recipe.checkpoint is not None and not trained_on_others(recipe.checkpoint, classes, recipe.task):
            model.load_state_dict(scale.standardized(model.state_dict()))
    check_model(model, recipe, len(classes))
    if recipe.compute.grad_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]  # every model of timm has it
        except AssertionError as error:
            raise InputError(f"{recipe.model} does not support --compute.grad-checkpointing; leave it out") from error
    if recipe.compute.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(world.device)
    if recipe.compute.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer(recipe, model)
    if recipe.distill.checkpoint is not None and trained_on_others(recipe.distill.checkpoint, classes, recipe.task):
        raise InputError(f"{recipe.distill.checkpoint}: the teacher was trained on other classes than these images', "
                         "or on the same in another order; give a teacher of these classes")  # fmt: skip
    task = _create_task(recipe, model, world.device, len(classes), create_criterion(recipe, statistics))
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
        augment=DeviceAugment(
            recipe, len(classes), preprocessing or resolve_preprocessing(recipe), world, statistics.dense
        ),
        scale=scale,
        accum_steps=accum_steps,
        steps_per_epoch=steps_per_epoch,
    )


def _create_task(
    recipe: Recipe, model: nn.Module, device: torch.device, num_classes: int, criterion: nn.Module
) -> TrainingTask:
    """Create timm's task for the loss of a batch: of the labels alone, or with distillation into a second head."""
    distill = recipe.distill
    if distill.teacher is None:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    return TokenDistillationTask(
        model,
        Teacher(create_teacher(recipe, num_classes).to(device), device, recipe),
        criterion,
        distill_type=distill.kind,
        task_loss_weight=1 - distill.alpha,
        temperature=distill.tau,
        device=device,
        verbose=False,
    )


def open_images(
    recipe: Recipe, world: World, stored: RunInfo | None = None, log: Callable[[str], None] = lambda line: None
) -> tuple[Splits | None, Preprocessing]:
    """Return a run's images, None for a stream, and how they become the model's input, the same in every process.

    Args:
        stored, log: see `resolve_preprocessing`.
    """
    splits = None if is_stream(recipe.data) else open_recipe_splits(recipe)
    images = splits.train if splits else None
    preprocessing = world.broadcast(resolve_preprocessing(recipe, images, stored, log) if world.primary else None)
    assert preprocessing is not None
    return splits.read_as(preprocessing.pixels) if splits else None, preprocessing


def open_training(
    recipe: Recipe,
    world: World,
    accum_steps: int,
    splits: Splits | None = None,
    preprocessing: Preprocessing | None = None,
) -> tuple[list[str], TrainLoader]:
    """Return class names and this process's training loader, of the result of `open_images` where that is known."""
    dataset = None if is_stream(recipe.data) else (splits or open_recipe_splits(recipe)).train
    source = open_stream(recipe.data, "train", is_training=True) if dataset is None else dataset
    classes = source.classes
    if not classes:
        raise InputError(f"{recipe.data.name}: has no class names; give --data.num-classes")
    return classes, TrainLoader(recipe, dataset, world, accum_steps, preprocessing)


def open_validation(
    recipe: Recipe, world: World, preprocessing: Preprocessing, splits: Splits | None
) -> tuple[EvalBatches, int | None]:
    """Return this process's validation batches, and the number of images of all processes, where that is known."""
    size = 2 * min(recipe.compute.device_batch_size, recipe.batch_size)
    transform = preprocessing.create_fit()
    workers = recipe.data.workers
    if splits is None:
        allowed = recipe.data.max_corrupt
        return eval_loader(open_stream(recipe.data, "val"), transform, size, workers, allowed, allowed), None
    dataset = splits.val
    if not any_readable(dataset, range(len(dataset))):
        raise InputError(f"none of the {len(dataset)} validation images can be read, such as {dataset.name(0)}; "
                         "replace them")  # fmt: skip
    shard = dataset.shard(world.size, world.rank)
    return eval_loader(shard, transform, size, workers, max_corrupt=None), len(dataset)
