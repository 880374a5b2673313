"""The scale of a regression's output: it is learned in standard deviations, and saved in the unit of the values.

A model whose output layer was multiplied by the standard deviation and shifted by the mean gives values in their unit,
in any program that loads it. While it is trained, its outputs are near 0 and 1, whatever the unit is, so that a
recipe's learning rate fits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shvit.errors import InputError


@dataclass(frozen=True)
class OutputScale:
    """The layer of a model that gives a value, and the mean and standard deviation of the values."""

    layer: str
    """Name of the linear layer or 1×1 convolution."""
    mean: float
    std: float

    @classmethod
    def of(cls, model: nn.Module, name: str, mean: float, std: float) -> "OutputScale":
        """Return the scale of a model's output.

        Raises:
            InputError: the output is not that of one layer with a bias.
        """
        classifier = model.get_classifier()  # type: ignore[operator]  # every model of timm has it
        last = [each for each in classifier.modules() if isinstance(each, nn.Linear | nn.Conv2d)][-1:] if isinstance(
            classifier, nn.Module) else []  # fmt: skip
        found = [key for key, module in model.named_modules() if last and module is last[0]]
        if not found or last[0].bias is None:
            raise InputError(f"the output of {name} is not that of one layer with a bias, so that no value can be "
                             "learned by it; choose another --model")  # fmt: skip
        return cls(found[0], mean, std)

    @property
    def keys(self) -> tuple[str, str]:
        """Names of the layer's weight and bias in a state dict."""
        return f"{self.layer}.weight", f"{self.layer}.bias"

    def own(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the layer's weight and bias of a state dict."""
        return {key: state[key] for key in self.keys}

    def natural(self, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the state dict of a model in training with its outputs in the unit of the values."""
        weight, bias = (state[key].double() for key in self.keys)
        return {**state, **self._as(state, weight * self.std, bias * self.std + self.mean)}

    def standardized(self, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the state dict of a saved model with its outputs in standard deviations from the mean."""
        weight, bias = (state[key].double() for key in self.keys)
        return {**state, **self._as(state, weight / self.std, (bias - self.mean) / self.std)}

    def _as(self, state: Mapping[str, torch.Tensor], *values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: value.to(state[key].dtype) for key, value in zip(self.keys, values, strict=True)}

    def targets(self, values: torch.Tensor) -> torch.Tensor:
        """Return values in standard deviations from the mean."""
        return (values - self.mean) / self.std

    def values(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the values that a model in training gives."""
        return outputs * self.std + self.mean
