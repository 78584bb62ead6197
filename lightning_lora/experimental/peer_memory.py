"""Memory shared between the processes of one host, and a stream-ordered barrier."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor


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
        RuntimeError: the GPUs cannot access each other's memory, or have too little left.
    """
    if device.type == "cuda":
        try:
            own = symmetric.empty(size, dtype=torch.uint8, device=device)
            handle = symmetric.rendezvous(own, ranks)
            # The other ranks' memory stays mapped as long as this rank's own buffer lives.
            return [own if rank == ranks.rank() else handle.get_buffer(rank, (size,), torch.uint8) for rank in range(ranks.size())]
        except RuntimeError as error:
            raise RuntimeError(
                f"pull_frozen=True, but the GPUs could not share {size} bytes with each other: {error}. Leave it out."
            ) from error
    descriptor, name = tempfile.mkstemp(prefix="lightning-lora-")
    os.close(descriptor)
    names: list[Any] = [None] * ranks.size()
    dist.all_gather_object(names, name, group=ranks)
    found = [torch.from_file(name, shared=True, size=size, dtype=torch.uint8) for name in names]
    dist.barrier(ranks)
    os.unlink(name)
    return found
