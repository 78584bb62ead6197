"""FSDP2 without gathers of what does not train: every rank reads the others' pieces where they lie, straight to their place.

NCCL's kernels occupy multiprocessors that the products beside them miss, FSDP2 copies what is gathered into a buffer and out of it
again, and in every gather all ranks wait for the last. Nearly all of a model under LoRA is frozen: its pieces never change, so there is
nothing to agree on before they are read, and within one host the copy engines can read them from the other GPUs' memory. A parameter is
cut along its first dimension, so its pieces one after the other are the parameter.

What trains in the blocks is small and stays whole on every rank, its gradients averaged once a step. So no rank waits for another in
between, as under DDP.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_lora.experimental.peer_memory import meet
from lightning_lora.experimental.pulling_group import Order, PullingGroup
from lightning_lora.model.parallel import GradientReducer
from lightning_lora.utils.sharding import broadcast
from lightning_lora.utils.torch_private import fsdp2_group


def pull(unit: nn.Module, blocks: list[nn.Module]) -> None:
    """Have a unit of FSDP2 and the blocks in it, units too, read what is frozen from the other ranks' memory.

    What the unit has outside its blocks stays in memory between steps: the first block would wait for it, and at a step's peak it
    is there anyway. What trains there FSDP2 gathers as ever.

    Args:
        unit: what ``fully_shard`` returned, over more than one rank.
        blocks: the units in it.
    """
    outside, groups = fsdp2_group(unit), [fsdp2_group(block) for block in blocks]
    order = Order()
    for group in groups if outside is None else [outside, *groups]:
        group.__class__ = PullingGroup
        group.keeps, group.order, group.sources, group.held = group is outside, order, None, {}
    ranks, device = groups[0]._all_gather_process_group, groups[0].device

    def meet_anew(*_: Any) -> None:
        """What a forward pass reads was written before it; what is written after it was read. A backward pass ends in an average."""
        order.last = None
        for group in groups:
            group.drop()
        meet(ranks, device)

    unit.register_forward_pre_hook(meet_anew, prepend=True)  # before FSDP2's
    unit.register_forward_hook(meet_anew)


def average(model: nn.Module, ranks: dist.ProcessGroup) -> None:
    """Keep what trains and is in no unit of FSDP2 the same on every rank; call it when the parameters have storage."""
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


def release(model: nn.Module) -> None:
    """Give the shared memory back, once the parameters are elsewhere or done with; the next forward pass shares anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and isinstance(group := fsdp2_group(module), PullingGroup):
            group.device_handle.synchronize()
            group.sources, group.held = None, {}
