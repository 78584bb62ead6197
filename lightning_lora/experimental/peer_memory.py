"""Memory shared between the processes of one host, and a stream-ordered barrier."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from lightning_lora.utils.sharding import from_all_ranks

T = TypeVar("T")


def stream_barrier(ranks: dist.ProcessGroup, device: torch.device) -> None:
    """Stream-ordered barrier: a one-element all-reduce.

    Work that a GPU is given after it starts once all GPUs have reached it. Python does not wait.
    """
    dist.all_reduce(torch.zeros(1, device=device), group=ranks)


def shared_memory(size: int, ranks: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
    """Allocate ``size`` bytes on each rank and map every rank's memory into this process. A collective.

    Args:
        size: bytes per rank.
        ranks: processes of one host.
        device: GPUs share their own memory; CPUs map files in the temporary folder.

    Returns:
        One byte tensor per rank, in rank order.

    Raises:
        RuntimeError: on every rank: the GPUs of one cannot access the others' memory, or have too little left.
    """
    if device.type == "cuda":
        own = together(lambda: _allocate(size, device), size, ranks)
        return together(lambda: _map(own, size, ranks), size, ranks)
    descriptor, name = tempfile.mkstemp(prefix="lightning-lora-")
    os.close(descriptor)
    found = [torch.from_file(each, shared=True, size=size, dtype=torch.uint8) for each in from_all_ranks(name, ranks)]
    dist.barrier(ranks)
    os.unlink(name)
    return found


def together(action: Callable[[], T], size: int, ranks: dist.ProcessGroup) -> T:
    """Run an action on every rank. If it raises RuntimeError on one, raise on all: none waits for another in what comes next."""
    found, error = None, None
    try:
        found = action()
    except RuntimeError as raised:
        error = str(raised)
    first = next((each for each in from_all_ranks(error, ranks) if each is not None), None)
    if first is not None:
        raise RuntimeError(f"pull_frozen: the GPUs could not share {size} bytes with each other: {first}. pull_frozen=False needs none.")
    return cast(T, found)


def _allocate(size: int, device: torch.device) -> Tensor:
    try:
        return symmetric.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError:
        torch.cuda.empty_cache()  # this allocation cannot use what torch keeps of tensors that are gone
        return symmetric.empty(size, dtype=torch.uint8, device=device)


def _map(own: Tensor, size: int, ranks: dist.ProcessGroup) -> list[Tensor]:
    handle = symmetric.rendezvous(own, ranks)
    # The other ranks' memory stays mapped as long as this rank's own buffer lives.
    return [own if rank == ranks.rank() else handle.get_buffer(rank, (size,), torch.uint8) for rank in range(ranks.size())]
