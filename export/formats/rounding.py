"""Half precision as on hardware that computes in it: each operation's result is rounded, on any processor."""

import math
from collections.abc import Sequence

import numpy as np
import torch

Outputs = tuple[torch.Tensor, ...]

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # precisions that are narrower than what CPUs compute in
ROWS = 16  # images at a time with rounding, which bounds memory
EXACT_OPERATORS = (
    *("Broadcast", "Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Relu"),
    *("Reshape", "Select", "Slice", "Split", "Squeeze", "StridedSlice", "Tile", "Transpose", "Unsqueeze"),
    *("VariadicSplit", "Where"),
)
"""Operators, of ONNX and OpenVINO, whose results are among their inputs, or 0: nothing is left to round."""


class Rounded:
    """A half-precision file run as on hardware that computes in its precision: each operation's result is rounded.

    A CPU computes float16, and bfloat16 where it has no instructions for it, in float32, and so hides both rounding and
    overflow. Here each operation is computed in float32, as matrix units accumulate, and its result rounded to float16
    or bfloat16 (infinite from 65520 on) before the next one reads it. The runtimes do the arithmetic, with conversions
    between the operations that they do not remove; results are the same on every machine but for the order of sums.
    """

    def __init__(self, names: Sequence[str], dtype: torch.dtype, rows: int):
        self.dtype = dtype
        self.rows = rows
        self.largest: dict[str, float] = dict.fromkeys(names, 0.0)
        """Operation → largest absolute value of its results so far, before rounding; infinite where a result was
        infinite or NaN. `names` are in the order of computation; convolutions and linear layers by dotted names."""

    def run(self, batch: torch.Tensor) -> Outputs:
        """Return all outputs in order for what `Spec.feed` returns."""
        raise NotImplementedError

    def run_layers(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the output of each convolution and linear layer, by its dotted name, for what `Spec.feed` returns."""
        raise NotImplementedError

    @property
    def overflow(self) -> str | None:
        """The first operation whose result did not fit the format so far."""
        fits = ((name, torch.tensor(value).to(self.dtype).isfinite().item()) for name, value in self.largest.items())
        return next((name for name, each in fits if not each), None)

    def nearest(self, count: int) -> dict[str, float]:
        """Return the operations with the largest values, of those before the first that overflows; largest first."""
        names = list(self.largest)
        before = names[: names.index(self.overflow)] if self.overflow in self.largest else names
        order = sorted(before, key=lambda name: self.largest[name], reverse=True)
        return {name: self.largest[name] for name in order[:count]}

    def record(self, name: str, value: float) -> None:
        """Take note of the largest absolute value of an operation's result."""
        self.largest[name] = max(self.largest[name], value if math.isfinite(value) else math.inf)


def join(parts: Sequence[Sequence[torch.Tensor | np.ndarray]]) -> Outputs:
    """Return the outputs of several batches as those of one."""
    return tuple(torch.cat([torch.as_tensor(part) for part in each]) for each in zip(*parts, strict=True))
