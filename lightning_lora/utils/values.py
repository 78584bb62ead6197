"""Find values that a tensor must not have: NaN, infinity, numbers of another kind than the parameter that they are for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.utils.sharding import local_tensor

Name = TypeVar("Name", bound=Hashable)


def nonfinite(tensors: Mapping[Name, Tensor], infinite: bool = True) -> list[Name]:
    """Return the names of the tensors that hold NaN or infinity, in their order. Of a sharded tensor, check this rank's shard.

    It waits for a device once per dtype, however many tensors are there.

    Args:
        tensors: name → tensor.
        infinite: infinity counts, not NaN alone.
    """
    groups: dict[tuple[torch.device, torch.dtype], dict[Name, Tensor]] = {}
    for name, tensor in tensors.items():
        mine = local_tensor(tensor.detach())
        if type(mine) in (Tensor, nn.Parameter) and mine.numel() and (mine.is_floating_point() or mine.is_complex()):
            groups.setdefault((mine.device, mine.dtype), {})[name] = mine
    bad: set[Name] = set()
    for group in groups.values():
        largest = torch._foreach_norm(list(group.values()), float("inf"))  # the norm is NaN or infinite if an entry is
        norms = torch.stack(largest)
        wrong = (~norms.isfinite() if infinite else norms.isnan()).tolist()
        bad |= {name for name, each in zip(group, wrong, strict=True) if each}
    return [name for name in tensors if name in bad]


def kind_of_numbers(dtype: torch.dtype) -> str:
    """Return "floating-point", "complex", "boolean" or "integer". A copy between two of them loses values, or their meaning."""
    if dtype.is_floating_point:
        return "floating-point"
    return "complex" if dtype.is_complex else "boolean" if dtype is torch.bool else "integer"
