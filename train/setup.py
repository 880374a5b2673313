"""From a recipe to everything that a step needs: model, task, optimizer, schedule and batches."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, TokenDistillationTask
from timm.task.distillation import DistillationTeacher
from timm.task.task import TrainingTask
from timm.utils import dispatch_clip_grad, random_seed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import shvit.shvit  # noqa: F401  (registers the models)
from shvit.create import create_model
from shvit.errors import InputError, first_line
from shvit.weights.run_info import read_run_info, same_name

from .checks import check_fields
from .data import EvalBatches, Splits, any_readable, eval_loader, is_stream, open_splits, open_stream
from .distributed import World
from .feed import Batch, DeviceAugment, Feed, micro_batch_sizes
from .recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What optimizers keep for each weight, in its shape."""
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        check_model(_create_model(untrained, 2), recipe, 2, alone=True)
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


def check_model(model: nn.Module, recipe: Recipe, num_classes: int, alone: bool = False) -> None:
    """Whether a model can take a training step on images of the recipe's sizes; the model stays as it was.

    Args:
        alone: with one image at once rather than two, which norms over a batch do not take where they see one value a
            channel.

    Raises:
        InputError: it cannot.
    """
    count = 1 if alone else 2
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training = model.training
    train_mode(model, recipe.freeze_bn)
    try:
        for size in sorted({recipe.img_size_at(epoch) for epoch in range(recipe.epochs)}):
            _check_size(model, recipe, count, size, num_classes)
    finally:
        model.train(training)
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def _check_size(model: nn.Module, recipe: Recipe, count: int, size: int, num_classes: int) -> None:
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            logits = model(torch.zeros(count, 3, size, size))
    except Exception as error:  # each model of timm has its own
        if count == 1 and "more than 1 value per channel" in str(error):
            raise InputError(
                f"BatchNorm in {recipe.model} trains on two images or more at once, and --batch-size "
                f"{recipe.batch_size} over all processes with --compute.device-batch-size "
                f"{recipe.compute.device_batch_size} leaves one; choose a larger one, or give --freeze-bn"
            ) from error
        raise InputError(
            f"{recipe.model} cannot be trained on images of {size} px ({first_line(error)}); choose another size, "
            f"{_own_size(recipe.model)[0]} px for one"
        ) from error
    for each in logits if isinstance(logits, tuple | list) else (logits,):
        if tuple(each.shape) != (count, num_classes):
            raise InputError(
                f"{recipe.model} gives {tuple(each.shape)} for {count} images of {num_classes} classes, and a "
                "classifier's logits are wanted; choose another --model"
            )


def train_mode(model: nn.Module, freeze_bn: bool) -> None:
    """Puts a model into training mode, BatchNorm excepted where its statistics are to stay."""
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@dataclass
class Run:
    """Everything that changes while training, and what changes it."""

    recipe: Recipe
    world: World
    model: nn.Module
    """As it is saved: not wrapped, not compiled."""
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    augment: DeviceAugment
    turns: int
    steps_per_epoch: int
    step: int = 0
    """Optimizer steps done."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """An entry for each evaluation."""
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """Loss, gradient norm and steps, summed since the last evaluation."""
    seconds: float = 0.0
    """Spent training, over all its interruptions."""

    def __post_init__(self) -> None:
        self.sums = self.sums.to(self.world.device)
        self._before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self._unfinished = False

    @property
    def ema(self) -> nn.Module:
        """The model with averaged weights."""
        return self.task.get_trainable_module(ema=True).module  # type: ignore[union-attr,return-value]

    def train_mode(self) -> None:
        self.task.train()
        self.ema.eval()
        train_mode(self.model, self.recipe.freeze_bn)

    def forward_backward(self, batches: list[Batch]) -> torch.Tensor:
        """Adds up the gradients of a step's turns; returns the loss, the mean over all processes. No weight changes."""
        for name, buffer in self.model.named_buffers():
            self._before[name].copy_(buffer)
        self._unfinished = True
        total = torch.zeros((), device=self.world.device)
        dtype = PRECISIONS[self.recipe.compute.precision]
        images_total = sum(len(batch.targets) for batch in batches)
        for turn, batch in enumerate(batches):
            images, targets = self.augment(batch, self.step, turn)
            with self.task.no_sync() if turn < self.turns - 1 else contextlib.nullcontext():
                with torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
                    loss = self.task(images, targets)["loss"] * (len(batch.targets) / images_total)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return self.world.average(total)

    def update(self, loss: torch.Tensor) -> None:
        """Changes the weights by the gradients, then their average and the learning rate."""
        optim = self.recipe.optim
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.scaler.is_enabled():
            norm = norm.nan_to_num(0.0, 0.0)  # the scaler passes over a step that overflows
        if optim.clip_grad is not None:
            dispatch_clip_grad(list(self.model.parameters()), optim.clip_grad, mode=optim.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._unfinished = False
        self.task.update_ema(self.step)
        self.scheduler.step_update(self.step)
        self.sums += torch.stack([loss.double(), norm.double(), torch.ones_like(loss, dtype=torch.float64)])

    @property
    def lr(self) -> float:
        """The next step's learning rate."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on from the last finished step.

        Random generators are seeded from the step, so that this is their state. In the middle of a step BatchNorm's
        statistics have changed already; those from before it are given.
        """
        model = self.model.state_dict()
        if self._unfinished:
            model.update({name: before for name, before in self._before.items() if name in model})
        return {
            "model": model,
            "model_ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "log": self.log,
            "sums": self.sums.tolist(),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state; of a run on more or fewer images, so that finished epochs stay finished.

        Raises:
            InputError: it is of another model, or of a step that the run does not have.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["model_ema"])
            self._load_optimizer(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.log, self.seconds = state["step"], state["log"], float(state["seconds"])
            before = state.get("steps_per_epoch", self.steps_per_epoch)
            self._check_place(before)
            if before != self.steps_per_epoch:
                epoch, within = divmod(self.step, before)
                self.step = epoch * self.steps_per_epoch + within * self.steps_per_epoch // before
            if self.step:
                self.scheduler.step_update(self.step)
            self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
            if not self.finite or (self.sums[2] < 1 and self._is_between()):
                raise ValueError("the sums since its last evaluation do not fit its step")
        except Exception as error:  # each part of the state has its own
            raise InputError(
                f"the state of the run does not fit its recipe ({first_line(error)}); choose another --output"
            ) from error

    def _check_place(self, steps_per_epoch: int) -> None:
        """Raise ValueError for a step that the run does not have, or a log that is ahead of it."""
        if steps_per_epoch < 1 or not 0 <= self.step <= self.recipe.epochs * steps_per_epoch:
            raise ValueError(f"step {self.step} of {self.recipe.epochs} epochs with {steps_per_epoch} steps each")
        if self.log and self.log[-1]["epoch"] > self.step // steps_per_epoch:
            raise ValueError(f"its log is of epoch {self.log[-1]['epoch']}, and its step {self.step} before it")

    def _is_between(self) -> bool:
        """Whether steps were done since the last evaluation."""
        return self.step > (self.log[-1]["epoch"] if self.log else 0) * self.steps_per_epoch

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Take over moments, of which PyTorch does not compare the shapes; the hyperparameters are the recipe's."""
        fresh = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, own in zip(self.optimizer.param_groups, fresh, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
                if name in MOMENTS and shape != tuple(parameter.shape):
                    raise ValueError(
                        f"{name} of the optimizer has the shape {shape}, its weight {tuple(parameter.shape)}"
                    )

    @property
    def finite(self) -> bool:
        """Whether loss and gradients were finite since the last evaluation; waits for the device."""
        return bool(torch.isfinite(self.sums).all())

    def best(self, figure: str) -> float:
        return max((entry[figure] for entry in self.log), default=-1.0)


def set_up(recipe: Recipe, world: World, classes: list[str], steps_per_epoch: int, turns: int) -> Run:
    """A run at its first step. The model is made and loaded alike in every process."""
    random_seed(recipe.seed)
    torch.use_deterministic_algorithms(recipe.compute.deterministic)
    torch.backends.cudnn.benchmark = not recipe.compute.deterministic
    model = _create_model(recipe, len(classes), classes)
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


def trained_on_others(checkpoint: Path, classes: Sequence[str]) -> bool:
    """Whether a checkpoint's run is known to have had other classes, or these in another order."""
    info = read_run_info(checkpoint)
    return info is not None and bool(info.classes) and list(map(same_name, info.classes)) != [*map(same_name, classes)]


def _create_model(recipe: Recipe, num_classes: int, classes: Sequence[str] = ()) -> nn.Module:
    options: dict[str, Any] = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    if getattr(timm.get_pretrained_cfg(recipe.model), "fixed_input_size", False):
        options["img_size"] = recipe.img_size
        if recipe.first_img_size is not None:
            raise InputError(f"{recipe.model} takes one size of images only; leave out --first-img-size")
    if recipe.distill.teacher:
        options["distilled"] = True
    try:
        if recipe.checkpoint is None:
            model = timm.create_model(recipe.model, pretrained=recipe.pretrained, num_classes=num_classes, **options)
        else:
            if recipe.model.startswith("shvit"):
                options.setdefault("distilled", False)
            new_head = True if classes and trained_on_others(recipe.checkpoint, classes) else None
            model = create_model(
                recipe.model, recipe.checkpoint, num_classes, reset_head=new_head, in_chans=3, **options
            )
    except InputError:
        raise
    except TypeError as error:  # timm passes options on to the model's class
        if recipe.distill.teacher and "'distilled'" in str(error):
            raise InputError(f"{recipe.model} has no second head for a teacher; choose a SHViT") from error
        raise InputError(f"{recipe.model} cannot be trained so ({first_line(error)}); leave out that option") from error
    except Exception as error:  # each model of timm has its own, and so has each way to fetch weights
        wanted = f"at {recipe.img_size} px" + (" with timm's published weights" if recipe.pretrained else "")
        raise InputError(f"{recipe.model} cannot be made {wanted} ({first_line(error)}); choose another --img-size, "
                         f"{_own_size(recipe.model)[0]} for one, or --checkpoint") from error  # fmt: skip
    if getattr(model, "deployed", False):
        raise InputError(f"{recipe.checkpoint}: holds a deployed model, whose norms are folded for good; begin with "
                         "the checkpoint it was made from")  # fmt: skip
    if recipe.distill.teacher and not hasattr(model, "set_distilled_training"):
        raise InputError(f"{recipe.model} has no second head for a teacher; choose a SHViT")
    return model


def _own_size(name: str) -> tuple[int, int]:
    """Height and width in pixels that timm's model of that name is made for."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg.input_size[1:] if cfg else (224, 224)


def create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """timm's; norms and biases have no weight decay."""
    optim = recipe.optim
    extra: dict[str, Any] = {"eps": optim.eps, "betas": optim.betas} if "adam" in optim.opt else {}
    if optim.opt in ("adam", "adamw"):
        extra["fused"] = True  # PyTorch's one pass over all weights: S1's step in 9 ms rather than 38 on one core
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=optim.opt,
            lr=recipe.peak_lr,
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            **extra,
        )
    except Exception as error:  # each optimizer has its own, for packages and options that it lacks
        raise InputError(
            f"--optim.opt {optim.opt}: {first_line(error)}; timm.optim.list_optimizers() tells the names"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--optim.opt {optim.opt} needs second derivatives, which are not computed; choose adamw")
    return optimizer


def create_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's, updated at every step; the warm-up is part of the epochs, as in the reference."""
    optim = recipe.optim
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=optim.schedule,
            num_epochs=recipe.epochs,
            warmup_epochs=min(optim.warmup_epochs, recipe.epochs - 1),
            warmup_lr=optim.warmup_lr,
            min_lr=optim.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except Exception as error:  # each schedule has its own
        raise InputError(f"--optim.schedule {optim.schedule}: {first_line(error)}") from error
    if scheduler is None or optim.schedule == "plateau":
        raise InputError(
            f"--optim.schedule {optim.schedule!r} is not known; choose cosine, poly, step, wsd or constant"
        )
    return scheduler


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


class Teacher(DistillationTeacher):
    """timm's, fed the student's images in its own normalization, and resized where it does not take their size.

    Args:
        model: in eval mode.

    Raises:
        InputError: it takes neither the recipe's images nor those of its own size.
    """

    def __init__(self, model: nn.Module, device: torch.device, recipe: Recipe):
        super().__init__(model, device=device)
        sizes = {(px, px) for px in map(recipe.img_size_at, range(recipe.epochs))}
        own = tuple(model.pretrained_cfg["input_size"][1:])  # type: ignore[index]  # every model of timm has it
        fixed = model.pretrained_cfg.get("fixed_input_size", False)  # type: ignore[union-attr,operator]
        self.img_size = own if fixed or any(self._refuses(size, device) for size in sizes) else None
        """Height and width in pixels of all its images; None where it takes the student's."""
        if self.img_size and (reason := self._refuses(own, device)):
            raise InputError(f"the teacher {recipe.distill.teacher} takes no images of three channels, neither at the "
                             f"student's size nor at its own {own[0]} px ({reason}); choose another")  # fmt: skip

    def _refuses(self, size: tuple[int, int], device: torch.device) -> str:
        """Why it does not take images of that size, or nothing."""
        try:
            with torch.no_grad():
                self.model(torch.zeros(1, 3, *size, device=device))
        except Exception as error:  # each model of timm has its own
            return first_line(error)
        return ""

    def forward(self, input: torch.Tensor, return_features: bool = False) -> torch.Tensor:  # noqa: A002  (timm's)
        if self.img_size in (None, tuple(input.shape[2:])):
            return super().forward(input, return_features)
        resized = nn.functional.interpolate(input, self.img_size, mode="bicubic", antialias=True)
        return super().forward(resized, return_features)


def create_teacher(recipe: Recipe, num_classes: int) -> nn.Module:
    """The teacher in eval mode, with weights that fit these classes."""
    distill = recipe.distill
    assert distill.teacher is not None
    if distill.checkpoint is not None:
        teacher = _load_teacher(distill.teacher, distill.checkpoint, recipe)
    else:
        try:
            teacher = timm.create_model(distill.teacher, pretrained=True).eval()
        except Exception as error:  # each way to fetch weights has its own
            raise InputError(f"the teacher {distill.teacher} has no published weights that can be fetched "
                             f"({first_line(error)}); give --distill.checkpoint") from error  # fmt: skip
    if teacher.num_classes != num_classes:
        raise InputError(f"the teacher {distill.teacher} knows {teacher.num_classes} classes and the images have "
                         f"{num_classes}; give --distill.checkpoint with a teacher of these classes")  # fmt: skip
    return teacher


def _load_teacher(name: str, checkpoint: Path, recipe: Recipe) -> nn.Module:
    """With the checkpoint's classes; one whose tables are of one size has its own, its run's or the student's."""
    try:
        return create_model(name, checkpoint)
    except InputError:
        if not getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
            raise
        info = read_run_info(checkpoint)
        size = info.img_size if info is not None and info.img_size else recipe.img_size
        with contextlib.suppress(Exception):  # each model of timm has its own; the first error is the one to tell
            teacher = create_model(name, checkpoint, img_size=size)
            known: Any = teacher.pretrained_cfg
            teacher.pretrained_cfg = {**known, "input_size": (3, size, size)}  # type: ignore[assignment]
            return teacher
        raise


# --- images ------------------------------------------------------------------------------------------------------


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
