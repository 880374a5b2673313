"""One trace for each model: `torch.onnx.export`, most of an export's time, gives the same graph for the same arguments.

Many tests export a model that another test of the process has exported. What is ours runs each time anew: it begins
with the model and goes on with the graph.
"""

import functools
import hashlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx_ir import serde
from torch import nn

MAX_BYTES = 4_000_000
"""Larger models are traced each time."""


class _Description(pickle.Pickler):
    """Writes equal bytes for equal objects: a tensor by its values, and hooks without their numbers of the process.

    A module or tensor that was written before stands there by its number. The memo of pickle itself is off: it tells
    one string in two places from two equal ones.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.fast = True
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # no other object takes the place of one that has a number

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor | nn.Module):
            return NotImplemented
        if id(obj) in self._numbers:
            return _never, (self._numbers[id(obj)],)
        self._numbers[id(obj)] = len(self._numbers)
        self._kept.append(obj)
        if isinstance(obj, nn.Module):
            parts = {name: [*part.values()] if name.endswith("hooks") else part for name, part in vars(obj).items()}
            return _never, (type(obj),), parts
        values = obj.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return _never, (str(type(obj)), str(obj.dtype), *obj.shape, *obj.stride(), obj.requires_grad, values)


def _is_small(model: nn.Module) -> bool:
    return sum(tensor.nbytes for tensor in model.state_dict().values()) <= MAX_BYTES


def _never(*_: object) -> None:
    raise AssertionError("nobody reads a description")


def describe(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> bytes:
    """Return a hash of all that a trace depends on: modules with their code, weights, flags, and the arguments.

    Raises:
        Exception: something in them cannot be pickled.
    """
    file = io.BytesIO()
    code = [getattr(type(module).forward, "__code__", None) for module in model.modules()]
    _Description(file).dump((model, args, options, [each and (each.co_filename, each.co_code) for each in code]))
    return hashlib.sha256(file.getvalue()).digest()


def remembered(export: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.onnx.export` that reads what it wrote before where it is given the same again."""
    graphs: dict[bytes, bytes] = {}

    @functools.wraps(export)
    def call(model: Any, args: Any = (), f: Any = None, **options: Any) -> Any:
        if f is not None or not options.get("dynamo") or not isinstance(model, nn.Module) or not _is_small(model):
            return export(model, args, f, **options)
        try:
            key = describe(model, args, options)
        except Exception:  # a lambda, a hook: it is traced
            return export(model, args, f, **options)
        if key in graphs:
            return torch.onnx.ONNXProgram(serde.deserialize_model(onnx.load_from_string(graphs[key])), None)
        program = export(model, args, f, **options)
        graphs[key] = program.model_proto.SerializeToString()
        return program

    return call
