"""A stand-in for a frozen weight inside code that only multiplies by it, whatever the weight is.

A model's own code reads ``self.down_proj[e]`` and multiplies by it, in one of many ways. It is given an object of these classes in place
of the tensor. The object is asked for products, parts and transposes. So the code stays as it is, and whatever it does stays exact: an
operation that is neither a product, an index nor a transpose raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

# What code may ask of the weight without reading its values.
_METADATA = {
    "data_ptr", "device", "dim", "dtype", "element_size", "is_cpu", "is_cuda", "is_floating_point", "is_meta", "itemsize", "ndim",
    "nelement", "numel", "requires_grad", "shape", "size",
}  # fmt: skip
GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
_PRODUCTS = {"__matmul__", "bmm", "matmul", "mm"} | GROUPED


class WeightStandIn:
    """Base class. The weight has the shape (..., m, n), with leading dimensions such as experts."""

    #: What it stands for, in messages.
    what: ClassVar[str]

    # What a subclass defines.

    def metadata(self, name: str) -> Any:
        """Return an attribute or method of the weight that does not read its values."""
        raise NotImplementedError(f"{type(self).__name__} must define metadata")

    def part(self, index: Any) -> Self:
        """Return what an index, a slice or a vector of indices along the first dimension selects."""
        raise NotImplementedError(f"{type(self).__name__} must define part")

    def exchanged(self) -> Self:
        """Return the transposed matrices."""
        raise NotImplementedError(f"{type(self).__name__} must define exchanged")

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``F.linear(x, W, bias)``."""
        raise NotImplementedError(f"{type(self).__name__} must define linear")

    def multiplied(self, product: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return a product of two arguments, one of which is this weight, with the remaining arguments as they are."""
        raise NotImplementedError(f"{type(self).__name__} must define multiplied")

    # What the code may do with it.

    def __getattr__(self, name: str) -> Any:
        if name in _METADATA:
            return self.metadata(name)
        raise AttributeError(self._refusal(name))

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: Any) -> Self:
        """Return one matrix, for an index, or several, for a vector of indices or a slice; along the first dimension."""
        if self.ndim < 3 or not isinstance(index, (int, slice, Tensor)) or (isinstance(index, Tensor) and index.dtype == torch.bool):
            raise ValueError(self._refusal(f"[{index!r}]"))
        return self.part(index if isinstance(index, slice) or (isinstance(index, Tensor) and index.ndim) else int(index))

    def transpose(self, dim0: int, dim1: int) -> Self:
        """Return the transposed matrices; only the last two dimensions can be exchanged."""
        ndim = self.ndim
        if {dim0 % ndim, dim1 % ndim} != {ndim - 2, ndim - 1}:
            raise ValueError(self._refusal(f"transpose({dim0}, {dim1})"))
        return self.exchanged()

    def contiguous(self) -> Self:
        """Return it with a contiguous weight, which transformers before 5.11 makes for its grouped products."""
        return self

    def t(self) -> Self:
        """Return the transposed matrix."""
        return self.transpose(0, 1)

    @property
    def T(self) -> Self:
        """The transposed matrix."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> Self:
        """The transposed matrices."""
        return self.transpose(-2, -1)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.multiplied(torch.matmul, (self, other), {})

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Tensor:
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        first, second, *_ = (*args, None, None)
        weight = second if isinstance(second, cls) else first
        if isinstance(weight, cls) and sum(isinstance(each, cls) for each in (*args, *kwargs.values())) == 1:
            if name == "linear" and weight is second:
                return weight.linear(first, *args[2:], **kwargs)
            if name in _PRODUCTS:
                return weight.multiplied(func, args, kwargs)
        raise ValueError(cls._refusal(name))

    @classmethod
    def _refusal(cls, name: str) -> str:
        return (
            f"{name} of {cls.what} is not known: only products, indices and transposes are. Choose another implementation of the experts"
            " (model.set_experts_implementation('grouped_mm'), 'batched_mm' or 'eager'), or exclude them"
        )
