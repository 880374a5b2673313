"""Cost of a forward pass by operator: multiply-adds, and bytes read and written."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

MULTIPLIES = ("convolution", "depthwise convolution", "matrix product")  # the others are bound by memory
KINDS = (  # the first pattern that matches an operator's name
    (r"norm", "normalization"),
    (r"softmax", "softmax"),
    (r"relu|gelu|silu|swish|sigmoid|tanh|mish|elu", "activation"),
    (r"pool|mean|amax", "pooling"),
    (r"cat|stack|clone|copy|pad|index|roll|slice_scatter", "copy"),
    (r"", "elementwise"),
)


@dataclass(frozen=True)
class Operation:
    """One call of one of PyTorch's operators that is not a view."""

    kind: str
    modules: frozenset[str]
    """Names of the modules that were running; '' is the model itself."""
    macs: int
    activation_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class Cost:
    """Cost of several operators together, for one image.

    Every operator counts each input and output tensor at its full size, as if nothing stayed in a cache from one
    operator to the next and none were fused. Views cost nothing.
    """

    macs: int
    """Multiply-adds of convolutions and matrix products; other operators have none, as in the paper's counts."""
    params: int
    activation_bytes: int
    """Bytes read and written, except the model's parameters and statistics."""
    weight_bytes: int
    """Bytes read of parameters and statistics, which a batch of many images shares."""
    flop_per_byte: float
    """Arithmetic intensity: 2·macs / bytes."""
    memory_bound_bytes: int
    """Activations and weights of operators without multiply-adds: normalization, activation, softmax, copies …"""
    memory_bound_percent: float
    """Percent of all bytes."""

    @classmethod
    def of(cls, operations: Iterable[Operation], params: int = 0) -> "Cost":
        operations = list(operations)
        return cls._create(
            macs=sum(o.macs for o in operations),
            params=params,
            activation_bytes=sum(o.activation_bytes for o in operations),
            weight_bytes=sum(o.weight_bytes for o in operations),
            memory_bound_bytes=sum(o.activation_bytes + o.weight_bytes for o in operations if o.kind not in MULTIPLIES),
        )

    @classmethod
    def sum(cls, costs: Iterable["Cost"]) -> "Cost":
        costs = list(costs)
        counts = ("macs", "params", "activation_bytes", "weight_bytes", "memory_bound_bytes")
        return cls._create(**{name: sum(getattr(cost, name) for cost in costs) for name in counts})

    @classmethod
    def _create(
        cls, macs: int, params: int, activation_bytes: int, weight_bytes: int, memory_bound_bytes: int
    ) -> "Cost":
        total = max(activation_bytes + weight_bytes, 1)  # 0 without any operator
        return cls(
            macs=macs,
            params=params,
            activation_bytes=activation_bytes,
            weight_bytes=weight_bytes,
            flop_per_byte=2 * macs / total,
            memory_bound_bytes=memory_bound_bytes,
            memory_bound_percent=100 * memory_bound_bytes / total,
        )

    @property
    def bytes(self) -> int:
        """Bytes of activations and weights."""
        return self.activation_bytes + self.weight_bytes


def count(model: nn.Module, x: torch.Tensor) -> list[Operation]:
    """Return the operators of `model(x)`, `x` a batch of one image, in order; attention is never fused."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Counter(model) as counter:
        model(x)
    return counter.operations


def cost(model: nn.Module, x: torch.Tensor) -> Cost:
    """Return the cost of `model(x)`, `x` a batch of one image."""
    return Cost.of(count(model, x), sum(p.numel() for p in model.parameters()))


class _Counter(TorchDispatchMode):
    """A mode that records every operator that is called while it is active."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.operations: list[Operation] = []
        self.root = type(model).__name__  # its name in ModuleTracker
        self.weights = {_storage(tensor) for tensor in chain(model.parameters(), model.buffers())}
        self.tracker = ModuleTracker()

    def __enter__(self) -> "_Counter":
        self.tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.tracker.__exit__(*error)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if inputs and outputs and not _is_view(func, inputs, outputs):
            flops = flop_registry.get(func.overloadpacket)
            weights = [tensor for tensor in inputs if _storage(tensor) in self.weights]
            names = self.tracker.parents - {"Global"}
            operation = Operation(
                kind=_kind(func, args, multiplies=flops is not None),
                modules=frozenset(name.removeprefix(self.root).removeprefix(".") for name in names),
                macs=flops(*args, **kwargs, out_val=out) // 2 if flops else 0,
                activation_bytes=sum(map(_bytes, inputs + outputs)) - sum(map(_bytes, weights)),
                weight_bytes=sum(map(_bytes, weights)),
            )
            self.operations.append(operation)
        return out


def _kind(func: OpOverload, args: Sequence[Any], multiplies: bool) -> str:
    if not multiplies:
        return next(kind for pattern, kind in KINDS if re.search(pattern, func.overloadpacket.__name__))
    if func.overloadpacket is torch.ops.aten.convolution:
        weight, groups = args[1], args[8]
        return "depthwise convolution" if groups > 1 and weight.shape[1] == 1 else "convolution"
    return "matrix product"


def _is_view(func: OpOverload, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Return whether all outputs are memory of inputs, unwritten."""
    known = {_storage(tensor) for tensor in inputs}
    return not func._schema.is_mutable and all(_storage(tensor) in known for tensor in outputs)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    """Return an identifier of a tensor's memory, which its views share; on the meta device too."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
