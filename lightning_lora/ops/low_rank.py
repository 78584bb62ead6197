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
    t = F.linear(F.dropout(x, dropout) if dropout else x, A)  # (..., r)
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
    x, A, B = x.to(y.dtype), A.to(y.dtype), B.to(y.dtype)
    # The compiler fuses the definition itself, and torch.func transforms want nothing but plain operations.
    # DTensors know how to propagate placements through plain operations too, and sparse and jagged tensors have no rows to flatten.
    if transformed() or is_sharded(A) or x.layout is not torch.strided or x.is_nested:
        return lora_update_reference(y, x, A, B, scale, dropout)
    if autocast_dtype(y) is not None:  # all operands have y's dtype: nothing is left to cast
        with torch.autocast(y.device.type, enabled=False):
            return _LowRankUpdate.apply(y, x, A, B, scale, dropout, inplace)
    return _LowRankUpdate.apply(y, x, A, B, scale, dropout, inplace)


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
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float, inplace: bool) -> Tensor:
        drop, probability = plain.draw_drop(x, dropout) if dropout else (None, 0.0)
        ctx.scale = scale = scale / (1 - probability)
        t = F.linear(plain.zeroed(x, drop), A)  # (..., r)
        keep, instead = (x, None) if ctx.needs_input_grad[2] else (None, t)
        ctx.save_for_backward(keep, instead, A, B, drop and drop[0])
        flat, t = y.reshape(-1, y.shape[-1]), t.reshape(-1, t.shape[-1])
        if inplace and y.is_contiguous():
            flat.addmm_(t, B.t(), alpha=scale)
            ctx.mark_dirty(y)
            return y
        # Into a new tensor of y's shape: autograd forbids writing into a view that a custom function returns, as activations in place do.
        z = torch.empty_like(y, memory_format=torch.contiguous_format)
        torch.addmm(flat, t, B.t(), alpha=scale, out=z.view(flat.shape))
        return z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        x, t, A, B, mask = ctx.saved_tensors
        drop = None if mask is None else (mask, 0)
        dx = dA = dB = None
        flat_g = g.reshape(-1, g.shape[-1])
        dt = flat_g @ (B * ctx.scale)  # (N, r); the scale goes into the smallest operand
        if x is None:
            if torch.is_grad_enabled():
                raise RuntimeError(NO_INPUT)
            t = t.reshape(-1, t.shape[-1])
        else:
            flat_x = plain.zeroed(x, drop).reshape(-1, x.shape[-1])
            t = flat_x @ A.t()
            dA = dt.t() @ flat_x
        if ctx.needs_input_grad[3]:
            dB = (flat_g.t() @ t) * ctx.scale
        if ctx.needs_input_grad[1]:
            dx = plain.zeroed((dt @ A).view(*g.shape[:-1], A.shape[1]), drop)
        return g, dx, dA, dB, None, None, None
