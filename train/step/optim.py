"""Optimizer and schedule, by timm."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

import shvit.shvit  # noqa: F401  (registers the models)
from shvit.errors import InputError, first_line

from ..recipe import Recipe


def create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer; norms and biases have no weight decay."""
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
            f"--optim.opt {optim.opt}: {first_line(error)}; see timm.optim.list_optimizers() for the names"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise InputError(f"--optim.opt {optim.opt} needs second derivatives, which are not computed; choose adamw")
    return optimizer


def create_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """Create timm's schedule, updated at every step; the warm-up is part of the epochs, as in the reference."""
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
