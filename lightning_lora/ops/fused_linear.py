"""Frozen linears and their low-rank updates as one operation, for linears that read the same input.

``lora_linears`` computes ``y_k = x·W_kᵀ + b_k + s_k·drop(x)·A_kᵀ·B_kᵀ`` for linears k, such as a block's q, k and v projections. The
definition of each is :func:`lightning_lora.ops.low_rank.lora_update_reference`. Here the A's are stacked into one product, every update
is added into the base product's output, and x gets one gradient. The backward pass needs x, kept once for all, and the rank-r product. A
quantized W (:mod:`lightning_lora.ops.frozen_weight`) stays quantized.

A linear may have an output scale g_k (:mod:`lightning_lora.ops.output_scale`): ``y_k = g_k∘(x·W_kᵀ + …) + b_k``. The pass that adds the
update applies it. Its gradient needs the base product's output, which is then kept too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops import backends, plain
from lightning_lora.ops.factor_copies import keeps_copies, working_copies
from lightning_lora.ops.frozen_weight import FrozenWeight, base_products, flatten_weights, input_gradient, unflatten_weights
from lightning_lora.ops.second_derivatives import differentiable, wants_definition
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.custom_op import dispatch, register_custom_op
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private import transforms_active


class Settings(NamedTuple):
    """What the passes of an operation need besides tensors.

    Attributes:
        fast: use the Triton kernels.
        threshold: of the kernels' dropout.
        scales: α/r of each linear, divided by 1 − p with dropout.
        layouts: the frozen weights; under a compiler the strings that describe their layouts.
    """

    fast: bool
    threshold: int
    scales: tuple[float, ...]
    layouts: list[FrozenWeight] | list[str]


def one_operation_takes(x: Tensor) -> bool:
    """True if one operation may take x: not for DTensors and torch.func transforms. Without kernels a compiler fuses the definition."""
    if torch.compiler.is_compiling():
        return backends.worth_kernels(x) and not is_sharded(x)
    return not (is_sharded(x) or transforms_active())


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
    """Return the outputs of n adapted linears that read the same x. Dropout drops the same entries of x for all of them.

    Args:
        x: (..., in).
        weights: n frozen weights (out_k, in), floating-point or quantized.
        biases: n biases (out_k,), or None.
        A_list: n factors (r_k, in), of any floating dtype.
        B_list: n factors (out_k, r_k).
        scales: α/r of each.
        dropout: probability; 0 outside training.
        out_scales: n output scales (out_k,) or None each; empty if no linear has one.

    Returns:
        n tensors (..., out_k), in x's dtype, or in autocast's where it is on.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_linears(x.to(dtype), weights, biases, A_list, B_list, scales, dropout, out_scales)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    fast = backends.worth_kernels(rows)
    source, threshold = None, 0
    if dropout:
        (source, threshold), probability = _backend(fast).draw_drop(rows, dropout)
        scales = [scale / (1 - probability) for scale in scales]
    tensors, layouts = flatten_weights(weights)
    settings, out_scales = Settings(fast, threshold, tuple(scales), layouts), out_scales or [None] * len(A_list)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        outputs = _Linears.apply(rows, source, settings, *biases, *A_list, *B_list, *out_scales, *tensors)
    else:
        outputs = _forward(rows, source, threshold, fast, scales, tensors, layouts, biases, A_list, B_list, out_scales)[: len(layouts)]
    return tuple(outputs) if x.ndim == 2 else tuple([y.view(*x.shape[:-1], y.shape[-1]) for y in outputs])


class _Linears(torch.autograd.Function):
    """Let t = drop(x)·Aᵀ for the stacked, scaled A, and g_k the gradient of y_k times the output scale. Then dt_k = g_k·B_k,
    dB_k = g_kᵀ·t_k, dA = dtᵀ·drop(x), dx = Σ g_k·W_k + drop(dt·A)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor | None, settings: Settings, *tensors: Any) -> tuple[Tensor, ...]:
        fast, threshold, scales, layouts = settings
        n = len(layouts)
        biases, A_list, B_list, out_scales = [list(tensors[k * n : k * n + n]) for k in range(4)]
        results = dispatch(
            _forward, x, source, threshold, fast, list(scales), list(tensors[4 * n :]), layouts, biases, A_list, B_list, out_scales
        )
        outputs, (t, *rest) = results[:n], results[n:]
        kept = n + 1 if keeps_copies(B_list) else 0
        copies, products = rest[:kept], iter(rest[kept:])
        _, _, _, *needs = ctx.needs_input_grad
        # The gradient of A needs x, and that of a scale the base product. A frozen A (LoRA-FA) or scale has none.
        kept_x = x if any(needs[n : 2 * n]) else None
        base_outputs = [None if out_scale is None else next(products) for out_scale in out_scales]
        base_outputs = [z if need else None for z, need in zip(base_outputs, needs[3 * n : 4 * n], strict=True)]
        ctx.save_for_backward(kept_x, source, t, *base_outputs, *tensors, *copies)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        fast, threshold, scales, layouts = ctx.settings
        n = len(layouts)
        needs_x, _, _, *needs = ctx.needs_input_grad
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * (3 + len(needs))
        if autocast_dtype(given[0]) is not None:  # use the forward's dtypes, even if autocast is on in the backward pass
            with torch.autocast(given[0].device.type, enabled=False):
                return _Linears.backward(ctx, *grads)
        x, source, t, *saved = ctx.saved_tensors  # once: a checkpoint lets go of them
        base_outputs, tensors, copies = saved[:n], saved[n : n + len(needs)], saved[n + len(needs) :]
        biases, A_list, B_list, out_scales = [tensors[k * n : k * n + n] for k in range(4)]
        weights = tensors[4 * n :]
        if not torch.compiler.is_compiling() and wants_definition(given[0]):
            definition = lambda drop: _definition(x, drop, scales, layouts, biases, A_list, B_list, out_scales)  # noqa: E731
            return differentiable(ctx, definition, [x, None, None, *tensors], [(source, A_list[0].shape[1])], grads)
        full = [given[0].new_zeros(given[0].shape[0], B.shape[0]) if g is None else g for g, B in zip(grads, B_list, strict=True)]
        operands = (full, x, t, source, threshold, fast, list(scales), weights, layouts, biases, A_list, B_list, out_scales)
        dx, *results = dispatch(_backward, *operands, copies, base_outputs, needs_x)
        dB_list, sums = results[:n], iter(results[n:])
        dA_list = [None] * n if x is None else next(sums).split([a.shape[0] for a in A_list])
        d_out_scales = [None if z is None else next(sums) for z in base_outputs]
        dbiases = [g.sum(0) if g is not None and need else None for g, need in zip(grads, needs, strict=False)]
        found = [*dbiases, *dA_list, *dB_list, *d_out_scales]
        for k, (parameter, need) in enumerate(zip(tensors[: 4 * n], needs, strict=False)):
            gradient = found[k]
            # An unused output has no gradient, which differs from a gradient of zero.
            if gradient is None or not need or grads[k % n] is None:
                found[k] = None
            elif gradient.dtype != parameter.dtype:
                found[k] = gradient.to(parameter.dtype)
        return dx if needs_x else None, None, None, *found, *[None] * len(weights)


def _forward(
    x: Tensor,
    source: Tensor | None,
    threshold: int,
    fast: bool,
    scales: Sequence[float],
    weights: list[Tensor],
    layouts: list[FrozenWeight] | list[str],
    biases: Sequence[Tensor | None],
    A_list: Sequence[Tensor],
    B_list: Sequence[Tensor],
    out_scales: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return the outputs; then for the backward pass t, the factors' copies if they are kept, and the base product of each with a scale."""
    backend, drop = _backend(fast), None if source is None else plain.Drop(source, threshold)
    A, *B_casts = copies = working_copies(backend, A_list, B_list, x.dtype)
    t = scaled(backend.project(x, A, drop, scales[0]), scales, B_casts)
    outputs, base_outputs = [], []
    # With the biases, so that a scale of 1 leaves the base's output exact.
    operands = zip(
        base_products(unflatten_weights(weights, layouts), x, biases), biases, B_casts, split(t, B_casts), out_scales, strict=True
    )
    for z, bias, B, t_k, out_scale in operands:
        if out_scale is None:
            outputs.append(backend.add_(z, t_k, B))
        else:
            outputs.append(backend.scaled_sum(z, t_k, B, out_scale, bias))
            base_outputs.append(z)
    return [*outputs, t, *(copies if keeps_copies(B_list) else []), *base_outputs]


def _backward(
    grads: list[Tensor],
    x: Tensor | None,
    t: Tensor,
    source: Tensor | None,
    threshold: int,
    fast: bool,
    scales: list[float],
    weights: list[Tensor],
    layouts: list[FrozenWeight] | list[str],
    biases: list[Tensor | None],
    A_list: list[Tensor],
    B_list: list[Tensor],
    out_scales: list[Tensor | None],
    copies: list[Tensor],
    base_outputs: list[Tensor | None],
    needs_x: bool,
) -> list[Tensor]:
    """Return dx (empty unless needed), the dB's, with x the stacked dA's, and the gradient of each scale that has a z."""
    backend, drop = _backend(fast), None if source is None else plain.Drop(source, threshold)
    A, *B_casts = copies or working_copies(backend, A_list, B_list, t.dtype)
    dB_list, d_out_scales, dt_list, grads = [], [], [], list(grads)
    operands = zip(split(t, B_list), B_casts, scales, biases, out_scales, base_outputs, strict=True)
    for k, (t_k, B, scale, bias, out_scale, z) in enumerate(operands):
        if out_scale is not None and z is not None:
            grads[k], dB, d_out_scale = backend.scaled_sum_backward(grads[k], z, t_k, B, out_scale, bias)
            d_out_scales.append(d_out_scale)
        else:
            grads[k] = grads[k] if out_scale is None else (grads[k] * out_scale).to(t.dtype)
            dB = backend.reduce(grads[k], t_k)
        dB_list.append(dB)
        dt_list.append(backend.project(grads[k], B.t(), None, scale))
    dt = dt_list[0] if len(dt_list) == 1 else torch.cat(dt_list, 1)
    dx = t.new_empty(0)
    if needs_x:
        dx = backend.add_(input_gradient(unflatten_weights(weights, layouts), grads, t.dtype), dt, A.t(), drop)
    return [dx, *dB_list, *([] if x is None else [backend.reduce(dt, x, drop)]), *d_out_scales]


def scaled(t: Tensor, scales: Sequence[float], B_list: Sequence[Tensor]) -> Tensor:
    """Give each linear's columns of t its own scale, in place. All of t has the first scale before."""
    if len(set(scales)) > 1:
        for t_k, scale in zip(split(t, B_list), scales, strict=True):
            t_k.mul_(scale / scales[0])
    return t


def split(t: Tensor, B_list: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the columns of t that belong to each linear."""
    return (t,) if len(B_list) == 1 else t.split([B.shape[1] for B in B_list], 1)


def _forward_shapes(x: Tensor, *operands: Any) -> list[Tensor]:
    (A_list, B_list, out_scales), rows = operands[-3:], x.shape[0]
    rank = sum(A.shape[0] for A in A_list)
    outputs = [x.new_empty(rows, B.shape[0]) for B in B_list]
    base_outputs = [x.new_empty(y.shape) for y, out_scale in zip(outputs, out_scales, strict=True) if out_scale is not None]
    copies = [x.new_empty(shape) for shape in ((rank, x.shape[1]), *(B.shape for B in B_list))] if keeps_copies(B_list) else []
    return [*outputs, x.new_empty(rows, rank), *copies, *base_outputs]


def _backward_shapes(grads: Any, x: Any, t: Tensor, source: Any, threshold: int, fast: bool, *operands: Any) -> list[Tensor]:
    sums, (A_list, B_list, out_scales, _, base_outputs, needs_x) = torch.float32 if fast else t.dtype, operands[-6:]
    width = A_list[0].shape[1]
    dx = t.new_empty(*((t.shape[0], width) if needs_x else (0,)))
    dA_list = [] if x is None else [t.new_empty(t.shape[1], width, dtype=sums)]
    d_out_scales = [out_scale.new_empty(out_scale.shape) for out_scale, z in zip(out_scales, base_outputs, strict=True) if z is not None]
    return [dx, *(B.new_empty(B.shape, dtype=sums) for B in B_list), *dA_list, *d_out_scales]


register_custom_op(
    "linears_forward(Tensor x, Tensor? source, int threshold, bool fast, float[] scales, Tensor[] weights, str[] layouts,"
    " Tensor?[] biases, Tensor[] A_list, Tensor[] B_list, Tensor?[] out_scales) -> Tensor[]",
    _forward,
    _forward_shapes,
)
register_custom_op(
    "linears_backward(Tensor[] grads, Tensor? x, Tensor t, Tensor? source, int threshold, bool fast, float[] scales,"
    " Tensor[] weights, str[] layouts, Tensor?[] biases, Tensor[] A_list, Tensor[] B_list, Tensor?[] out_scales,"
    " Tensor[] copies, Tensor?[] base_outputs, bool needs_x) -> Tensor[]",
    _backward,
    _backward_shapes,
)


def _backend(fast: bool) -> Any:
    if fast:
        from lightning_lora.ops import triton_low_rank

        return triton_low_rank
    return plain


def _definition(
    x: Tensor, drop: plain.Drop | None, scales: Any, weights: Any, biases: Any, A_list: Any, B_list: Any, out_scales: Any
) -> tuple[Tensor, ...]:
    """Compute the outputs with operations that autograd can differentiate, for second derivatives."""
    outputs = []
    for W, bias, A, B, scale, out_scale in zip(weights, biases, A_list, B_list, scales, out_scales, strict=True):
        y = F.linear(x, W.dense(x.dtype)) + plain.project(x, A.to(x.dtype), drop, scale) @ B.to(x.dtype).t()
        y = y if out_scale is None else (y * out_scale).to(x.dtype)
        outputs.append(y if bias is None else y + bias.to(x.dtype))
    return tuple(outputs)
