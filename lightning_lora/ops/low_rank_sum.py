"""A weight with its low-rank update, ``W + s·P·Q``, that is never built: a stand-in for the weight inside code that only multiplies by it.

A model's own code reads ``self.down_proj[e]`` and multiplies by it, in one of many ways. Given this sum in place of the tensor, each
product is computed as the product with W, plus s times the products with the two factors::

    x·(W + s·P·Q) = x·W + s·(drop(x)·P)·Q        (W + s·P·Q)·x = W·x + s·P·(Q·drop(x))

So the code stays as it is, and whatever it does stays exact: an operation that is neither a product, an index nor a transpose raises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.grouped_linear import grouped_lora_linear, one_operation_takes
from lightning_lora.utils.autocast import autocast_dtype, no_autocast

# What code may ask of the weight without reading its values.
_METADATA = {
    "data_ptr", "device", "dim", "dtype", "element_size", "is_cpu", "is_cuda", "is_floating_point", "is_meta", "itemsize", "ndim",
    "nelement", "numel", "requires_grad", "shape", "size",
}  # fmt: skip
_PRODUCTS = {"__matmul__", "bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback", "matmul", "mm"}
_GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
_ONE_OPERATION = {"grouped_mm", "_grouped_mm"}
_ALIGNED = 16  # bytes that a row of a grouped product's operand is a multiple of


class LowRankSum:
    """``W + scale·P·Q``, with leading dimensions such as experts.

    Args:
        weight: W (..., m, n), frozen.
        left: P (..., m, r), cast to the products' dtype.
        right: Q (..., r, n), cast too.
        scale: s.
        dropout: probability of zeroing an entry of the factors' input; 0 outside training.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scale: float, dropout: float = 0.0) -> None:
        self._weight, self._left, self._right, self._scale, self._dropout = weight, left, right, scale, dropout
        self._each: list[LowRankSum] | None = None

    def _with(self, weight: Tensor, left: Tensor, right: Tensor) -> LowRankSum:
        return LowRankSum(weight, left, right, self._scale, self._dropout)

    # What the code may do with it.

    def __getattr__(self, name: str) -> Any:
        if name in _METADATA:
            return getattr(self._weight, name)
        raise AttributeError(_refusal(name))

    def __len__(self) -> int:
        return len(self._weight)

    def __getitem__(self, index: Any) -> LowRankSum:
        """Return one matrix, for an index, or several, for a vector of indices or a slice; along the first dimension."""
        if (
            self._weight.ndim < 3
            or not isinstance(index, (int, slice, Tensor))
            or (isinstance(index, Tensor) and index.dtype == torch.bool)
        ):
            raise ValueError(_refusal(f"[{index!r}]"))
        if isinstance(index, slice) or (isinstance(index, Tensor) and index.ndim):
            return self._with(self._weight[index], self._left[index], self._right[index])
        return self._one_by_one()[int(index)]

    def _one_by_one(self) -> list[LowRankSum]:
        """Return all matrices. Separated at once, their gradients are gathered at once: an index each would add up tensors of full size.

        The factors are cast to the products' dtype at once too.
        """
        if self._each is None:
            dtype = autocast_dtype(self._weight) or self._weight.dtype
            parts = (tensor.unbind(0) for tensor in (self._weight, self._left.to(dtype), self._right.to(dtype)))
            self._each = [self._with(*part) for part in zip(*parts, strict=True)]
        return self._each

    def transpose(self, dim0: int, dim1: int) -> LowRankSum:
        """Return the sum of the transposed matrices; only the last two dimensions can be exchanged."""
        ndim = self._weight.ndim
        if {dim0 % ndim, dim1 % ndim} != {ndim - 2, ndim - 1}:
            raise ValueError(_refusal(f"transpose({dim0}, {dim1})"))
        return self._with(self._weight.mT, self._right.mT, self._left.mT)

    def contiguous(self) -> LowRankSum:
        """Return it with a contiguous weight, which transformers before 5.11 makes for its grouped products."""
        return self._with(self._weight.contiguous(), self._left, self._right)

    def t(self) -> LowRankSum:
        """Return the transposed matrix."""
        return self.transpose(0, 1)

    @property
    def T(self) -> LowRankSum:
        """The transposed matrix."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> LowRankSum:
        """The transposed matrices."""
        return self.transpose(-2, -1)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self._multiplied(torch.matmul, (self, other), {})

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Tensor:
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        first, second, *_ = (*args, None, None)
        summed = second if isinstance(second, cls) else first
        if isinstance(summed, cls) and sum(isinstance(each, cls) for each in (*args, *kwargs.values())) == 1:
            if name == "linear" and summed is second:
                return summed._linear(*args, **kwargs)
            if name in _PRODUCTS:
                return summed._multiplied(func, args, kwargs)
        raise ValueError(_refusal(name))

    # Products.

    def _linear(self, x: Tensor, weight: LowRankSum, bias: Tensor | None = None) -> Tensor:
        """Return ``F.linear(x, W + s·P·Q, bias)``: W is (out, in), so Q is applied first."""
        y = F.linear(x, self._weight, bias)
        return self._plus_update(y, x, lambda x, P, Q: F.linear(F.linear(x, Q), P))

    def _multiplied(self, product: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the product of both arguments, one of which is this sum, with the remaining arguments as they are."""
        first, second, *rest = args
        if first is self:
            y = product(self._weight, second, *rest, **kwargs)
            return self._plus_update(y, second, lambda x, P, Q: product(P, product(Q, x, *rest, **kwargs), *rest, **kwargs))
        name = getattr(product, "__name__", "")
        offsets = None if rest else kwargs.get("offs")
        more = [value for name, value in kwargs.items() if name != "offs" and value is not None]  # torch's function names all of its own
        if name in _ONE_OPERATION and offsets is not None and not more and one_operation_takes(first, self._weight):
            return self._sorted_rows(first, offsets)
        y = product(first, self._weight, *rest, **kwargs)
        grouped = name in _GROUPED

        def update(x: Tensor, P: Tensor, Q: Tensor) -> Tensor:
            P, Q = _padded(P, Q) if grouped else (P, Q)
            return product(product(x, P, *rest, **kwargs), Q, *rest, **kwargs)

        return self._plus_update(y, first, update)

    def _sorted_rows(self, x: Tensor, offsets: Tensor) -> Tensor:
        return grouped_lora_linear(x, self._weight, self._left.mT, self._right.mT, offsets, self._scale, self._dropout)

    def _plus_update(self, y: Tensor, x: Tensor, update: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return y plus s times the update of x, computed in y's dtype as every adapted layer's is."""
        with nullcontext() if autocast_dtype(y) in (None, y.dtype) else no_autocast(y):
            x = F.dropout(x.to(y.dtype), self._dropout) if self._dropout else x.to(y.dtype)
            return y.add(update(x, self._left.to(y.dtype), self._right.to(y.dtype)), alpha=self._scale)


def product_of_sorted_rows(product: Callable[..., Tensor], x: Tensor, weight: Tensor | LowRankSum, offs: Tensor) -> Tensor:
    """Return transformers' product of sorted rows with each group's matrix, for a weight or a :class:`LowRankSum`.

    Compilers call a class's ``__torch_function__`` for torch's public functions only, and this product is none.

    Args:
        product: transformers' own, for a weight.
        x: (N, in), sorted by group.
        weight: (groups, in, out).
        offs: (groups,), where each group's rows end.
    """
    if not isinstance(weight, LowRankSum):
        return product(x, weight, offs=offs)
    x = x.to(weight.dtype)
    if x.dtype == torch.bfloat16 and one_operation_takes(x, weight._weight):  # others go through an operator of transformers' own
        return weight._sorted_rows(x, offs)
    y = product(x, weight._weight, offs=offs)
    return weight._plus_update(y, x, lambda x, P, Q: product(product(x, P, offs=offs), Q, offs=offs))


def _padded(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors with zeros up to a rank whose rows are aligned, as kernels of grouped products require."""
    lacking = -P.shape[-1] % (_ALIGNED // P.element_size())
    return (F.pad(P, (0, lacking)), F.pad(Q, (0, 0, 0, lacking))) if lacking else (P, Q)


def _refusal(name: str) -> str:
    return (
        f"{name} of a weight with LoRA is not known: only products, indices and transposes are. Choose another implementation of the"
        " experts (model.set_experts_implementation('grouped_mm'), 'batched_mm' or 'eager'), or exclude them from LoRA"
    )
