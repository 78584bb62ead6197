"""The product of sorted rows with each group's own frozen matrix and its low-rank update, as one operation.

Mixtures sort tokens by expert and multiply each expert's rows by its matrix in one grouped product. ``grouped_lora_linear`` computes
``y = x·W_g + scale·drop(x)·A_gᵀ·B_gᵀ`` for the rows of each group g: three grouped products, however many experts there are. The update is
added into the base product's output, x gets one gradient, and the scale is applied to the rank-r product. The backward pass needs x and
the rank-r product. No loop over groups, nothing of a weight's size, and nothing that waits for the device to count its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops import backends
from lightning_lora.ops.frozen_stack import FrozenStack, grouped, multiply
from lightning_lora.ops.frozen_weight import FrozenWeight, flatten_weights, unflatten_weights
from lightning_lora.ops.second_derivatives import wants_definition
from lightning_lora.utils.custom_op import dispatch, register_custom_op
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private import transforms_active

_ALIGNED = 16  # bytes that a row of a grouped product's operand is a multiple of


def one_operation_takes(x: Tensor, W: Tensor | FrozenStack) -> bool:
    """True if one operation may take x and a weight: neither weights that train, mixed dtypes, DTensors nor torch.func transforms."""
    fixed = isinstance(W, FrozenStack) or not (W.requires_grad or is_sharded(W))
    return x.dtype == W.dtype and fixed and not (is_sharded(x) or transforms_active())


def grouped_lora_linear(
    x: Tensor, W: Tensor | FrozenStack, A: Tensor, B: Tensor, offsets: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """Return ``x·W_g + scale·drop(x)·A_gᵀ·B_gᵀ`` for each group g of rows.

    Args:
        x: (N, in), sorted by group, in W's dtype.
        W: (groups, in, out), frozen, of any layout that ``F.grouped_mm`` takes, or packed.
        A: (groups, r, in), of any floating dtype; cast to x's.
        B: (groups, out, r), likewise.
        offsets: (groups,) int32, where each group's rows end. The output's rows after the last group are undefined, as those of
            ``F.grouped_mm``.
        scale: α/r.
        dropout: probability; 0 outside training.

    Returns:
        (N, out), in x's dtype.
    """
    A, B = A.to(x.dtype), B.to(x.dtype)
    A, B = aligned(A, B)
    dropped = F.dropout(x, dropout) if dropout else None
    tensors, layouts = flatten_weights([W])
    return _Grouped.apply(x, dropped, A.contiguous(), B.contiguous(), offsets, scale, W.shape[2], layouts, *tensors)


def aligned(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (…, r, in) and (…, out, r) with zeros up to a rank whose rows are aligned, as kernels of grouped products require."""
    lacking = -A.shape[-2] % (_ALIGNED // A.element_size())
    return (F.pad(A, (0, 0, 0, lacking)), F.pad(B, (0, lacking))) if lacking else (A, B)


def _definition(x: Tensor, dropped: Tensor | None, A: Tensor, B: Tensor, W: FrozenWeight, offsets: Tensor, scale: float) -> Tensor:
    t = F.grouped_mm(x if dropped is None else dropped, A.mT, offs=offsets) * scale
    base = multiply(x, W, offsets) if isinstance(W, FrozenStack) else F.grouped_mm(x, W.tensors[0], offs=offsets)
    return base + F.grouped_mm(t, B.mT, offs=offsets)


class _Grouped(torch.autograd.Function):
    """For each group's rows, with t = s·drop(x)·Aᵀ and dt = s·dy·B: dB = dyᵀ·t, dA = dtᵀ·drop(x), dx = dy·Wᵀ + drop(dt·A)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        A: Tensor,
        B: Tensor,
        offsets: Tensor,
        scale: float,
        width: int,
        layouts: Any,
        *W: Tensor,
    ) -> Tensor:
        y, t = dispatch(_forward, x, dropped, list(W), layouts, A, B, offsets, scale, width)
        ctx.save_for_backward(x if dropped is None else None, dropped, A, B, offsets, t, *W)
        ctx.scale, ctx.layouts = scale, layouts
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, dropped, A, B, offsets, t, *W = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]  # of x, the dropped x, A and B
        none = [None] * (len(ctx.needs_input_grad) - len(needs))
        if not torch.compiler.is_compiling() and wants_definition(dy):
            if x is None and needs[0]:  # its gradient does not depend on it
                x = torch.zeros_like(dropped).requires_grad_()
            wanted = [tensor for tensor, need in zip((x, dropped, A, B), needs, strict=True) if need]
            with torch.enable_grad():
                y = _definition(x, dropped, A, B, unflatten_weights(W, ctx.layouts)[0], offsets, ctx.scale)
            again = iter(torch.autograd.grad(y, wanted, dy, create_graph=torch.is_grad_enabled(), allow_unused=True))
            return *(next(again) if need else None for need in needs), *none
        read, apart = x if dropped is None else dropped, dropped is not None and needs[1]
        found = dispatch(_backward, dy, read, W, ctx.layouts, A, B, offsets, t, ctx.scale, needs[0], apart)
        return *(gradient if need else None for gradient, need in zip(found, needs, strict=True)), *none


def _forward(
    x: Tensor,
    dropped: Tensor | None,
    W: list[Tensor],
    layouts: Sequence[Any],
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float,
    width: int,
) -> list[Tensor]:
    """Return y and the scaled t."""
    y = grouped(unflatten_weights(W, layouts)[0], x, offsets)
    t = F.grouped_mm(x if dropped is None else dropped, A.mT, offs=offsets).mul_(scale)
    return [_add_(y, t, B, offsets), t]


def _backward(
    dy: Tensor, read: Tensor, W: list[Tensor], layouts: Sequence[Any], A: Tensor, B: Tensor, offsets: Tensor, t: Tensor, scale: float,
    needs_x: bool, apart: bool,
) -> list[Tensor]:  # fmt: skip
    """Return dx and the gradient of the dropped x, empty unless they are needed, then dA and dB. Unless ``apart``, dx is of both."""
    dy = dy.contiguous()
    dt = F.grouped_mm(dy, B, offs=offsets).mul_(scale)
    dB, dA = F.grouped_mm(dy.t(), t, offs=offsets), F.grouped_mm(dt.t(), read, offs=offsets)
    dx, d_dropped = dy.new_empty(0), dy.new_empty(0)
    if apart:
        d_dropped = F.grouped_mm(dt, A, offs=offsets)
    if needs_x:
        dx = grouped(unflatten_weights(W, layouts)[0], dy, offsets, flipped=True)
        dx = dx if apart else _add_(dx, dt, A.mT, offsets)
    return [dx, d_dropped, dA, dB]


def _add_(y: Tensor, t: Tensor, B: Tensor, offsets: Tensor) -> Tensor:
    """Compute ``y += t·B_gᵀ`` in place: (N, C), (N, R), (groups, C, R) → y."""
    if backends.has_kernels(y):
        from lightning_lora.ops import triton_grouped

        return triton_grouped.add_(y, t, B, offsets)
    return y.add_(F.grouped_mm(t, B.mT, offs=offsets))


def _forward_shapes(x: Tensor, dropped: Any, W: Any, layouts: Any, A: Tensor, *operands: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], operands[-1]), x.new_empty(x.shape[0], A.shape[1])]


def _backward_shapes(dy: Tensor, read: Tensor, W: Any, layouts: Any, A: Tensor, B: Tensor, *operands: Any) -> list[Tensor]:
    *_, needs_x, apart = operands
    return [dy.new_empty(read.shape if need else (0,)) for need in (needs_x, apart)] + [factor.new_empty(factor.shape) for factor in (A, B)]


register_custom_op(
    "grouped_forward(Tensor x, Tensor? dropped, Tensor[] W, str[] layouts, Tensor A, Tensor B, Tensor offsets, float scale, int width)"
    " -> Tensor[]",
    _forward,
    _forward_shapes,
)
register_custom_op(
    "grouped_backward(Tensor dy, Tensor read, Tensor[] W, str[] layouts, Tensor A, Tensor B, Tensor offsets, Tensor t, float scale,"
    " bool needs_x, bool apart) -> Tensor[]",
    _backward,
    _backward_shapes,
)
