"""The processes that train together: one by default, more by torchrun or SLURM."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from shvit.errors import InputError

__all__ = ["World", "join"]

FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torchrun's switch for a new store of addresses in each round (PyTorch 2.14: elastic/rendezvous)."""


@dataclass(frozen=True)
class World:
    """This process's place among those of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def primary(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def device_ids(self) -> list[int] | None:
        """What DistributedDataParallel wants to be told."""
        return [self.device.index] if self.device.type == "cuda" else None

    def share(self, value: Any) -> Any:
        """The primary's `value` in every process; tensors inside come on the CPU."""
        if self.size == 1:
            return value
        values = [value if self.primary else None]
        distributed.broadcast_object_list(values, src=0, device=self.device if self.device.type == "cuda" else None)
        return values[0]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def average(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, in place."""
        return self.sum(tensor).div_(self.size)


@contextmanager
def join(device: str) -> Iterator[World]:
    """Joins the processes that torchrun or SLURM started, over NCCL for CUDA and Gloo for the CPU; alone without them.

    Args:
        device: `cpu`, `cuda`, or `auto` for CUDA where there is a GPU.

    Raises:
        InputError: CUDA is asked for and not there, or fewer GPUs than processes of this machine.
    """
    from timm.utils.distributed import init_distributed_device_so

    gpus = torch.cuda.device_count()
    kind = ("cuda" if gpus else "cpu") if device == "auto" else device
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    if kind == "cuda" and local >= gpus:
        raise InputError(f"{gpus} CUDA GPUs on this machine, and process {local} of it needs one; start at most {gpus} "
                         "processes here, or give --compute.device cpu")  # fmt: skip
    _warn_of_kept_addresses()
    found = init_distributed_device_so(kind)
    place = torch.device(found["device"] if ":" in found["device"] or kind == "cpu" else f"{kind}:0")
    try:
        yield World(found["global_rank"], found["world_size"], place)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _warn_of_kept_addresses() -> None:
    """Says so where torchrun may start processes again, but will hand them the addresses of those that died."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get(FRESH_STORE) != "1" and os.environ.get("RANK") == "0":
        print(f"processes that torchrun starts again may wait for dead ones; set {FRESH_STORE}=1 before torchrun",
              file=sys.stderr)  # fmt: skip
