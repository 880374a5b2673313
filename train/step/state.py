"""Everything that changes while training: one optimizer step, and the state that a run resumes from."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.task.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import shvit.shvit  # noqa: F401  (registers the models)
from shvit.errors import InputError, first_line

from ..distributed import World
from ..recipe import Recipe
from .augment import DeviceAugment
from .batch import Batch

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""What optimizers keep for each weight, in its shape."""
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
