"""Frozen linears and their low-rank updates as one operation, for the linears that read the same input.

``lora_linears`` computes, for siblings k such as a block's q, k and v projections, ``y_k = x·W_kᵀ + b_k + s_k·drop(x)·A_kᵀ·B_kᵀ``: what
:func:`lightning_lora.ops.low_rank.lora_update_reference` says of each alone, with the A's stacked into one product, every update added
into the base product's output, and one gradient for x. For the backward pass it keeps x, once for all of them, and the rank-r product; a
packed W (:mod:`lightning_lora.ops.frozen_weight`) as it is.

A sibling may have a scale g_k (:mod:`lightning_lora.ops.output_scale`), ``y_k = g_k∘(x·W_kᵀ + …) + b_k``. It is applied in the pass that
adds the update, and its gradient is taken from the base product's output, which is then kept too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops import backends, plain
from lightning_lora.ops.frozen_weight import FrozenWeight, flatten_weights, unflatten_weights
from lightning_lora.ops.second_derivatives import differentiable, wants_definition
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.custom_op import dispatch, register_custom_op


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor | FrozenWeight],
    biases: Sequence[Tensor | None],
    A_list: Sequence[Tensor],
    B_list: Sequence[Tensor],
    scales: Sequence[float],
    dropout: float = 0.0,
    out_scales: Sequence[Tensor | None] = (),
) -> tuple[Tensor, ...]:
    """The outputs of n adapted linears that read the same x; with dropout, the same entries of x are dropped for all.

    Args:
        x: (..., in).
        weights: n frozen weights (out_k, in), or what they are packed in.
        biases: n biases (out_k,), or None.
        A_list: n factors (r_k, in), of any floating dtype.
        B_list: n factors (out_k, r_k).
        scales: α/r of each.
        dropout: probability; 0 outside training.
        out_scales: n output scales (out_k,) or None; none at all if no sibling has one.

    Returns:
        n tensors (..., out_k), in x's dtype, or autocast's where it is on.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_linears(x.to(dtype), weights, biases, A_list, B_list, scales, dropout, out_scales)
    flat = x.reshape(-1, x.shape[-1])
    fast = backends.usable(flat)
    drop, p = _backend(fast).draw_drop(flat, dropout) if dropout else (None, 0.0)
    mask, threshold = drop or (None, 0)
    tensors, layouts = flatten_weights(weights)
    settings = (fast, threshold, tuple(s / (1 - p) for s in scales), layouts)
    outputs = _Linears.apply(flat, mask, settings, *biases, *A_list, *B_list, *(out_scales or [None] * len(A_list)), *tensors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


class _Linears(torch.autograd.Function):
    """With t = drop(x)·Aᵀ for the stacked and scaled A, and g_k the gradient of y_k, times the scale: dt_k = g_k·B_k, dB_k = g_kᵀ·t_k,
    dA = dtᵀ·drop(x), dx = Σ g_k·W_k + drop(dt·A)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, settings: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        fast, threshold, scales, layouts = settings
        n = len(layouts)
        biases, A_list, B_list, out_scales = (list(tensors[k * n : k * n + n]) for k in range(4))
        found = dispatch(
            _forward, x, mask, threshold, fast, list(scales), list(tensors[4 * n :]), layouts, biases, A_list, B_list, out_scales
        )
        # A frozen A (LoRA-FA) has no gradient to take from x, nor a frozen scale one from the base product.
        keep = x if any(ctx.needs_input_grad[3 + n : 3 + 2 * n]) else None
        outputs, (t, A, *B_casts), products = found[:n], found[n : 2 * n + 2], iter(found[2 * n + 2 :])
        base_outputs = [None if out_scale is None else next(products) for out_scale in out_scales]
        base_outputs = [z if need else None for z, need in zip(base_outputs, ctx.needs_input_grad[3 + 3 * n : 3 + 4 * n], strict=True)]
        ctx.save_for_backward(keep, mask, t, A, *B_casts, *base_outputs, *tensors)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        fast, threshold, scales, layouts = ctx.settings
        x, mask, t, A, *rest = ctx.saved_tensors
        n = len(layouts)
        B_casts, base_outputs, tensors = rest[:n], rest[n : 2 * n], rest[2 * n :]
        biases, A_list, B_list, out_scales = (tensors[k * n : k * n + n] for k in range(4))
        weights = tensors[4 * n :]
        needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[3 : 3 + n]
        some = next((g for g in grads if g is not None), None)
        if some is None:
            return (None,) * (3 + len(tensors))
        if autocast_dtype(some) is not None:  # in the forward's dtypes, whatever the backward pass is called under
            with torch.autocast(some.device.type, enabled=False):
                return _Linears.backward(ctx, *grads)
        if not torch.compiler.is_compiling() and wants_definition(some):
            definition = lambda drop: _definition(x, drop, scales, weights, layouts, biases, A_list, B_list, out_scales)  # noqa: E731
            return differentiable(ctx, definition, [x, None, None, *tensors], [(mask, A.shape[1])], grads)
        gs = [some.new_zeros(some.shape[0], B.shape[0]) if g is None else g for g, B in zip(grads, B_list, strict=True)]
        operands = (gs, x, t, A, mask, threshold, fast, list(scales), weights, layouts, B_casts, biases, out_scales, base_outputs, needs_x)
        dx, *found = dispatch(_backward, *operands)
        dB_list, sums = found[:n], iter(found[n:])
        dA_list = [None] * n if x is None else next(sums).split([a.shape[0] for a in A_list])
        d_out_scales = [None if z is None else next(sums) for z in base_outputs]
        dbiases = [
            g.sum(0).to(b.dtype) if g is not None and b is not None and need else None
            for g, b, need in zip(grads, biases, needs_bias, strict=True)
        ]
        # An output that nobody used has no gradient, which is not the same as a gradient of zero.
        used = [g is not None for g in grads] * 3
        pairs = zip([*dA_list, *dB_list, *d_out_scales], [*A_list, *B_list, *out_scales], used, strict=True)
        factors = [d.to(p.dtype) if d is not None and needed else None for d, p, needed in pairs]
        return dx if needs_x else None, None, None, *dbiases, *factors, *[None] * len(weights)


def working_copies(A_list: Sequence[Tensor], B_list: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The A's below one another, and each of the B's (or what else is to be copied), contiguous and in the dtype of the activations: one
    operation for all of them."""
    if all(factor.dtype == dtype for factor in (*A_list, *B_list)):
        return (A_list[0].contiguous() if len(A_list) == 1 else torch.cat(list(A_list))), [B.contiguous() for B in B_list]
    shapes = [(sum(A.shape[0] for A in A_list), A_list[0].shape[1]), *(B.shape for B in B_list)]
    A, *B_casts = (torch.empty(shape, dtype=dtype, device=A_list[0].device) for shape in shapes)
    torch._foreach_copy_([*A.split([A.shape[0] for A in A_list]), *B_casts], [*A_list, *B_list])
    return A, B_casts


def _forward(
    x: Tensor,
    mask: Tensor | None,
    threshold: int,
    fast: bool,
    scales: list[float],
    weights: list[Tensor],
    layouts: list[str],
    biases: list[Tensor | None],
    A_list: list[Tensor],
    B_list: list[Tensor],
    out_scales: list[Tensor | None],
) -> list[Tensor]:
    """The outputs; then for the backward pass t, A and the B's in x's dtype, and the base product of each with a scale."""
    backend, drop = _backend(fast), None if mask is None else (mask, threshold)
    A, B_casts = working_copies(A_list, B_list, x.dtype)
    t = scaled(backend.project(x, A, drop, scales[0]), scales, B_casts)
    outputs, base_outputs = [], []
    for W, bias, B, part, out_scale in zip(
        unflatten_weights(weights, layouts), biases, B_casts, _split(t, B_casts), out_scales, strict=True
    ):
        z = W.linear(x, bias)  # with the bias, so that a scale of 1 leaves the base's own output
        outputs.append(backend.add_(z, part, B) if out_scale is None else backend.scaled_sum(z, part, B, out_scale, bias))
        base_outputs += [] if out_scale is None else [z]
    return [*outputs, t, A, *B_casts, *base_outputs]


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
    B_list: list[Tensor],
    biases: list[Tensor | None],
    out_scales: list[Tensor | None],
    base_outputs: list[Tensor | None],
    needs_x: bool,
) -> list[Tensor]:
    """dx (empty unless needed), the dB's, with x the dA's below one another, and the gradient of each scale with z."""
    backend, drop = _backend(fast), None if mask is None else (mask, threshold)
    dB_list, d_out_scales, gs = [], [], list(gs)
    for k, (part, B, bias, out_scale, z) in enumerate(zip(_split(t, B_list), B_list, biases, out_scales, base_outputs, strict=True)):
        if out_scale is not None and z is not None:
            gs[k], dB, d_out_scale = backend.scaled_sum_backward(gs[k], z, part, B, out_scale, bias)
            d_out_scales.append(d_out_scale)
        else:
            gs[k] = gs[k] if out_scale is None else (gs[k] * out_scale).to(t.dtype)
            dB = backend.reduce(gs[k], part)
        dB_list.append(dB)
    parts = [backend.project(g, B.t(), None, scale) for g, B, scale in zip(gs, B_list, scales, strict=True)]
    dt = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    dx = t.new_empty(0)
    if needs_x:
        first, *others = unflatten_weights(weights, layouts)
        dx = gs[0] @ first.dense(t.dtype)
        for g, W in zip(gs[1:], others, strict=True):
            dx.addmm_(g, W.dense(t.dtype))
        dx = backend.add_(dx, dt, A.t(), drop)
    return [dx, *dB_list, *([] if x is None else [backend.reduce(dt, x, drop)]), *d_out_scales]


def scaled(t: Tensor, scales: Sequence[float], B_list: Sequence[Tensor]) -> Tensor:
    """t, all of which has the first scale, with each sibling's own."""
    if any(scale != scales[0] for scale in scales):
        for part, scale in zip(_split(t, B_list), scales, strict=True):
            part.mul_(scale / scales[0])
    return t


def _forward_shapes(x: Tensor, *rest: Any) -> list[Tensor]:
    rows, (A_list, B_list, out_scales) = x.shape[0], rest[-3:]
    rank = sum(A.shape[0] for A in A_list)
    outputs = [x.new_empty(rows, B.shape[0]) for B in B_list]
    base_outputs = [x.new_empty(y.shape) for y, out_scale in zip(outputs, out_scales, strict=True) if out_scale is not None]
    return [*outputs, x.new_empty(rows, rank), x.new_empty(rank, x.shape[1]), *(x.new_empty(B.shape) for B in B_list), *base_outputs]


def _backward_shapes(gs: Any, x: Any, t: Tensor, A: Tensor, mask: Any, threshold: int, fast: bool, *rest: Any) -> list[Tensor]:
    sums, (B_list, _, out_scales, base_outputs, needs_x) = torch.float32 if fast else t.dtype, rest[-5:]
    dx = t.new_empty(*((t.shape[0], A.shape[1]) if needs_x else (0,)))
    dA_list = [] if x is None else [A.new_empty(A.shape, dtype=sums)]
    d_out_scales = [out_scale.new_empty(out_scale.shape) for out_scale, z in zip(out_scales, base_outputs, strict=True) if z is not None]
    return [dx, *(B.new_empty(B.shape, dtype=sums) for B in B_list), *dA_list, *d_out_scales]


register_custom_op(
    "linears_forward(Tensor x, Tensor? mask, int threshold, bool fast, float[] scales, Tensor[] weights, str[] layouts,"
    " Tensor?[] biases, Tensor[] A_list, Tensor[] B_list, Tensor?[] out_scales) -> Tensor[]",
    _forward,
    _forward_shapes,
)
register_custom_op(
    "linears_backward(Tensor[] gs, Tensor? x, Tensor t, Tensor A, Tensor? mask, int threshold, bool fast, float[] scales,"
    " Tensor[] weights, str[] layouts, Tensor[] B_list, Tensor?[] biases, Tensor?[] out_scales,"
    " Tensor?[] base_outputs, bool needs_x) -> Tensor[]",
    _backward,
    _backward_shapes,
)


def _split(t: Tensor, B_list: Sequence[Tensor]) -> Sequence[Tensor]:
    return t.split([B.shape[1] for B in B_list], 1)


def _backend(fast: bool) -> Any:
    if fast:
        from lightning_lora.ops import triton_low_rank

        return triton_low_rank
    return plain


def _definition(
    x: Tensor, drop: plain.Drop | None, scales: Any, weights: Any, layouts: Any, biases: Any, A_list: Any, B_list: Any, out_scales: Any
) -> tuple[Tensor, ...]:
    """Operations that autograd knows, for second derivatives."""
    parts = [plain.project(x, A.to(x.dtype), drop, s) for A, s in zip(A_list, scales, strict=True)]
    base_outputs = [F.linear(x, W.dense(x.dtype)) for W in unflatten_weights(weights, layouts)]
    sums = [z + part @ B.to(x.dtype).t() for z, part, B in zip(base_outputs, parts, B_list, strict=True)]
    scaled = [y if out_scale is None else (y * out_scale).to(x.dtype) for y, out_scale in zip(sums, out_scales, strict=True)]
    return tuple(y if b is None else y + b.to(x.dtype) for y, b in zip(scaled, biases, strict=True))
