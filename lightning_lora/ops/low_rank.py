"""The low-rank update of a linear layer: ``y + scale · B·A·dropout(x)``.

``lora_update_reference`` is the definition, two lines that anyone can check against the paper (arXiv:2106.09685,
equation 3). ``lora_update`` is what the layers call: the same numbers, fewer passes over the big tensors, less kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops import plain
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.sharding import is_sharded


def lora_update_reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """``y + scale · dropout(x)·Aᵀ·Bᵀ`` as the paper has it.

    Args:
        y: the base layer's output (..., out).
        x: its input (..., in).
        A: (r, in).
        B: (out, r).
        scale: α/r.
        dropout: probability; 0 outside training.
    """
    t = F.linear(F.dropout(x, dropout), A)  # (..., r)
    return y + F.linear(t, B) * scale


def lora_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float = 0.0, *, inplace: bool = False) -> Tensor:
    """The same as :func:`lora_update_reference`, in ``y``'s dtype.

    fp32 adapters on a half-precision base are cast down (they are small); the activations are never cast up.

    Args:
        y: the base layer's output (..., out).
        x: its input (..., in).
        A: (r, in).
        B: (out, r).
        scale: α/r.
        dropout: probability; 0 outside training.
        inplace: y may be written to: it is a fresh tensor that nobody else holds and its own backward does not need.
    """
    dtype = y.dtype
    if not x.dtype == A.dtype == B.dtype == dtype:
        x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
    # The compiler fuses the definition itself, and torch.func transforms want nothing but plain operations.
    # DTensors know how to propagate placements through plain operations too.
    if transformed() or is_sharded(A):
        return lora_update_reference(y, x, A, B, scale, dropout)
    if autocast_dtype(y) in (None, dtype):  # all operands have y's dtype: nothing is left to cast
        return _lora_update(y, x, A, B, scale, dropout, inplace)
    with torch.autocast(y.device.type, enabled=False):
        return _lora_update(y, x, A, B, scale, dropout, inplace)


def _lora_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, inplace: bool) -> Tensor:
    """All in one dtype. With gradients or without, the mask is drawn alike: a checkpointed forward runs both ways."""
    drop, probability = plain.draw_drop(x, dropout) if dropout else (None, 0.0)
    inplace = inplace and y.is_contiguous()
    if torch.is_grad_enabled():
        return _LowRankUpdate.apply(y, x, A, B, drop, scale / (1 - probability), inplace)
    return _added(y, F.linear(plain.zeroed(x, drop), A), B, scale / (1 - probability), inplace)


def _added(y: Tensor, t: Tensor, B: Tensor, scale: float, inplace: bool) -> Tensor:
    """``y + scale·t·Bᵀ``, maybe in y's place."""
    rows = y if y.ndim == 2 else y.reshape(-1, y.shape[-1])  # a view where that matters: a y to write to is contiguous
    t = t if t.ndim == 2 else t.reshape(-1, t.shape[-1])
    if inplace:
        rows.addmm_(t, B.t(), alpha=scale)
        return y
    return torch.addmm(rows, t, B.t(), alpha=scale).view(y.shape)


NO_INPUT = (
    "second derivatives (create_graph=True) and vectorized Jacobians need the layer's input, which is not kept while lora_A is frozen."
)


def transformed() -> bool:
    """Whether a compiler or a torch.func transform is looking: they take plain operations."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class _LowRankUpdate(torch.autograd.Function):
    """Accumulates into y and keeps x alone, which the neighbours keep anyway; with dropout also one byte an entry of x.

    With x₀ the input with its dropped entries at zero, s the scale (over 1 − p with dropout), t = x₀·Aᵀ and g the gradient of
    the output: dt = s·g·B, dB = s·gᵀ·t, dA = dtᵀ·x₀, dx = dt·A with the same entries at zero. t is computed again in the
    backward pass: it costs r/out of the base's product. Every step is differentiable, so second derivatives work; but not those of a
    layer whose A is frozen (LoRA-FA), which keeps t in the place of x.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, drop: plain.Drop | None, scale: float, inplace: bool
    ) -> Tensor:
        t = F.linear(plain.zeroed(x, drop), A)  # (..., r)
        ctx.save_for_backward(*((x, None) if ctx.needs_input_grad[2] else (None, t)), A, B, None if drop is None else drop.source)
        ctx.scale = scale
        if inplace:
            ctx.mark_dirty(y)
        return _added(y, t, B, scale, inplace)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        x, t, A, B, mask = ctx.saved_tensors
        _, needs_x, _, needs_B, *_ = ctx.needs_input_grad
        drop = None if mask is None else plain.Drop(mask)
        dx = dA = dB = None
        rows = grad if grad.ndim == 2 else grad.reshape(-1, grad.shape[-1])
        dt = rows @ (B * ctx.scale)  # (N, r); the scale goes into the smallest operand
        if x is None:
            if torch.is_grad_enabled():
                raise RuntimeError(NO_INPUT)
            t = t.reshape(-1, t.shape[-1])
        else:
            x_rows = plain.zeroed(x, drop).reshape(-1, x.shape[-1])
            t = x_rows @ A.t()
            dA = dt.t() @ x_rows
        if needs_B:
            dB = (rows.t() @ t) * ctx.scale
        if needs_x:
            dx = plain.zeroed((dt @ A).view(*grad.shape[:-1], A.shape[1]), drop)
        return grad, dx, dA, dB, None, None, None
