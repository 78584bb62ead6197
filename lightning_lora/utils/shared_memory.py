"""Find tensors in the same memory: one tensor under two names, two over the same data, or two views that overlap.

A write into one of them changes the others. ``head.weight.data = embed.weight.data`` ties two parameters as much as one object does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_lora.utils.sharding import local_tensor


class SharedMemory:
    """Look up which of some tensors are in the same memory.

    Args:
        tensors: (name, tensor) pairs. One tensor may have several names.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._by_storage: dict[object, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors:
            self._by_storage.setdefault(_storage(tensor), []).append((name, tensor))

    def names(self, tensor: Tensor) -> list[str]:
        """Return the names of the tensors that are this one or share memory with it, in their order."""
        return [name for name, other in self._by_storage.get(_storage(tensor), ()) if other is tensor or _overlap(tensor, other)]


def _storage(tensor: Tensor) -> object:
    """Return a key that tensors over the same storage share. A tensor without an address has a key of its own."""
    if is_lazy(tensor):
        return id(tensor)
    local = local_tensor(tensor)
    wraps = type(local).__torch_dispatch__ is not Tensor.__torch_dispatch__  # other tensors hold the data
    if wraps or local.is_meta or local.layout != torch.strided or not local.numel():
        return id(tensor)
    return local.device, local.untyped_storage().data_ptr()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors over one storage have bytes in common."""
    one, other = local_tensor(one), local_tensor(other)
    (start, end), (first, last) = _bytes(one), _bytes(other)
    if start >= last or first >= end:
        return False
    if one.element_size() != other.element_size() or (one.is_contiguous() and other.is_contiguous()):
        return True
    begin = min(start, first)
    entries = torch.zeros((max(end, last) - begin) // one.element_size(), dtype=torch.bool)
    place = [entries.as_strided(t.shape, t.stride(), (at - begin) // one.element_size()) for t, at in ((one, start), (other, first))]
    place[0].fill_(True)
    return bool(place[1].any())


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte's address, and the address after the last one."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
