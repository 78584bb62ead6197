"""Frozen linears and their low-rank updates as one operation, for the linears that read the same input.

``lora_linears`` computes, for siblings k such as a block's q, k and v projections, ``y_k = x·W_kᵀ + b_k + s_k·drop(x)·A_kᵀ·B_kᵀ``: what
:func:`lightning_lora.ops.low_rank.lora_update_reference` says of each alone, with the A's stacked into one product, every update added into the
base product's output, and one gradient for x. For the backward pass it keeps x, once for all of them, and the rank-r product; a packed W
(:mod:`lightning_lora.ops.frozen_weight`) as it is.

A sibling may have a gain g_k (:mod:`lightning_lora.ops.output_scale`), ``y_k = g_k∘(x·W_kᵀ + …) + b_k``. It is applied in the pass that adds the
update, and its gradient is taken from the base product's output, which is then kept too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops import backends, plain
from lightning_lora.ops.frozen_weight import Stored, put_together, taken_apart
from lightning_lora.ops.low_rank import NO_INPUT
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.custom_op import call, opaque


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor | Stored],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    dropout: float = 0.0,
    gains: Sequence[Tensor | None] = (),
) -> tuple[Tensor, ...]:
    """The outputs of n adapted linears that read the same x; with dropout, the same entries of x are dropped for all.

    Args:
        x: (..., in).
        weights: n frozen weights (out_k, in), or what they are packed in.
        biases: n biases (out_k,), or None.
        As: n factors (r_k, in), of any floating dtype.
        Bs: n factors (out_k, r_k).
        scales: α/r of each.
        dropout: probability; 0 outside training.
        gains: n output gains (out_k,) or None; none at all if no sibling has one.

    Returns:
        n tensors (..., out_k), in x's dtype, or autocast's where it is on.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_linears(x.to(dtype), weights, biases, As, Bs, scales, dropout, gains)
    flat = x.reshape(-1, x.shape[-1])
    fast = backends.usable(flat)
    drop, p = _backend(fast).draw_drop(flat, dropout) if dropout else (None, 0.0)
    mask, threshold = drop or (None, 0)
    tensors, layouts = taken_apart(weights)
    settings = (fast, threshold, tuple(s / (1 - p) for s in scales), layouts)
    ys = _Linears.apply(flat, mask, settings, *biases, *As, *Bs, *(gains or [None] * len(As)), *tensors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)


class _Linears(torch.autograd.Function):
    """With t = drop(x)·Aᵀ for the stacked and scaled A, and g_k the gradient of y_k, times the gain: dt_k = g_k·B_k, dB_k = g_kᵀ·t_k,
    dA = dtᵀ·drop(x), dx = Σ g_k·W_k + drop(dt·A)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, settings: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        fast, threshold, scales, layouts = settings
        n = len(layouts)
        biases, As, Bs, gains = (list(tensors[k * n : k * n + n]) for k in range(4))
        found = call(_forward, x, mask, threshold, fast, list(scales), list(tensors[4 * n :]), layouts, biases, As, Bs, gains)
        # A frozen A (LoRA-FA) has no gradient to take from x, nor a frozen gain one from the base product.
        keep = x if any(ctx.needs_input_grad[3 + n : 3 + 2 * n]) else None
        ys, (t, A, *lows), products = found[:n], found[n : 2 * n + 2], iter(found[2 * n + 2 :])
        zs = [None if gain is None else next(products) for gain in gains]
        zs = [z if need else None for z, need in zip(zs, ctx.needs_input_grad[3 + 3 * n : 3 + 4 * n], strict=True)]
        ctx.save_for_backward(keep, mask, t, A, *lows, *zs, *tensors)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        fast, threshold, scales, layouts = ctx.settings
        x, mask, t, A, *rest = ctx.saved_tensors
        n = len(layouts)
        lows, zs, tensors = rest[:n], rest[n : 2 * n], rest[2 * n :]
        biases, As, Bs, gains = (tensors[k * n : k * n + n] for k in range(4))
        weights = tensors[4 * n :]
        needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[3 : 3 + n]
        some = next((g for g in grads if g is not None), None)
        if some is None:
            return (None,) * (3 + len(tensors))
        if autocast_dtype(some) is not None:  # in the forward's dtypes, whatever the backward pass is called under
            with torch.autocast(some.device.type, enabled=False):
                return _Linears.backward(ctx, *grads)
        if not torch.compiler.is_compiling() and wants_definition(some):
            definition = lambda drop: _definition(x, drop, scales, weights, layouts, biases, As, Bs, gains)  # noqa: E731
            return differentiable(ctx, definition, [x, None, None, *tensors], [(mask, A.shape[1])], grads)
        gs = [some.new_zeros(some.shape[0], B.shape[0]) if g is None else g for g, B in zip(grads, Bs, strict=True)]
        operands = (gs, x, t, A, mask, threshold, fast, list(scales), weights, layouts, lows, biases, gains, zs, needs_x)
        dx, *found = call(_backward, *operands)
        dBs, sums = found[:n], iter(found[n:])
        dAs = [None] * n if x is None else next(sums).split([a.shape[0] for a in As])
        dgains = [None if z is None else next(sums) for z in zs]
        dbiases = [
            g.sum(0).to(b.dtype) if g is not None and b is not None and need else None
            for g, b, need in zip(grads, biases, needs_bias, strict=True)
        ]
        # An output that nobody used has no gradient, which is not the same as a gradient of zero.
        used = [g is not None for g in grads] * 3
        pairs = zip([*dAs, *dBs, *dgains], [*As, *Bs, *gains], used, strict=True)
        factors = [d.to(p.dtype) if d is not None and needed else None for d, p, needed in pairs]
        return dx if needs_x else None, None, None, *dbiases, *factors, *[None] * len(weights)


def working_copies(As: Sequence[Tensor], Bs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The A's below one another, and each of the B's (or what else is to be copied), contiguous and in the dtype of the activations: one
    operation for all of them."""
    if all(factor.dtype == dtype for factor in (*As, *Bs)):
        return (As[0].contiguous() if len(As) == 1 else torch.cat(list(As))), [B.contiguous() for B in Bs]
    shapes = [(sum(A.shape[0] for A in As), As[0].shape[1]), *(B.shape for B in Bs)]
    A, *lows = (torch.empty(shape, dtype=dtype, device=As[0].device) for shape in shapes)
    torch._foreach_copy_([*A.split([A.shape[0] for A in As]), *lows], [*As, *Bs])
    return A, lows


def _forward(
    x: Tensor,
    mask: Tensor | None,
    threshold: int,
    fast: bool,
    scales: list[float],
    weights: list[Tensor],
    layouts: list[str],
    biases: list[Tensor | None],
    As: list[Tensor],
    Bs: list[Tensor],
    gains: list[Tensor | None],
) -> list[Tensor]:
    """The outputs; then for the backward pass t, A and the B's in x's dtype, and the base product of each with a gain."""
    backend, drop = _backend(fast), None if mask is None else (mask, threshold)
    A, lows = working_copies(As, Bs, x.dtype)
    t = scaled(backend.project(x, A, drop, scales[0]), scales, lows)
    ys, zs = [], []
    for W, bias, B, part, gain in zip(put_together(weights, layouts), biases, lows, _split(t, lows), gains, strict=True):
        z = W.linear(x, bias)  # with the bias, so that a gain of 1 leaves the base's own output
        ys.append(backend.add_(z, part, B) if gain is None else backend.gained(z, part, B, gain, bias))
        zs += [] if gain is None else [z]
    return [*ys, t, A, *lows, *zs]


def _backward(
    gs: list[Tensor],
    x: Tensor | None,
    t: Tensor,
    A: Tensor,
    mask: Tensor | None,
    threshold: int,
    fast: bool,
    scales: list[float],
    weights: list[Tensor],
    layouts: list[str],
    Bs: list[Tensor],
    biases: list[Tensor | None],
    gains: list[Tensor | None],
    zs: list[Tensor | None],
    needs_x: bool,
) -> list[Tensor]:
    """dx (empty unless needed), the dB's, with x the dA's below one another, and the gradient of each gain with z."""
    backend, drop = _backend(fast), None if mask is None else (mask, threshold)
    dBs, dgains, gs = [], [], list(gs)
    for k, (part, B, bias, gain, z) in enumerate(zip(_split(t, Bs), Bs, biases, gains, zs, strict=True)):
        if gain is not None and z is not None:
            gs[k], dB, dgain = backend.gained_backward(gs[k], z, part, B, gain, bias)
            dgains.append(dgain)
        else:
            gs[k] = gs[k] if gain is None else (gs[k] * gain).to(t.dtype)
            dB = backend.reduce(gs[k], part)
        dBs.append(dB)
    parts = [backend.project(g, B.t(), None, scale) for g, B, scale in zip(gs, Bs, scales, strict=True)]
    dt = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    dx = t.new_empty(0)
    if needs_x:
        first, *others = put_together(weights, layouts)
        dx = gs[0] @ first.dense(t.dtype)
        for g, W in zip(gs[1:], others, strict=True):
            dx.addmm_(g, W.dense(t.dtype))
        dx = backend.add_(dx, dt, A.t(), drop)
    return [dx, *dBs, *([] if x is None else [backend.reduce(dt, x, drop)]), *dgains]


def scaled(t: Tensor, scales: Sequence[float], Bs: Sequence[Tensor]) -> Tensor:
    """t, all of which has the first scale, with each sibling's own."""
    if any(scale != scales[0] for scale in scales):
        for part, scale in zip(_split(t, Bs), scales, strict=True):
            part.mul_(scale / scales[0])
    return t


def _forward_shapes(x: Tensor, *rest: Any) -> list[Tensor]:
    rows, (As, Bs, gains) = x.shape[0], rest[-3:]
    rank = sum(A.shape[0] for A in As)
    ys = [x.new_empty(rows, B.shape[0]) for B in Bs]
    zs = [x.new_empty(y.shape) for y, gain in zip(ys, gains, strict=True) if gain is not None]
    return [*ys, x.new_empty(rows, rank), x.new_empty(rank, x.shape[1]), *(x.new_empty(B.shape) for B in Bs), *zs]


def _backward_shapes(gs: Any, x: Any, t: Tensor, A: Tensor, mask: Any, threshold: int, fast: bool, *rest: Any) -> list[Tensor]:
    sums, (Bs, _, gains, zs, needs_x) = torch.float32 if fast else t.dtype, rest[-5:]
    dx = t.new_empty(*((t.shape[0], A.shape[1]) if needs_x else (0,)))
    dAs = [] if x is None else [A.new_empty(A.shape, dtype=sums)]
    dgains = [gain.new_empty(gain.shape) for gain, z in zip(gains, zs, strict=True) if z is not None]
    return [dx, *(B.new_empty(B.shape, dtype=sums) for B in Bs), *dAs, *dgains]


opaque(
    "linears_forward(Tensor x, Tensor? mask, int threshold, bool fast, float[] scales, Tensor[] weights, str[] layouts,"
    " Tensor?[] biases, Tensor[] As, Tensor[] Bs, Tensor?[] gains) -> Tensor[]",
    _forward,
    _forward_shapes,
)
opaque(
    "linears_backward(Tensor[] gs, Tensor? x, Tensor t, Tensor A, Tensor? mask, int threshold, bool fast, float[] scales,"
    " Tensor[] weights, str[] layouts, Tensor[] Bs, Tensor?[] biases, Tensor?[] gains, Tensor?[] zs, bool needs_x) -> Tensor[]",
    _backward,
    _backward_shapes,
)


def _split(t: Tensor, Bs: Sequence[Tensor]) -> Sequence[Tensor]:
    return t.split([B.shape[1] for B in Bs], 1)


def _backend(fast: bool) -> Any:
    if fast:
        from lightning_lora.ops import triton_low_rank

        return triton_low_rank
    return plain


def _definition(
    x: Tensor, drop: plain.Drop | None, scales: Any, weights: Any, layouts: Any, biases: Any, As: Any, Bs: Any, gains: Any
) -> tuple[Tensor, ...]:
    """Operations that autograd knows, for second derivatives."""
    parts = [plain.project(x, A.to(x.dtype), drop, s) for A, s in zip(As, scales, strict=True)]
    zs = [F.linear(x, W.dense(x.dtype)) for W in put_together(weights, layouts)]
    sums = [z + part @ B.to(x.dtype).t() for z, part, B in zip(zs, parts, Bs, strict=True)]
    scaled = [y if gain is None else (y * gain).to(x.dtype) for y, gain in zip(sums, gains, strict=True)]
    return tuple(y if b is None else y + b.to(x.dtype) for y, b in zip(scaled, biases, strict=True))


def wants_definition(grad: Tensor) -> bool:
    """Whether a backward pass is differentiated again (create_graph=True) or vectorized (is_grads_batched=True): plain operations then."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def differentiable(
    ctx: Any, definition: Any, inputs: Sequence[Any], masks: Sequence[tuple[Tensor | None, int]], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of a definition, with a graph of their own.

    Args:
        ctx: of the autograd function, with ``settings`` that start with ``fast`` and ``threshold``.
        definition: from a drop for each of ``masks`` to the outputs.
        inputs: the function's, as they were saved.
        masks: mask (or seed) and features of each tensor that is dropped from.
        grads: of the outputs.
    """
    x = inputs[0]
    if x is None:
        raise RuntimeError(NO_INPUT)
    fast, threshold, *_ = ctx.settings
    drops = [None if mask is None else (_as_mask(x, features, (mask, threshold)) if fast else mask, 0) for mask, features in masks]
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=True) if need]
    with torch.enable_grad():
        outputs = definition(*drops)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    ys, gs = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, gs, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return tuple(next(found) if need else None for need in ctx.needs_input_grad)


def _as_mask(x: Tensor, features: int, drop: plain.Drop) -> Tensor:
    """The kernels' seed as a mask of bools."""
    from lightning_lora.ops import triton_low_rank

    ones = x.new_ones(max(x.shape[0], features), 1)
    return triton_low_rank.add_(x.new_zeros(x.shape[0], features), ones[: x.shape[0]], ones[:features], drop) == 0
