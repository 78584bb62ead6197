"""Keep processes equal: compare their settings, synchronize what trains before training, compare it after the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_lora.layers.base import kept_parameters
from lightning_lora.model import parallel
from lightning_lora.utils.checksums import checksum
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import broadcast, from_all_ranks, is_distributed, is_sharded


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Compare the settings of this run between the processes. Every process has to call it.

    Args:
        settings: name → value, plain types.

    Raises:
        ValueError: a process has another value. It is raised on all; the message has both values and ranks.
    """
    everyone = from_all_ranks(dict(settings))
    for rank, theirs in enumerate(everyone):
        names = [name for name in {**everyone[0], **theirs} if repr(theirs.get(name)) != repr(everyone[0].get(name))]
        if names:
            different = "; ".join(f"{name}={everyone[0].get(name)!r} on rank 0, {theirs.get(name)!r} on rank {rank}" for name in names)
            raise ValueError(f"LoRACallback has other settings on rank {rank}: {different}. Give every process the same.")


def synchronize(module: nn.Module) -> None:
    """Broadcast the adapter and what else trains from the first rank. Of a sharded parameter, do so among the replicas of each shard."""
    if not is_distributed():
        return
    world = torch.distributed.group.WORLD
    for _, parameter in kept_parameters(module):
        if not parameter.is_meta:
            broadcast([parameter], parallel.replicas(parameter) if is_sharded(parameter) else [world])


def check_equal(module: nn.Module) -> None:
    """Compare what trains between the processes. Sharded parameters are left out.

    Raises:
        RuntimeError: a parameter differs, so its gradients were not averaged. The message names the first one.
    """
    if not is_distributed():
        return
    mine = {clean_name(name): checksum(p) for name, p in kept_parameters(module) if not is_sharded(p)}
    everyone = from_all_ranks(mine)
    different = [name for name in mine if any(other.get(name) != mine[name] for other in everyone)]
    if different:
        raise RuntimeError(
            f"{counted(len(different), 'trained parameter', 'differ')} between processes after the first step, first {different[0]}. Their"
            " gradients were not averaged. Check that nothing was injected or unfrozen after the strategy wrapped the model."
        )
