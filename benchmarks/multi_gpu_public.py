"""FSDP2 by its public names alone, set up for a base that is frozen: what ``multi_gpu.py`` measures beside ``pull_frozen``.

Adapters are in no unit: they stay whole, and one all-reduce averages their gradients. So nothing in a block is scattered. Norms stay
whole too, and what lies outside the blocks stays gathered between steps. Blocks are gathered into memory that NCCL has registered on
every rank, so that copy engines can move it and all multiprocessors are left to the products. ``NCCL_CTA_POLICY=2`` asks for that; it
has to be set before NCCL starts.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_lora.utils.blocks import repeated_blocks
from lightning_lora.utils.gradient_reducer import GradientReducer
from lightning_lora.utils.sharding import broadcast, is_sharded

POLICY = {"NCCL_CTA_POLICY": "2"}  # NCCL_CTA_POLICY_ZERO: no multiprocessor where a copy engine can do it


def shard(model: nn.Module, mesh: DeviceMesh, fill: Callable[[nn.Module], object], kept: bool, registered: bool) -> nn.Module:
    """Shard a model whose frozen parts and adapters are in place, on the meta device or another.

    Args:
        model: with repeated blocks.
        mesh: of one dimension.
        fill: gives the sharded model's parameters storage and values.
        kept: keep gathered blocks from the forward to the backward pass.
        registered: gather into memory registered with NCCL; on CPUs there is none, and gathers are as ever.
    """
    blocks = [block for _, block in repeated_blocks(model)]
    for block in blocks:
        whole = {p for p in block.parameters() if p.requires_grad or p.ndim < 2}
        fully_shard(block, mesh=mesh, reshard_after_forward=not kept, ignored_params=whole)
    root = fully_shard(model, mesh=mesh, reshard_after_forward=False)
    root.set_reshard_after_backward(False, recurse=False)
    fill(model)
    group = mesh.get_group()
    trained = [p for p in model.parameters() if p.requires_grad and not is_sharded(p)]
    broadcast(trained, [group])
    GradientReducer(trained, [group])
    if registered and mesh.device_type == "cuda":
        gather = _gather(group)
        for block in blocks:
            assert isinstance(block, FSDPModule)
            if hasattr(block, "set_symm_mem_for_comm"):  # torch 2.13
                block.set_symm_mem_for_comm()
            else:
                block.set_custom_all_gather(gather)
    return model


class RegisteredAllGather:
    """For ``FSDPModule.set_custom_all_gather``: NCCL's own, into buffers that it knows on every rank.

    Two buffers of a size take turns. FSDP2 lets no more than two gathers be under way, and makes its streams wait for what was copied
    out of the first before it asks for a third.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.buffers: dict[tuple[int, torch.dtype], Iterator[Tensor]] = {}
        self.pools: list[torch.cuda.MemPool] = []

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        numel = math.prod(size)
        if (numel, dtype) not in self.buffers:
            self.buffers[numel, dtype] = itertools.cycle(self._registered(numel, dtype, device))
        return next(self.buffers[numel, dtype])

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)

    def _registered(self, numel: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Two buffers; a collective. ``MemPool`` and ``register_mem_pool`` are what torch 2.11 has for it."""
        dist.all_reduce(torch.zeros(1, device=device), group=self.group)  # the group's communicator may not be there yet
        torch.cuda.synchronize()
        backend = self.group._get_backend(device)
        pool = torch.cuda.MemPool(backend.mem_allocator)
        self.pools.append(pool)
        with torch.cuda.use_mem_pool(pool):
            found = [torch.empty(numel, dtype=dtype, device=device) for _ in range(2)]
        backend.register_mem_pool(pool, symm=True)
        return found


@functools.cache  # what is registered stays so as long as the process lives
def _gather(group: dist.ProcessGroup) -> RegisteredAllGather:
    return RegisteredAllGather(group)
