"""Which parameters changed between two moments, bit by bit: the adapters should, the frozen base should not."""

from __future__ import annotations

import torch
import torch.distributed
from torch import nn

from lightning_lora.strategies.digests import digest
from lightning_lora.strategies.module_state import parameters_by_name
from lightning_lora.utils.sharding import from_all_ranks, is_sharded

Digests = dict[str, tuple[str, torch.dtype]]


def digests(module: nn.Module) -> Digests:
    """Return name → checksum and dtype of each parameter, or of this rank's shard. Those on the meta device are left out.

    Not for modules that FSDP1 flattened.
    """
    found = {}
    for name, owner, short, parameter in parameters_by_name(module):
        value = digest(owner, short, parameter)
        if value is not None:
            found[name] = value, parameter.dtype
    return found


def changed_since(before: Digests, module: nn.Module) -> set[str]:
    """Return the names of the parameters whose bits differ; a collective if the module is sharded.

    A parameter that was cast to another dtype is no change: some layers cast their bias in the first forward pass.
    """
    now = digests(module)
    changed = {name for name, (value, dtype) in now.items() if name in before and before[name][1] == dtype and before[name][0] != value}
    return set().union(*from_all_ranks(changed)) if any(is_sharded(parameter) for parameter in module.parameters()) else changed
