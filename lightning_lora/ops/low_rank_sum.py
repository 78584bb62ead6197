"""A weight with its low-rank update, ``W + s·P·Q``, that is never built: a stand-in for the weight inside code that only multiplies by it.

Each product is computed as the product with W, plus s times the products with the two factors::

    x·(W + s·P·Q) = x·W + s·(drop(x)·P)·Q        (W + s·P·Q)·x = W·x + s·P·(Q·drop(x))

W is a tensor, or itself a stand-in for packed matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.frozen_stack import FrozenStack, multiply
from lightning_lora.ops.grouped_linear import aligned, grouped_lora_linear, one_operation_takes
from lightning_lora.ops.stand_in import GROUPED, WeightStandIn
from lightning_lora.utils.autocast import autocast_dtype, no_autocast

_ONE_OPERATION = {"grouped_mm", "_grouped_mm"}


class LowRankSum(WeightStandIn):
    """``W + scale·P·Q``, with leading dimensions such as experts.

    Args:
        weight: W (..., m, n), frozen.
        left: P (..., m, r), cast to the products' dtype.
        right: Q (..., r, n), cast too.
        scale: s.
        dropout: probability of zeroing an entry of the factors' input; 0 outside training.
    """

    what = "a weight with LoRA"

    def __init__(self, weight: Tensor | FrozenStack, left: Tensor, right: Tensor, scale: float, dropout: float = 0.0) -> None:
        self._weight, self._left, self._right, self._scale, self._dropout = weight, left, right, scale, dropout
        self._each: list[LowRankSum] | None = None

    def _with(self, weight: Tensor | FrozenStack, left: Tensor, right: Tensor) -> LowRankSum:
        return LowRankSum(weight, left, right, self._scale, self._dropout)

    def metadata(self, name: str) -> Any:
        """Return what W says."""
        return getattr(self._weight, name)

    def part(self, index: Any) -> LowRankSum:
        """Return one matrix or several."""
        if isinstance(index, int):
            return self._one_by_one()[index]
        return self._with(self._weight[index], self._left[index], self._right[index])

    def _one_by_one(self) -> list[LowRankSum]:
        """Return all matrices. Separated at once, their gradients are gathered at once: an index each would add up tensors of full size.

        The factors are cast to the products' dtype at once too.
        """
        if self._each is None:
            dtype = autocast_dtype(self._weight) or self._weight.dtype  # type: ignore[arg-type]  # a stand-in says all that it asks
            parts = (each.unbind(0) for each in (self._weight, self._left.to(dtype), self._right.to(dtype)))
            self._each = [self._with(*part) for part in zip(*parts, strict=True)]
        return self._each

    def exchanged(self) -> LowRankSum:
        """Return the sum of the transposed matrices."""
        return self._with(self._weight.mT, self._right.mT, self._left.mT)

    def contiguous(self) -> LowRankSum:
        """Return it with a contiguous weight."""
        return self._with(self._weight.contiguous(), self._left, self._right)

    # Products.

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``F.linear(x, W + s·P·Q, bias)``: W is (out, in), so Q is applied first."""
        y = F.linear(x, self._weight, bias)  # type: ignore[arg-type]  # a stand-in multiplies
        return self._plus_update(y, x, lambda x, P, Q: F.linear(F.linear(x, Q), P))

    def multiplied(self, product: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
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
        grouped = name in GROUPED

        def update(x: Tensor, P: Tensor, Q: Tensor) -> Tensor:
            Q, P = aligned(Q, P) if grouped else (Q, P)
            return product(product(x, P, *rest, **kwargs), Q, *rest, **kwargs)

        return self._plus_update(y, first, update)

    def _sorted_rows(self, x: Tensor, offsets: Tensor) -> Tensor:
        return grouped_lora_linear(x, self._weight, self._left.mT, self._right.mT, offsets, self._scale, self._dropout)

    def _plus_update(self, y: Tensor, x: Tensor, update: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return y plus s times the update of x, computed in y's dtype as every adapted layer's is."""
        with nullcontext() if autocast_dtype(y) in (None, y.dtype) else no_autocast(y):
            x = F.dropout(x.to(y.dtype), self._dropout) if self._dropout else x.to(y.dtype)
            return y.add(update(x, self._left.to(y.dtype), self._right.to(y.dtype)), alpha=self._scale)


def product_of_sorted_rows(product: Callable[..., Tensor], x: Tensor, weight: Tensor | FrozenStack | LowRankSum, offs: Tensor) -> Tensor:
    """Return transformers' product of sorted rows with each group's matrix, for a weight or a stand-in.

    Compilers call a class's ``__torch_function__`` for torch's public functions only, and this product is none.

    Args:
        product: transformers' own, for a weight.
        x: (N, in), sorted by group.
        weight: (groups, in, out).
        offs: (groups,), where each group's rows end.
    """

    def times(x: Tensor, weight: Tensor | FrozenStack) -> Tensor:
        return multiply(x, weight, offs) if isinstance(weight, FrozenStack) else product(x, weight, offs=offs)

    if not isinstance(weight, LowRankSum):
        return times(x, weight)
    x = x.to(weight.dtype)
    if x.dtype == torch.bfloat16 and one_operation_takes(x, weight._weight):  # others go through an operator of transformers' own
        return weight._sorted_rows(x, offs)
    return weight._plus_update(times(x, weight._weight), x, lambda x, P, Q: times(times(x, P), Q))
