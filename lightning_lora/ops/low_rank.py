"""The low-rank update of a linear layer: ``y + scale · B·A·dropout(x)``.

``lora_update_reference`` is the definition, two lines to check against the paper (arXiv:2106.09685, equation 3). The layers call
``lora_update``. It gives the same numbers with fewer passes over the big tensors, and keeps less for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops import plain
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private import transforms_active


def lora_update_reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Return ``y + scale · dropout(x)·Aᵀ·Bᵀ``, written as in the paper.

    Args:
        y: the base layer's output (..., out).
        x: the base layer's input (..., in).
        A: (r, in).
        B: (out, r).
        scale: α/r.
        dropout: probability; 0 outside training.
    """
    t = F.linear(F.dropout(x, dropout) if dropout else x, A)  # (..., r)
    return y + F.linear(t, B) * scale


def lora_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0, *, inplace: bool = False) -> Tensor:
    """Return the same as :func:`lora_update_reference`, in ``y``'s dtype.

    fp32 adapters on a half-precision base are cast down, because they are small. The activations are never cast up.

    Args:
        y: the base layer's output (..., out).
        x: the base layer's input (..., in).
        A: (r, in).
        B: (out, r).
        scale: α/r.
        dropout: probability; 0 outside training.
        inplace: allow writing to y. It must be a new tensor with no other user, and its own backward must not need it.
    """
    dtype = y.dtype
    if not x.dtype == A.dtype == B.dtype == dtype:
        x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
    # The compiler fuses the definition itself. torch.func transforms need plain operations,
    # and DTensors propagate their placements through those. Sparse and jagged tensors have no rows to flatten.
    if transformed() or is_sharded(A) or not has_rows(x):
        return lora_update_reference(y, x, A, B, scale, dropout)
    if autocast_dtype(y) in (None, dtype):  # all operands have y's dtype: autocast would cast nothing
        return _lora_update(y, x, A, B, scale, dropout, inplace)
    with torch.autocast(y.device.type, enabled=False):
        return _lora_update(y, x, A, B, scale, dropout, inplace)


def transformed() -> bool:
    """True while a compiler or a torch.func transform traces the code. Both need plain operations."""
    return torch.compiler.is_compiling() or transforms_active()


def has_rows(x: Tensor) -> bool:
    """True if x (..., in) can be flattened to rows (n, in); sparse and jagged tensors cannot."""
    return x.layout is torch.strided and not x.is_nested


def _lora_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, inplace: bool) -> Tensor:
    """Compute the update, all in one dtype: t = x·Aᵀ, then one operation that scales and adds.

    Autograd keeps t and x. The operations around the layer keep x anyway.
    """
    if dropout:
        drop, probability = plain.draw_drop(x, dropout)
        t, scale = _DroppedProduct.apply(x, A, drop.source), scale / (1 - probability)
    else:
        t = F.linear(x, A)  # (..., r)
    if y.ndim == 2:
        if inplace and y.is_contiguous():
            return y.addmm_(t, B.t(), alpha=scale)
        return torch.addmm(y, t, B.t(), alpha=scale)
    # No in-place write here: the reshaped y is a view, and writing to a view makes autograd copy the gradient.
    return torch.addmm(y.reshape(-1, y.shape[-1]), t.reshape(-1, t.shape[-1]), B.t(), alpha=scale).view(y.shape)


class _DroppedProduct(torch.autograd.Function):
    """``drop(x)·Aᵀ``: (..., in) → (..., r).

    Keeps x and a mask of one byte per entry, where torch's dropout keeps a copy of x. For a frozen A (LoRA-FA) it keeps the mask alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, A, mask)
        return F.linear(x.masked_fill(mask, 0), A)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dt,) = grads
        x, A, mask = ctx.saved_tensors
        dx = (dt @ A).masked_fill(mask, 0) if ctx.needs_input_grad[0] else None
        if x is None:
            return dx, None, None
        rows = x.masked_fill(mask, 0).reshape(-1, x.shape[-1])
        return dx, dt.reshape(-1, dt.shape[-1]).t() @ rows, None
