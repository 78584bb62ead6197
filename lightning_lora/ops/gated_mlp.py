"""A gated MLP, ``down(silu(gate(x))·up(x))``, and the low-rank updates of its three projections as one operation on a GPU.

The intermediate activation is the biggest tensor of a block, so every pass over it counts. Here the rank-r work on it is part of the two
elementwise passes that any implementation makes, as far as the rank allows (:mod:`lightning_lora.ops.triton_gated_mlp`). The backward
pass needs x, the base products of gate and up, and the rank-r products. With output scales (:mod:`lightning_lora.ops.output_scale`) it
needs the base product of down too.

Under a compiler the forward pass is two operators, before and after h, the input of down. So a compiled block that computes its activations
again in the backward pass leaves out the second one, whose results nothing there needs: a third of the MLP's products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops import plain
from lightning_lora.ops.factor_copies import keeps_copies, working_copies
from lightning_lora.ops.frozen_weight import FrozenWeight, base_products, flatten_weights, input_gradient, unflatten_weights
from lightning_lora.ops.fused_linear import Settings, scaled
from lightning_lora.ops.second_derivatives import differentiable, wants_definition
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.custom_op import dispatch, register_custom_op


def lora_gated_mlp(
    x: Tensor,
    weights: Sequence[Tensor | FrozenWeight],
    A_list: Sequence[Tensor],
    B_list: Sequence[Tensor],
    scales: Sequence[float],
    dropout: float = 0.0,
    out_scales: Sequence[Tensor] = (),
) -> Tensor:
    """Return ``down(silu(gate(x))·up(x))`` with adapted projections. With dropout, gate and up drop the same entries of x.

    Args:
        x: (..., in), half precision; :func:`lightning_lora.ops.backends.worth_kernels` must hold for it.
        weights: frozen weights of gate (wide, in), up (wide, in) and down (out, wide), floating-point or quantized.
        A_list: three factors (r_k, in), for down (r_k, wide).
        B_list: three factors (wide, r_k), for down (out, r_k).
        scales: α/r of each.
        dropout: probability; 0 outside training.
        out_scales: three output scales (wide,), for down (out,); or empty.

    Returns:
        (..., out), in x's dtype, or in autocast's where it is on.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return lora_gated_mlp(x.to(dtype), weights, A_list, B_list, scales, dropout, out_scales)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    source = source_down = None
    threshold = 0
    if dropout:
        from lightning_lora.ops import triton_low_rank

        (source, threshold), probability = triton_low_rank.draw_drop(rows, dropout)
        (source_down, _), _ = triton_low_rank.draw_drop(rows, dropout)
        scales = [scale / (1 - probability) for scale in scales]
    tensors, layouts = flatten_weights(weights)
    settings = Settings(True, threshold, tuple(scales), layouts)
    y = _GatedMLP.apply(rows, source, source_down, settings, *A_list, *B_list, *(out_scales or (None, None, None)), *tensors)
    return y.view(*x.shape[:-1], B_list[2].shape[0])


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Any, source_down: Any, settings: Settings, *tensors: Any) -> Tensor:
        _, threshold, scales, layouts = settings
        A_list, B_list, out_scales, weights = list(tensors[:3]), list(tensors[3:6]), _given(tensors[6:9]), list(tensors[9:])
        first = dispatch(_inner, x, source, source_down, threshold, list(scales), weights, layouts, A_list, B_list, out_scales)
        h, g, u, t, t_down, *copies = first
        y, *z_down = dispatch(_outer, h, t_down, weights, layouts, copies[3] if copies else B_list[2], out_scales)
        ctx.save_for_backward(x, source, source_down, g, u, t, t_down, z_down[0] if z_down else None, *tensors, *copies)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        if autocast_dtype(grad) is not None:  # use the forward's dtypes, even if autocast is on in the backward pass
            with torch.autocast(grad.device.type, enabled=False):
                return _GatedMLP.backward(ctx, *grads)
        _, threshold, scales, layouts = ctx.settings
        x, source, source_down, g, u, t, t_down, z_down, *saved = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 4
        tensors, copies = saved[:count], saved[count:]
        A_list, B_list, out_scales, weights = tensors[:3], tensors[3:6], _given(tensors[6:9]), tensors[9:]
        if not torch.compiler.is_compiling() and wants_definition(grad):
            inputs = [x, None, None, None, *tensors]
            sources = [(source, A_list[0].shape[1]), (source_down, A_list[2].shape[1])]
            definition = lambda drop, down: (_definition(x, drop, down, scales, layouts, A_list, B_list, out_scales),)  # noqa: E731
            return differentiable(ctx, definition, inputs, sources, grads)
        needs_x = ctx.needs_input_grad[0]
        kept = (x, g, u, t, t_down, z_down, source, source_down)
        dx, dA, dA_down, *dB_and_scales = dispatch(
            _backward, grad, *kept, threshold, list(scales), weights, layouts, A_list, B_list, out_scales, copies, needs_x
        )
        gradients = [*dA.split([a.shape[0] for a in A_list[:2]]), dA_down, *dB_and_scales]
        factors = [d.to(p.dtype) for d, p in zip(gradients, [*A_list, *B_list, *out_scales], strict=True)]
        return (dx if needs_x else None), None, None, None, *factors, *[None] * (len(tensors) - len(factors))


def _inner(
    x: Tensor,
    source: Any,
    source_down: Any,
    threshold: int,
    scales: list[float],
    weights: list[Tensor],
    layouts: list[FrozenWeight] | list[str],
    A_list: list[Tensor],
    B_list: list[Tensor],
    out_scales: list[Tensor],
) -> list[Tensor]:
    """Return h; then, for the backward pass, the base products of gate and up, the rank-r products, and the factors' copies if they are
    kept.
    """
    from lightning_lora.ops import triton_gated_mlp, triton_low_rank

    drop, drop_down = _drop(source, threshold), _drop(source_down, threshold)
    A, *B_casts, A_down = copies = _copies(A_list, B_list, x.dtype)
    t = scaled(triton_low_rank.project(x, A, drop, scales[0]), scales[:2], B_casts[:2])
    gate, up, _ = unflatten_weights(weights, layouts)
    g, u = base_products([gate, up], x, [None, None])
    h, t_down = triton_gated_mlp.forward(g, u, t, B_casts[0], B_casts[1], A_down, drop_down, scales[2], out_scales[:2])
    return [h, g, u, t, t_down, *(copies if keeps_copies(B_list) else [])]


def _outer(
    h: Tensor, t_down: Tensor, weights: list[Tensor], layouts: list[FrozenWeight] | list[str], B_down: Tensor, out_scales: list[Tensor]
) -> list[Tensor]:
    """Return the output. With output scales, the base product of down too, for the backward pass."""
    from lightning_lora.ops import triton_low_rank

    *_, down = unflatten_weights(weights, layouts)
    z, B = down.linear(h), B_down.to(h.dtype).contiguous()
    if out_scales:
        return [triton_low_rank.scaled_sum(z, t_down, B, out_scales[2], None), z]
    return [triton_low_rank.add_(z, t_down, B)]


def _backward(
    dy: Tensor,
    x: Tensor,
    g: Tensor,
    u: Tensor,
    t: Tensor,
    t_down: Tensor,
    z_down: Tensor | None,
    source: Any,
    source_down: Any,
    threshold: int,
    scales: list[float],
    weights: list[Tensor],
    layouts: list[FrozenWeight] | list[str],
    A_list: list[Tensor],
    B_list: list[Tensor],
    out_scales: list[Tensor],
    copies: list[Tensor],
    needs_x: bool,
) -> list[Tensor]:
    """Return dx (empty unless needed), dA of gate and up stacked, dA of down, and the three dB's.

    With output scales their gradients follow.
    """
    from lightning_lora.ops import triton_gated_mlp, triton_low_rank

    drop, drop_down = _drop(source, threshold), _drop(source_down, threshold)
    A, *B_casts, A_down = copies or _copies(A_list, B_list, x.dtype)
    gate, up, down = unflatten_weights(weights, layouts)
    d_scale_down: list[Tensor] = []
    if z_down is None:
        dB_down = triton_low_rank.reduce(dy, t_down)
    else:
        dy, dB_down, *d_scale_down = triton_low_rank.scaled_sum_backward(dy, z_down, t_down, B_casts[2], out_scales[2], None)
    dt_down = triton_low_rank.project(dy, B_casts[2].t(), None, scales[2])
    dh = input_gradient([down], [dy], x.dtype)
    sums = triton_gated_mlp.backward(dh, g, u, t, B_casts[0], B_casts[1], A_down, dt_down, drop_down, scales[0], out_scales[:2])
    dg, du, dt, dB_gate, dB_up, dA_down, *d_out_scales = sums
    dt = scaled(dt, scales[:2], B_casts[:2])
    dx = x.new_empty(0)
    if needs_x:
        dx = triton_low_rank.add_(input_gradient([gate, up], [dg, du], x.dtype), dt, A.t(), drop)
    factors = [triton_low_rank.reduce(dt, x, drop), dA_down.contiguous(), dB_gate.contiguous(), dB_up.contiguous(), dB_down]
    return [dx, *factors, *d_out_scales, *d_scale_down]


def _inner_shapes(
    x: Tensor,
    source: Any,
    source_down: Any,
    threshold: int,
    scales: Any,
    weights: Any,
    layouts: Any,
    A_list: Any,
    B_list: Any,
    out_scales: Any,
) -> list[Tensor]:
    rank = A_list[0].shape[0] + A_list[1].shape[0]
    wide = B_list[0].shape[0]
    copies = ((rank, x.shape[1]), *(B.shape for B in B_list), A_list[2].shape) if keeps_copies(B_list) else ()
    products = [x.new_empty(x.shape[0], width) for width in (wide, wide, wide, rank, A_list[2].shape[0])]
    return [*products, *(x.new_empty(shape) for shape in copies)]


def _outer_shapes(h: Tensor, t_down: Tensor, weights: Any, layouts: Any, B_down: Tensor, out_scales: Any) -> list[Tensor]:
    return [h.new_empty(h.shape[0], B_down.shape[0]) for _ in range(2 if out_scales else 1)]


def _backward_shapes(dy: Tensor, x: Tensor, *operands: Any) -> list[Tensor]:
    A_list, B_list, out_scales, _, needs_x = operands[-5:]
    dx = x.new_empty(*(x.shape if needs_x else (0,)))
    stacked = (sum(A.shape[0] for A in A_list[:2]), x.shape[1])
    shapes = (stacked, *(like.shape for like in (A_list[2], *B_list, *out_scales)))
    return [dx, *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)]


def _copies(A_list: list[Tensor], B_list: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the stacked A's of gate and up, the three B's, and the A of down."""
    from lightning_lora.ops import triton_low_rank

    return working_copies(triton_low_rank, A_list[:2], [*B_list, A_list[2]], dtype)


register_custom_op(
    "gated_mlp_inner(Tensor x, Tensor? source, Tensor? source_down, int threshold, float[] scales, Tensor[] weights, str[] layouts,"
    " Tensor[] A_list, Tensor[] B_list, Tensor[] out_scales) -> Tensor[]",
    _inner,
    _inner_shapes,
)
register_custom_op(
    "gated_mlp_outer(Tensor h, Tensor t_down, Tensor[] weights, str[] layouts, Tensor B_down, Tensor[] out_scales) -> Tensor[]",
    _outer,
    _outer_shapes,
)
register_custom_op(
    "gated_mlp_backward(Tensor dy, Tensor x, Tensor g, Tensor u, Tensor t, Tensor t_down, Tensor? z_down, Tensor? source,"
    " Tensor? source_down, int threshold, float[] scales, Tensor[] weights, str[] layouts, Tensor[] A_list, Tensor[] B_list,"
    " Tensor[] out_scales, Tensor[] copies, bool needs_x) -> Tensor[]",
    _backward,
    _backward_shapes,
)


def _drop(source: Tensor | None, threshold: int) -> plain.Drop | None:
    return None if source is None else plain.Drop(source, threshold)


def _given(out_scales: Sequence[Tensor | None]) -> list[Tensor]:
    return [out_scale for out_scale in out_scales if out_scale is not None]


def _definition(x: Tensor, drop: Any, drop_down: Any, scales: Any, weights: Any, A_list: Any, B_list: Any, out_scales: Any) -> Tensor:
    """Compute the output with operations that autograd can differentiate, for second derivatives."""
    Ws = [W.dense(x.dtype) for W in weights]

    def project(z: Tensor, k: int, drop: Any) -> Tensor:
        y = F.linear(z, Ws[k]) + plain.project(z, A_list[k].to(z.dtype), drop, scales[k]) @ B_list[k].to(z.dtype).t()
        return (y * out_scales[k]).to(y.dtype) if out_scales else y

    return project(F.silu(project(x, 0, drop)) * project(x, 1, drop), 2, drop_down)
