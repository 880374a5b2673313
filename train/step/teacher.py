"""The teacher of a distillation."""

import contextlib
from pathlib import Path
from typing import Any

import timm
import torch
from timm.task.distillation import DistillationTeacher
from torch import nn

import shvit.shvit  # noqa: F401  (registers the models)
from shvit.create import create_model
from shvit.errors import InputError, first_line
from shvit.img_size import ImgSize
from shvit.weights.run_info import read_run_info

from ..recipe import Recipe


class Teacher(DistillationTeacher):
    """timm's teacher, given the student's images in its own normalization, and resized if it needs another size.

    Args:
        model: in eval mode.

    Raises:
        InputError: the teacher accepts neither the recipe's images nor those of its own size.
    """

    def __init__(self, model: nn.Module, device: torch.device, recipe: Recipe):
        super().__init__(model, device=device)
        sizes = {*map(recipe.img_size_at, range(recipe.epochs))}
        own = ImgSize(*model.pretrained_cfg["input_size"][1:])  # type: ignore[index]  # every model of timm has it
        fixed = model.pretrained_cfg.get("fixed_input_size", False)  # type: ignore[union-attr,operator]
        self.img_size = own if fixed or any(self._refuses(size, device) for size in sizes) else None
        """Size of its images; None if it accepts the student's."""
        if self.img_size and (reason := self._refuses(own, device)):
            raise InputError(f"the teacher {recipe.distill.teacher} accepts no images of three channels, neither at "
                             f"the student's size nor at its own {own} px ({reason}); choose another")  # fmt: skip

    def _refuses(self, size: ImgSize, device: torch.device) -> str:
        """Return why the teacher does not accept images of that size; empty if it does."""
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
    """Create the teacher in eval mode, with weights that fit these classes."""
    distill = recipe.distill
    assert distill.teacher is not None
    if distill.checkpoint is not None:
        teacher = _load_teacher(distill.teacher, distill.checkpoint, recipe)
    else:
        try:
            teacher = timm.create_model(distill.teacher, pretrained=True).eval()
        except Exception as error:  # each way to fetch weights has its own
            raise InputError(f"the teacher {distill.teacher} has no published weights that can be downloaded "
                             f"({first_line(error)}); give --distill.checkpoint") from error  # fmt: skip
    if teacher.num_classes != num_classes:
        raise InputError(f"the teacher {distill.teacher} knows {teacher.num_classes} classes and the images have "
                         f"{num_classes}; give --distill.checkpoint with a teacher of these classes")  # fmt: skip
    return teacher


def _load_teacher(name: str, checkpoint: Path, recipe: Recipe) -> nn.Module:
    """Load a teacher from a checkpoint; a model of one image size gets its run's size, or else the student's."""
    try:
        return create_model(name, checkpoint)
    except InputError:
        if not getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
            raise
        info = read_run_info(checkpoint)
        size = recipe.img_size if info is None else info.img_size
        with contextlib.suppress(Exception):  # each model of timm has its own; the first error is the one to tell
            teacher = create_model(name, checkpoint, img_size=size)
            cfg: Any = teacher.pretrained_cfg
            teacher.pretrained_cfg = {**cfg, "input_size": (3, *size)}  # type: ignore[assignment]
            return teacher
        raise
