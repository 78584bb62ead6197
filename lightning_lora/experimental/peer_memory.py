"""What processes of one host do directly, without a collective of data: share memory, and meet."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor


def meet(ranks: dist.ProcessGroup, device: torch.device) -> None:
    """What a GPU does from here on starts after all of them have come here; Python does not wait."""
    dist.all_reduce(torch.zeros(1, device=device), group=ranks)


def shared_memory(size: int, ranks: dist.ProcessGroup, device: torch.device) -> list[Tensor]:
    """As many bytes on each rank, and every rank's as this one sees them; a collective.

    Args:
        size: bytes.
        ranks: processes of one host.
        device: GPUs share their memory; CPUs map files in the folder for temporary ones.

    Raises:
        RuntimeError: the GPUs do not reach each other's memory, or have none left.
    """
    if device.type == "cuda":
        try:
            own = symmetric.empty(size, dtype=torch.uint8, device=device)
            handle = symmetric.rendezvous(own, ranks)
            # The others' are mapped as long as this rank's own is there.
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
