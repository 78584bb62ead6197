"""Tensors that are computed when they are read, so that code made for whole models can write one without holding it.

A :class:`DeferredTensor` has a shape and a dtype, is on the meta device, and knows how to compute its values. Operations on it give
deferred tensors again. Moving it to a real device computes it, as writers of files do tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lora.utils.torch_private import map_tensors, returns_new_tensors, writes_to


class DeferredTensor(Tensor):
    """A read-only tensor whose values are computed each time they are needed."""

    _meta: Tensor  # a plain tensor on the meta device, of the same shape, strides and dtype
    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, meta: Tensor, compute: Callable[[], Tensor]) -> DeferredTensor:
        """Defer a computation.

        Args:
            meta: a tensor on the meta device with the result's shape, strides and dtype.
            compute: returns the values, on any real device. It may be called several times.
        """
        made = meta.as_subclass(cls)
        made._meta, made._compute = meta, compute
        return made

    def value(self) -> Tensor:
        """Compute the values.

        Raises:
            RuntimeError: the result has another shape or dtype than was said.
        """
        found = self._compute()
        if (found.shape, found.dtype) != (self._meta.shape, self._meta.dtype):
            raise RuntimeError(
                f"a tensor was computed with shape {tuple(found.shape)} and {found.dtype}, announced with"
                f" {tuple(self._meta.shape)} and {self._meta.dtype}."
            )
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Defer an operation that only makes new tensors; compute any other now."""
        kwargs = kwargs or {}

        def now() -> Any:
            values, named = map_tensors(DeferredTensor, DeferredTensor.value, (args, kwargs))
            return func(*values, **named)

        if writes_to(func, args, kwargs, DeferredTensor):
            raise RuntimeError(f"{func} would write to a tensor that is computed when it is read.")
        device = kwargs.get("device")
        if not returns_new_tensors(func) or (device is not None and torch.device(device).type != "meta"):
            return now()
        metas, named = map_tensors(Tensor, _shape_only, (args, kwargs))
        out = func(*metas, **named)
        if isinstance(out, Tensor):
            return DeferredTensor(_alone(out), now)
        return type(out)(DeferredTensor(_alone(each), partial(_place, now, place)) for place, each in enumerate(out))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the values."""
        return self.value().__reduce_ex__(protocol)


def _shape_only(tensor: Tensor) -> Tensor:
    return tensor._meta if isinstance(tensor, DeferredTensor) else tensor.to("meta")


def _alone(meta: Tensor) -> Tensor:
    """Return a view as a tensor with its own storage, because writers of files take the storage's size for the tensor's."""
    return torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="meta")


def _place(compute: Callable[[], Sequence[Tensor]], place: int) -> Tensor:
    return compute()[place]
