"""All-gather of frozen shards by direct peer-to-peer reads (copy engines), bypassing NCCL.

NCCL's all-gather is slow for three reasons. Its kernels occupy multiprocessors that the matrix products need. FSDP2 copies what is
gathered into a buffer and out of it again. And in every gather all ranks wait for the last one.

Nearly all of a model under LoRA is frozen. Frozen shards never change, so ranks need not synchronize before they read them. Within one
host the copy engines can read them from the other GPUs' memory. A parameter is sharded along its first dimension, so its shards,
concatenated, are the full tensor.

The trainable parameters in the blocks are small. They are replicated on every rank, and their gradients are averaged once per step. So
no rank waits for another in between, as under DDP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from lightning_lora.experimental.peer_memory import stream_barrier
from lightning_lora.experimental.pulling_group import PrefetchOrder, PullingGroup
from lightning_lora.utils.gradient_reducer import GradientReducer
from lightning_lora.utils.sharding import broadcast, from_all_ranks
from lightning_lora.utils.torch_private_parallel import fsdp2_group

HOOKS = "_lora_pull_hooks"  # the attribute of a unit that keeps the handles of its hooks


def pull(unit: nn.Module, blocks: list[nn.Module]) -> None:
    """Make an FSDP2 unit and its blocks, which are units too, read frozen parameters from the other ranks' memory.

    Frozen parameters outside the blocks stay in memory between steps. Otherwise the first block would wait for them, and at a step's
    peak they are in memory anyway. FSDP2 gathers trainable parameters outside the blocks as usual.

    Args:
        unit: what ``fully_shard`` returned, over more than one rank.
        blocks: the units in it.
    """
    outside, groups = fsdp2_group(unit), [fsdp2_group(block) for block in blocks]
    order = PrefetchOrder()
    for group in groups if outside is None else [outside, *groups]:
        group.__class__ = PullingGroup
        group.keep_resident, group.order, group.sources, group.resident = group is outside, order, None, {}
    ranks, device = groups[0]._all_gather_process_group, groups[0].device

    def barrier_and_reset(*_: Any) -> None:
        """Separate reads of shards from writes: a write before a forward pass is visible to it, a later write is not.

        A backward pass needs no barrier: it ends in the all-reduce of gradients.
        """
        order.last = None
        for group in groups:
            group.discard_prefetch()
        stream_barrier(ranks, device)

    before = unit.register_forward_pre_hook(barrier_and_reset, prepend=True)  # before FSDP2's
    after = unit.register_forward_hook(barrier_and_reset)
    unit.__dict__[HOOKS] = [before, after]


def average(model: nn.Module, ranks: dist.ProcessGroup) -> None:
    """Keep trainable parameters outside all FSDP2 units equal on every rank. Call it once the parameters have storage."""
    groups = [group for module in model.modules() if isinstance(module, FSDPModule) and (group := fsdp2_group(module)) is not None]
    places = [param._module_info for group in groups for param in group.fsdp_params]
    sharded = {(place.module, place.param_name) for place in places}
    sharded |= {tied for place in places for tied in zip(place.shared_modules, place.shared_param_names, strict=True)}
    found = [
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and (module, name) not in sharded
    ]
    broadcast(found, [ranks])
    GradientReducer(found, [ranks])


def share(model: nn.Module) -> None:
    """Share the frozen shards now, unit by unit; without it, the first forward pass does. A collective.

    What is read of each unit's first parameter is compared with what NCCL gathers.

    Raises:
        RuntimeError: on every rank, if on one the memory cannot be shared, or is not what FSDP2 would gather.
    """
    error = None
    for name, unit in model.named_modules():
        if error is None and isinstance(unit, FSDPModule) and isinstance(group := fsdp2_group(unit), PullingGroup):
            try:
                unit.unshard()
            except (RuntimeError, ValueError) as raised:  # on every rank
                error = str(raised)
                continue
            same = all([_as_gathered(param, group._all_gather_process_group) for param in list(group.sources or ())[:1]])
            unit.reshard()
            error = None if all(from_all_ranks(same)) else f"pull_frozen: what is read of {name!r} is not what FSDP2 gathers"
    if error is not None:
        raise RuntimeError(error)


def _as_gathered(param: Any, ranks: dist.ProcessGroup) -> bool:
    """True if the parameter that was read equals the one that FSDP2 would gather, padding included. A collective."""
    (read,) = param.all_gather_outputs
    gathered = torch.empty_like(read)
    dist.all_gather_into_tensor(gathered, param._sharded_param_data, group=ranks)
    return torch.equal(read.view(torch.uint8), gathered.view(torch.uint8))


def stop(model: nn.Module) -> None:
    """Let FSDP2 gather frozen parameters again, as it does without :func:`pull`. Call it between steps, on every rank."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule) and isinstance(group := fsdp2_group(unit), PullingGroup):
            unit.reshard()
            group.device_handle.synchronize()
            group.__class__ = FSDPParamGroup  # type: ignore[assignment]
            del group.sources, group.resident, group.order, group.keep_resident
        for handle in unit.__dict__.pop(HOOKS, ()):
            handle.remove()


def release(model: nn.Module) -> None:
    """Free the shared memory, once the parameters have moved or are no longer needed. The next forward pass shares it again."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and isinstance(group := fsdp2_group(module), PullingGroup):
            group.device_handle.synchronize()
            group.sources, group.resident = None, {}
