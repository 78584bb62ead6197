"""Frozen linears and their low-rank updates as one operation, for the linears that read the same input.

``lora_linears`` computes, for siblings k such as a block's q, k and v projections, ``y_k = x·W_kᵀ + b_k + s_k·drop(x)·A_kᵀ·B_kᵀ``: what
:func:`lightning_lora.ops.lora_update_reference` says of each alone, with the A's stacked into one product, every update added into the
base product's output, and one gradient for x. For the backward pass it keeps x, once for all of them, and the rank-r product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora import kernels
from lightning_lora.kernels import plain
from lightning_lora.opaque import call, opaque


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    dropout: float = 0.0,
) -> tuple[Tensor, ...]:
    """The outputs of n adapted linears that read the same x; with dropout, the same entries of x are dropped for all.

    Args:
        x: (..., in).
        weights: n frozen weights (out_k, in).
        biases: n biases (out_k,), or None.
        As: n factors (r_k, in), of any floating dtype.
        Bs: n factors (out_k, r_k).
        scales: α/r of each.
        dropout: probability; 0 outside training.

    Returns:
        n tensors (..., out_k), in x's dtype, or autocast's where it is on.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return lora_linears(x.to(torch.get_autocast_dtype(device)), weights, biases, As, Bs, scales, dropout)
    flat = x.reshape(-1, x.shape[-1])
    fast = kernels.usable(flat)
    drop, p = _backend(fast).draw_drop(flat, dropout) if dropout else (None, 0.0)
    mask, threshold = drop or (None, 0)
    settings = (fast, threshold, tuple(s / (1 - p) for s in scales), len(weights))
    ys = _Linears.apply(flat, mask, settings, *weights, *biases, *As, *Bs)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class _Linears(torch.autograd.Function):
    """With t = drop(x)·Aᵀ for the stacked and scaled A, and g_k the gradient of y_k: dt_k = g_k·B_k, dB_k = g_kᵀ·t_k,
    dA = dtᵀ·drop(x), dx = Σ g_k·W_k + drop(dt·A)."""  # noqa: D205, D209

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, settings: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        fast, threshold, scales, n = settings
        weights, biases, As, Bs = (tensors[k * n : k * n + n] for k in range(4))
        A = stacked(As, scales, x.dtype)
        lows = [B.to(x.dtype) for B in Bs]
        *ys, t = call(_forward, x, A, mask, threshold, fast, list(weights), list(biases), lows)
        # A frozen A (LoRA-FA) has no gradient to take from x.
        keep = x if any(ctx.needs_input_grad[3 + 2 * n : 3 + 3 * n]) else None
        ctx.save_for_backward(keep, mask, t, A, *tensors)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        fast, threshold, scales, n = ctx.settings
        x, mask, t, A, *tensors = ctx.saved_tensors
        weights, biases, As, Bs = (tensors[k * n : k * n + n] for k in range(4))
        needs_x, needs_bias, needs_A = ctx.needs_input_grad[0], ctx.needs_input_grad[3 + n : 3 + 2 * n], x is not None
        dtype = t.dtype
        zero = next(g for g in grads if g is not None)
        gs = [zero.new_zeros(zero.shape[0], B.shape[0]) if g is None else g for g, B in zip(grads, Bs, strict=True)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            return _differentiable(ctx, lambda x, drop: _definition(x, drop, scales, weights, biases, As, Bs), x, mask, A.shape[1], grads)
        lows = [B.to(dtype) for B in Bs]
        dx, dA, *dBs = call(_backward, gs, x, t, A, mask, threshold, fast, list(weights), lows, needs_x)
        dx, dA = (dx if needs_x else None), (dA if needs_A else None)
        dAs = [None] * n if dA is None else [d * s for d, s in zip(dA.split([a.shape[0] for a in As]), scales, strict=True)]
        dAs = [None if d is None else d.to(a.dtype) for d, a in zip(dAs, As, strict=True)]
        dBs = [d.to(B.dtype) for d, B in zip(dBs, Bs, strict=True)]
        dbiases = [g.sum(0).to(b.dtype) if b is not None and need else None for g, b, need in zip(gs, biases, needs_bias, strict=True)]
        return dx, None, None, *[None] * n, *dbiases, *dAs, *dBs


def stacked(As: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The A's below one another, each times its scale (which is cheapest here), in the dtype of the activations."""
    return torch.cat([(A * s).to(dtype) for A, s in zip(As, scales, strict=True)])


def _forward(
    x: Tensor,
    A: Tensor,
    mask: Tensor | None,
    threshold: int,
    fast: bool,
    weights: list[Tensor],
    biases: list[Tensor | None],
    Bs: list[Tensor],
) -> list[Tensor]:
    """The outputs and t, from operands of one dtype."""
    backend, drop = _backend(fast), None if mask is None else (mask, threshold)
    t = backend.project(x, A, drop)
    ys = []
    for W, bias, B, part in zip(weights, biases, Bs, _split(t, Bs), strict=True):
        y = F.linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))
        ys.append(backend.add_(y, part, B))
    return [*ys, t]


def _backward(
    gs: list[Tensor],
    x: Tensor | None,
    t: Tensor,
    A: Tensor,
    mask: Tensor | None,
    threshold: int,
    fast: bool,
    weights: list[Tensor],
    Bs: list[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    """dx (empty unless needed), dA (empty without x) and the dB's."""
    backend, drop = _backend(fast), None if mask is None else (mask, threshold)
    pairs = [backend.both(g, B, part) for g, B, part in zip(gs, Bs, _split(t, Bs), strict=True)]
    dt = torch.cat([pair[0].to(t.dtype) for pair in pairs], 1) if len(pairs) > 1 else pairs[0][0].to(t.dtype)
    dx = t.new_empty(0)
    if needs_x:
        dx = gs[0] @ weights[0].to(t.dtype)
        for g, W in zip(gs[1:], weights[1:], strict=True):
            dx.addmm_(g, W.to(t.dtype))
        dx = backend.add_(dx, dt, A.t(), drop)
    dA = t.new_empty(0) if x is None else backend.reduce(dt, x, drop)
    return [dx, dA, *(pair[1].contiguous() for pair in pairs)]


def _forward_shapes(x: Tensor, A: Tensor, mask: Any, threshold: int, fast: bool, weights: Any, biases: Any, Bs: Any) -> list[Tensor]:
    return [*(x.new_empty(x.shape[0], W.shape[0]) for W in weights), x.new_empty(x.shape[0], A.shape[0])]


def _backward_shapes(
    gs: Any, x: Any, t: Tensor, A: Tensor, mask: Any, threshold: int, fast: bool, weights: Any, Bs: Any, needs_x: bool
) -> list[Tensor]:
    sums = torch.float32 if fast else t.dtype
    dx = t.new_empty(*((t.shape[0], A.shape[1]) if needs_x else (0,)))
    dA = t.new_empty(0) if x is None else A.new_empty(A.shape, dtype=sums)
    return [dx, dA, *(B.new_empty(B.shape, dtype=sums) for B in Bs)]


opaque(
    "linears_forward(Tensor x, Tensor A, Tensor? mask, int threshold, bool fast, Tensor[] weights, Tensor?[] biases, Tensor[] Bs)"
    " -> Tensor[]",
    _forward,
    _forward_shapes,
)
opaque(
    "linears_backward(Tensor[] gs, Tensor? x, Tensor t, Tensor A, Tensor? mask, int threshold, bool fast, Tensor[] weights,"
    " Tensor[] Bs, bool needs_x) -> Tensor[]",
    _backward,
    _backward_shapes,
)


def _split(t: Tensor, Bs: Sequence[Tensor]) -> Sequence[Tensor]:
    return t.split([B.shape[1] for B in Bs], 1)


def _backend(fast: bool) -> Any:
    if fast:
        from lightning_lora.kernels import low_rank

        return low_rank
    return plain


def _definition(x: Tensor, drop: plain.Drop | None, scales: Any, weights: Any, biases: Any, As: Any, Bs: Any) -> tuple[Tensor, ...]:
    """Operations that autograd knows, for second derivatives."""
    parts = plain.project(x, stacked(As, scales, x.dtype), drop).split([A.shape[0] for A in As], 1)
    bases = [F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype)) for W, b in zip(weights, biases, strict=True)]
    return tuple(y + part @ B.to(x.dtype).t() for y, part, B in zip(bases, parts, Bs, strict=True))


def _differentiable(ctx: Any, definition: Any, x: Tensor | None, mask: Tensor | None, features: int, grads: Sequence[Tensor | None]) -> Any:
    """The gradients of a definition, with a graph of their own."""
    if x is None:
        raise RuntimeError("second derivatives (create_graph=True) need the layer's input, which is not kept while lora_A is frozen.")
    fast, threshold, *_ = ctx.settings
    if mask is not None and fast:
        mask = _as_mask(x, features, (mask, threshold))
    inputs = [x, None, None, *ctx.saved_tensors[4:]]
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=True) if need]
    pairs = [(y, g) for y, g in zip(definition(x, None if mask is None else (mask, 0)), grads, strict=True) if g is not None]
    ys, gs = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, gs, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in ctx.needs_input_grad)


def _as_mask(x: Tensor, features: int, drop: plain.Drop) -> Tensor:
    """The kernels' seed as a mask of bools."""
    from lightning_lora.kernels import low_rank

    ones = x.new_ones(max(x.shape[0], features), 1)
    return low_rank.add_(x.new_zeros(x.shape[0], features), ones[: x.shape[0]], ones[:features], drop) == 0
