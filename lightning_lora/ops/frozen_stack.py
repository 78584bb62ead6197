"""Packed stacks of frozen matrices, such as the experts of a mixture: a stand-in for the weight that dequantizes in each product.

Neither autograd nor a compiler ever keeps a dense matrix. The forward pass dequantizes, multiplies and frees. So does the backward pass,
whose product is the same with the transposed matrices. A product of all experts dequantizes them in parts of at most 1 GiB (``MOST``), or
one matrix if that is larger; an expert taken by its index is dequantized alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from lightning_lora.ops.frozen_weight import FrozenWeight, flatten_weights, unflatten_weights
from lightning_lora.ops.second_derivatives import wants_definition
from lightning_lora.ops.stand_in import GROUPED, WeightStandIn
from lightning_lora.utils.autocast import autocast_dtype, no_autocast
from lightning_lora.utils.custom_op import dispatch, register_custom_op
from lightning_lora.utils.torch_private import transforms_active

MOST = 2**30  # bytes of dense matrices at once


class FrozenStack(WeightStandIn, FrozenWeight):
    """Packed matrices (..., m, n), none or one leading dimension. A subclass is a format.

    Args:
        tensors: that store the matrices: the codes, then others of the format. All but the last :attr:`tables` have the stack's leading
            dimensions.
        size: (m, n) of a matrix as it is stored.
        dtype: what code that asks for the weight's dtype is told.
        flipped: the matrices are the transposed of what is stored.
    """

    what = "a quantized weight"
    #: Name in ``WEIGHT_LAYOUTS``.
    name: ClassVar[str]
    #: Number of tensors that all matrices share.
    tables: ClassVar[int] = 0

    def __init__(self, tensors: Sequence[Tensor], size: tuple[int, int], dtype: torch.dtype = torch.float32, flipped: bool = False) -> None:
        self.tensors, self.size_stored, self.plain_dtype, self.flipped = tuple(tensors), size, dtype, flipped

    def stored(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized matrices as they are stored, a new tensor."""
        raise NotImplementedError(f"{type(self).__name__} must define stored")

    @property
    def leading(self) -> torch.Size:
        """The leading dimensions."""
        raise NotImplementedError(f"{type(self).__name__} must define leading")

    @property
    def layout(self) -> str:  # type: ignore[override]
        """Return the layout's name, the size of a matrix, and 1 if it is transposed."""
        return " ".join(map(str, (self.name, *self.size_stored, int(self.flipped))))

    @classmethod
    def made(cls, tensors: Sequence[Tensor], words: Sequence[str]) -> Self:
        """Build a stack from its tensors and the words after its layout's name."""
        rows, columns, flipped = map(int, words)
        return cls(tensors, (rows, columns), flipped=bool(flipped))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized matrices."""
        return self.stored(dtype).mT if self.flipped else self.stored(dtype)

    # As a stand-in.

    def metadata(self, name: str) -> Any:
        """Return what a plain weight would say."""
        if name in ("device", "is_cpu", "is_cuda", "is_meta", "data_ptr"):
            return getattr(self.tensors[0], name)
        size = self.size_stored[::-1] if self.flipped else self.size_stored
        shape = torch.Size((*self.leading, *size))
        known: dict[str, Any] = {
            "shape": shape, "ndim": len(shape), "dtype": self.plain_dtype, "itemsize": self.plain_dtype.itemsize, "requires_grad": False,
        }  # fmt: skip
        if name in known:
            return known[name]
        answers: dict[str, Any] = {
            "size": lambda dim=None: shape if dim is None else shape[dim], "dim": lambda: len(shape), "numel": lambda: math.prod(shape),
            "nelement": lambda: math.prod(shape), "element_size": lambda: self.plain_dtype.itemsize, "is_floating_point": lambda: True,
        }  # fmt: skip
        return answers[name]

    def _with(self, tensors: Sequence[Tensor], flipped: bool) -> Self:
        return type(self)(tensors, self.size_stored, self.plain_dtype, flipped)

    def part(self, index: Any) -> Self:
        """Return some of the packed matrices."""
        own = len(self.tensors) - self.tables
        return self._with([tensor[index] for tensor in self.tensors[:own]] + [*self.tensors[own:]], self.flipped)

    def unbind(self, dim: int) -> list[Self]:
        """Return all matrices."""
        return [self.part(k) for k in range(len(self))]

    def exchanged(self) -> Self:
        """Return the transposed matrices, without touching them."""
        return self._with(self.tensors, not self.flipped)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x·Wᵀ + b``."""
        y = multiply(x, self.mT)
        return y if bias is None else y + bias.to(y.dtype)

    def multiplied(self, product: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return a product with the matrices on either side."""
        (first, second), name = args[:2], getattr(product, "__name__", "")
        offsets = kwargs.get("offs", args[2] if len(args) == 3 and name in GROUPED else None)
        if (
            len(args) > 3
            or any(value is not None for key, value in kwargs.items() if key != "offs")
            or (offsets is None) == (name in GROUPED)
        ):
            raise ValueError(self._refusal(f"{name} with these arguments"))
        if second is self:
            return multiply(first, self, offsets)
        if offsets is not None:
            raise ValueError(self._refusal(f"{name} from the left"))
        return multiply(second.mT, self.mT).mT

    # Products.

    def times(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Return ``x·W`` in x's dtype, without a gradient; see :func:`multiply`."""
        if self.ndim == 2:
            return x @ self.dense(x.dtype)
        count, width = len(self), self.shape[-1]
        step = max(1, MOST // (self.shape[-2] * width * x.element_size()))
        if step >= count:
            return x @ self.dense(x.dtype) if offsets is None else F.grouped_mm(x, self.dense(x.dtype), offs=offsets)
        parts = range(0, count, step)
        if offsets is None:
            return torch.cat([x[k : k + step] @ self[k : k + step].dense(x.dtype) for k in parts])
        y, ends = x.new_zeros(x.shape[0], width), [0, *offsets.tolist()]
        for k in parts:
            first, last = ends[k], ends[min(k + step, count)]
            if first < last:
                y[first:last] = F.grouped_mm(x[first:last], self[k : k + step].dense(x.dtype), offs=offsets[k : k + step] - first)
        return y


def multiply(x: Tensor, W: FrozenStack, offsets: Tensor | None = None) -> Tensor:
    """Return ``x·W`` with a gradient for x, in x's dtype or in autocast's.

    Args:
        x: (..., m) for one matrix; (E, N, m), or (N, m) for all alike, for a stack; (N, m), sorted by group, with offsets.
        W: (m, n) or (E, m, n).
        offsets: (E,) int32, where each group's rows end, for a grouped product. Rows after the last group are undefined.

    Returns:
        (..., n), (E, N, n) or (N, n).
    """
    x = x.to(autocast_dtype(x) or x.dtype)
    with no_autocast(x):
        if not torch.compiler.is_compiling() and transforms_active():
            return x @ W.dense(x.dtype) if offsets is None else F.grouped_mm(x, W.dense(x.dtype), offs=offsets)
        if W.ndim == 3 and offsets is None and x.ndim == 2:
            x = x.expand(len(W), *x.shape)
        rows = x.reshape(-1, x.shape[-1]) if W.ndim == 2 else x
        tensors, layouts = flatten_weights([W])
        y: Tensor
        if rows.requires_grad and torch.is_grad_enabled():
            y = _Multiply.apply(rows, layouts, offsets, W.shape[-1], False, *tensors)
        else:  # Dynamo traces an autograd function only where it is needed
            y = dispatch(_product, rows, tensors, layouts, offsets, W.shape[-1], False)[0]
        return y.view(*x.shape[:-1], y.shape[-1])


class _Multiply(torch.autograd.Function):
    """``y = x·W``, ``dx = dy·Wᵀ``; of the transposed matrices where ``flipped`` is set."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layouts: Any, offsets: Tensor | None, width: int, flipped: bool, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(offsets, *tensors)
        ctx.layouts, ctx.width, ctx.flipped = layouts, x.shape[-1], flipped
        return dispatch(_product, x, list(tensors), layouts, offsets, width, flipped)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,), (offsets, *tensors) = grads, ctx.saved_tensors
        with no_autocast(dy):
            if not torch.compiler.is_compiling() and wants_definition(dy):
                (W,) = unflatten_weights(tensors, ctx.layouts)
                turned: Any = W if ctx.flipped else W.mT  # type: ignore[attr-defined]
                dense = turned.dense(dy.dtype)
                dx = dy @ dense if offsets is None else F.grouped_mm(dy, dense, offs=offsets)
            else:
                dx = dispatch(_product, dy.contiguous(), tensors, ctx.layouts, offsets, ctx.width, not ctx.flipped)[0]
        return dx, None, None, None, None, *[None] * len(tensors)


def _product(x: Tensor, tensors: list[Tensor], layouts: Sequence[Any], offsets: Tensor | None, width: int, flipped: bool) -> list[Tensor]:
    (W,) = unflatten_weights(tensors, layouts)
    return [grouped(W, x, offsets, flipped)]


def grouped(W: FrozenWeight, x: Tensor, offsets: Tensor | None, flipped: bool = False) -> Tensor:
    """Return ``x·W``, or ``x·Wᵀ`` if ``flipped``, for a stack or a plain weight (E, m, n), without a gradient."""
    if isinstance(W, FrozenStack):
        return (W.mT if flipped else W).times(x, offsets)
    (plain,) = W.tensors
    return F.grouped_mm(x, plain.mT if flipped else plain, offs=offsets)


def _shapes(x: Tensor, tensors: Any, layouts: Any, offsets: Any, width: int, flipped: bool) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], width)]


register_custom_op(
    "frozen_stack_product(Tensor x, Tensor[] weights, str[] layouts, Tensor? offsets, int width, bool flipped) -> Tensor[]",
    _product,
    _shapes,
)
