"""Everything that changes while training: one optimizer step, and the state that a run resumes from."""

import contextlib
import math
from dataclasses import dataclass, field, replace
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
from ..labels.scale import OutputScale
from ..recipe import Recipe
from .augment import DeviceAugment
from .batch import Batch

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""Entries of an optimizer's state that have the shape of the weight."""
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def train_mode(model: nn.Module, freeze_bn: bool) -> None:
    """Put a model into training mode, except BatchNorm if `freeze_bn`."""
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
    """The model to save: not wrapped, not compiled."""
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    augment: DeviceAugment
    accum_steps: int
    steps_per_epoch: int
    scale: OutputScale | None = None
    """Of a regression, which is learned in standard deviations."""
    step: int = 0
    """Optimizer steps done."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """An entry for each evaluation."""
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """Loss, gradient norm and steps, summed since the last evaluation."""
    seconds: float = 0.0
    """Training time, over all interruptions."""

    def __post_init__(self) -> None:
        self.sums = self.sums.to(self.world.device)
        self._before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self._unfinished = False

    @property
    def ema(self) -> nn.Module:
        """The model with EMA weights."""
        return self.task.get_trainable_module(ema=True).module  # type: ignore[union-attr,return-value]

    def train_mode(self) -> None:
        """Put task and model into training mode, the EMA weights into eval mode."""
        self.task.train()
        self.ema.eval()
        train_mode(self.model, self.recipe.freeze_bn)

    def forward_backward(self, batches: list[Batch]) -> torch.Tensor:
        """Accumulate the gradients of a step, and return its loss, averaged over all processes."""
        for name, buffer in self.model.named_buffers():
            self._before[name].copy_(buffer)
        self._unfinished = True
        total = torch.zeros((), device=self.world.device)
        dtype = PRECISIONS[self.recipe.compute.precision]
        images_total = sum(len(batch.targets) for batch in batches)
        for micro_step, batch in enumerate(batches):
            images, targets = self.augment(batch, self.step, micro_step)
            targets = targets if self.scale is None else self.scale.targets(targets)
            with self.task.no_sync() if micro_step < self.accum_steps - 1 else contextlib.nullcontext():
                with torch.autocast(self.world.device.type, dtype, enabled=dtype is not None):
                    loss = self.task(images, targets)["loss"] * (len(batch.targets) / images_total)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return self.world.average(total)

    def update(self, loss: torch.Tensor) -> None:
        """Update the weights, then the EMA weights and the learning rate."""
        optim = self.recipe.optim
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.scaler.is_enabled():
            norm = norm.nan_to_num(0.0, 0.0)  # the scaler skips a step that overflows
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
        """Learning rate of the next step."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to resume from the last finished step.

        Random generators are seeded from the step, so that this is their state. In the middle of a step BatchNorm's
        statistics have changed already; those from before it are returned.
        """
        model = self.model.state_dict()
        if self._unfinished:
            model.update({name: before for name, before in self._before.items() if name in model})
        weights = {"model": model, "model_ema": self.ema.state_dict()}
        return {
            **weights,
            **self._natural(weights),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "log": self.log,
            "sums": self.sums.tolist(),
            "seconds": self.seconds,
        }

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights of the model, or of the one with EMA weights, as they are saved."""
        return model.state_dict() if self.scale is None else self.scale.natural(model.state_dict())

    def _natural(self, weights: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return a regression's weights in the unit of its values, and beside them what to resume from bit by bit."""
        if self.scale is None:
            return {}
        own = {name: self.scale.own(state) for name, state in weights.items()}
        return {
            **{name: self.scale.natural(state) for name, state in weights.items()},
            "output": {"mean": self.scale.mean, "std": self.scale.std, **own},
        }

    def _load_scale(self, output: dict[str, Any]) -> None:
        """Load the scale of a regression's output, which stays that of its first images, and the layer's weights."""
        assert self.scale is not None
        self.scale = replace(self.scale, mean=float(output["mean"]), std=float(output["std"]))
        for model, name in ((self.model, "model"), (self.ema, "model_ema")):
            model.load_state_dict({**model.state_dict(), **self.scale.own(output[name])})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state; if the number of images has changed, finished epochs stay finished.

        Raises:
            InputError: the state is of another model, or of a step that the run does not have.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["model_ema"])
            if self.scale is not None:
                self._load_scale(state["output"])
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
        """Return whether steps were done since the last evaluation."""
        return self.step > (self.log[-1]["epoch"] if self.log else 0) * self.steps_per_epoch

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the moments, whose shapes PyTorch does not check; keep the recipe's hyperparameters."""
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
        """True if loss and gradients were finite since the last evaluation; waits for the device."""
        return bool(torch.isfinite(self.sums).all())

    def best(self, metric: str) -> float:
        """Return the highest value of a metric so far; -∞ before the first evaluation."""
        return max((entry[metric] for entry in self.log), default=-math.inf)
