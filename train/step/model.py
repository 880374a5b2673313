"""The model to train: created with its weights, and tried on the recipe's image sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import shvit.shvit  # noqa: F401  (registers the models)
from shvit.create import create_model
from shvit.errors import InputError, first_line
from shvit.img_size import ImgSize
from shvit.weights.run_info import Task, read_run_info, same_name

from ..recipe import Recipe
from .state import train_mode


def check_model(model: nn.Module, recipe: Recipe, num_classes: int, alone: bool = False) -> None:
    """Check that a model can take a training step on images of the recipe's sizes; the model does not change.

    Args:
        alone: try one image at once rather than two; BatchNorm fails where it sees one value per channel.

    Raises:
        InputError: the model cannot.
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


def _check_size(model: nn.Module, recipe: Recipe, count: int, size: ImgSize, num_classes: int) -> None:
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            logits = model(torch.zeros(count, recipe.in_chans, *size))
    except Exception as error:  # each model of timm has its own
        if count == 1 and "more than 1 value per channel" in str(error):
            raise InputError(
                f"BatchNorm in {recipe.model} needs two images or more at once to train, and --batch-size "
                f"{recipe.batch_size} over all processes with --compute.device-batch-size "
                f"{recipe.compute.device_batch_size} leaves one; choose a larger one, or give --freeze-bn"
            ) from error
        raise InputError(
            f"{recipe.model} cannot be trained on images of {size} px ({first_line(error)}); choose another size, "
            f"such as {default_size(recipe.model)} px"
        ) from error
    for each in logits if isinstance(logits, tuple | list) else (logits,):
        if tuple(each.shape) != (count, num_classes):
            raise InputError(
                f"{recipe.model} returns {tuple(each.shape)} for {count} images of {num_classes} classes, not a "
                "classifier's logits; choose another --model"
            )


def trained_on_others(checkpoint: Path, classes: Sequence[str], task: Task = "classification") -> bool:
    """Return whether a checkpoint's run is known to have had another task, other classes, or these in another order.

    Nothing is known of a file without a record of its run, whose outputs are taken for those of classes.
    """
    info = read_run_info(checkpoint)
    if (info.task if info else "classification") != task:
        return True
    return info is not None and bool(info.classes) and list(map(same_name, info.classes)) != [*map(same_name, classes)]


def create_train_model(recipe: Recipe, num_classes: int, classes: Sequence[str] = ()) -> nn.Module:
    """Create a recipe's model with its initial weights; the head is re-initialized if the weights are of other classes.

    Raises:
        InputError: the model cannot be created or trained with these options, or the weights do not fit.
    """
    options: dict[str, Any] = {"in_chans": recipe.in_chans}
    if recipe.drop_path:
        options["drop_path_rate"] = recipe.drop_path
    if getattr(timm.get_pretrained_cfg(recipe.model), "fixed_input_size", False):
        options["img_size"] = recipe.img_size
        if recipe.first_img_size is not None:
            raise InputError(f"{recipe.model} accepts one image size only; leave out --first-img-size")
    if recipe.distill.teacher:
        options["distilled"] = True
    try:
        if recipe.checkpoint is None:
            model = timm.create_model(recipe.model, pretrained=recipe.pretrained, num_classes=num_classes, **options)
        else:
            if recipe.model.startswith("shvit"):
                options.setdefault("distilled", False)
            new_head = True if classes and trained_on_others(recipe.checkpoint, classes, recipe.task) else None
            model = create_model(recipe.model, recipe.checkpoint, num_classes, reset_head=new_head, **options)
    except InputError:
        raise
    except TypeError as error:  # timm passes options on to the model's class
        if recipe.distill.teacher and "'distilled'" in str(error):
            raise InputError(f"{recipe.model} has no second head for a teacher; choose a SHViT") from error
        raise InputError(
            f"{recipe.model} cannot be trained with this option ({first_line(error)}); leave it out"
        ) from error
    except Exception as error:  # each model of timm has its own, and so has each way to fetch weights
        wanted = f"at {recipe.img_size} px" + (" with timm's published weights" if recipe.pretrained else "")
        raise InputError(f"{recipe.model} cannot be created {wanted} ({first_line(error)}); choose another --img-size, "
                         f"such as {default_size(recipe.model)}, or --checkpoint") from error  # fmt: skip
    if getattr(model, "deployed", False):
        raise InputError(f"{recipe.checkpoint}: holds a deployed model, whose norms are folded; start from "
                         "the checkpoint that it was made from")  # fmt: skip
    if recipe.distill.teacher and not hasattr(model, "set_distilled_training"):
        raise InputError(f"{recipe.model} has no second head for a teacher; choose a SHViT")
    return model


def default_size(name: str) -> ImgSize:
    """Return the default image size of timm's model of that name."""
    cfg = timm.get_pretrained_cfg(name)
    return ImgSize(*cfg.input_size[1:]) if cfg else ImgSize(224, 224)
