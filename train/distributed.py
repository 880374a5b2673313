"""Distributed training: one process by default, several with torchrun or SLURM."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from shvit.errors import InputError

__all__ = ["World", "join"]

T = TypeVar("T")

FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torchrun's switch for a new TCP store in each rendezvous (PyTorch 2.14: elastic/rendezvous)."""


@dataclass(frozen=True)
class World:
    """This process's rank, the number of processes, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def primary(self) -> bool:
        """True for the process that writes and prints."""
        return self.rank == 0

    @property
    def device_ids(self) -> list[int] | None:
        """The argument of DistributedDataParallel of that name."""
        return [self.device.index] if self.device.type == "cuda" else None

    def broadcast(self, value: T) -> T:
        """Return the primary's `value` in every process; tensors in it must be on the CPU."""
        if self.size == 1:
            return value
        values = [value if self.primary else None]
        distributed.broadcast_object_list(values, src=0, device=self.device if self.device.type == "cuda" else None)
        return values[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Return the `value` of each process, by rank; tensors in it must be on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def average(self, tensor: torch.Tensor) -> torch.Tensor:
        """Average over all processes, in place."""
        return self.sum(tensor).div_(self.size)


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that torchrun or SLURM started, over NCCL on CUDA and Gloo on the CPU; alone without them.

    Args:
        device: `cpu`, `cuda`, or `auto`, which is CUDA where there is a GPU.

    Raises:
        InputError: CUDA is not available, or this machine has fewer GPUs than processes.
    """
    from timm.utils.distributed import init_distributed_device_so

    gpus = torch.cuda.device_count()
    kind = ("cuda" if gpus else "cpu") if device == "auto" else device
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    if kind == "cuda" and local >= gpus:
        raise InputError(f"{gpus} CUDA GPUs on this machine, and process {local} of it needs one; start at most {gpus} "
                         "processes here, or give --compute.device cpu")  # fmt: skip
    _warn_of_stale_store()
    info = init_distributed_device_so(kind)
    place = torch.device(info["device"] if ":" in info["device"] or kind == "cpu" else f"{kind}:0")
    try:
        yield World(info["global_rank"], info["world_size"], place)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _warn_of_stale_store() -> None:
    """Warn where torchrun may restart processes, but would give them the addresses of those that died."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get(FRESH_STORE) != "1" and os.environ.get("RANK") == "0":
        print(f"processes that torchrun restarts may wait for dead ones; set {FRESH_STORE}=1 before torchrun",
              file=sys.stderr)  # fmt: skip
