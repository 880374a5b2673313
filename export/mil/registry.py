"""Tables of Core ML's operations by name, which the files of this folder fill, each with one kind of operation.

Names, arguments and meanings are those of the Model Intermediate Language (MIL), iOS 15 to 18; source:
https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html. Arguments are tensors, or
Python's numbers, strings and lists where MIL asks for a constant; an operation with several results gives a tuple.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Operation = Callable[..., Any]
Numbers = torch.Tensor | Sequence[int] | int  # whole numbers, which MIL has as a tensor, a list or a single one


class Operations(dict[str, Operation]):
    """Operations by MIL's name."""

    def add(self, function: Operation) -> Operation:
        """Register a function under its own name; a decorator."""
        self[function.__name__] = function
        return function


def ints(values: Numbers) -> list[int]:
    """Return whole numbers as a list."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    return [int(value) for value in values] if isinstance(values, Sequence) else [int(values)]
