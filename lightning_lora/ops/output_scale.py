"""Output scale: one number g per output channel, ``y = g∘(x·Wᵀ + update) + b``. DoRA's m/‖·‖ is one.

``LoRALayer.output_scale`` returns the scale of a layer whose variant has one. The fused operations
(:mod:`lightning_lora.ops.fused_linear`, :mod:`lightning_lora.ops.gated_mlp`) apply it inside. For every other layer
``apply_output_scale`` does, in a pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops import plain
from lightning_lora.ops.low_rank import transformed
from lightning_lora.ops.second_derivatives import wants_definition
from lightning_lora.utils.autocast import no_autocast
from lightning_lora.utils.sharding import is_sharded


def apply_output_scale(z: Tensor, out_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``g∘(z − bias) + bias`` in z's dtype.

    Args:
        z: a layer's output before the scale, bias included.
        out_scale: g, in a shape that broadcasts over z.
        bias: in the scale's shape.
    """
    if transformed() or is_sharded(z):
        return (z * out_scale if bias is None else (z - bias) * out_scale + bias).to(z.dtype)
    with no_autocast(z):
        return _OutputScale.apply(z, out_scale, bias)


class _OutputScale(torch.autograd.Function):
    """Applies the scale in one forward and two backward passes over z, the latter in one buffer: the passes are what a scale costs."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, out_scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, out_scale, bias)
        return plain.times_scale(z, out_scale, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        z, out_scale, bias = ctx.saved_tensors
        dz, d_out_scale, dbias = None, None, None
        axis = z.ndim - out_scale.ndim
        others = [dim for dim in range(z.ndim) if dim != axis]

        wide = None if bias is None else out_scale.dtype  # with a bias two sums are subtracted, and half precision would lose digits

        def summed(tensor: Tensor) -> Tensor:
            return (tensor.sum(others, dtype=wide) if others else tensor.clone()).to(out_scale.dtype).view(out_scale.shape)

        buffer = None if wants_definition(grad) else torch.empty_like(z)
        if ctx.needs_input_grad[1]:
            d_out_scale = summed(torch.mul(grad, z, out=buffer))
        if bias is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            total = summed(grad)
            d_out_scale = None if d_out_scale is None else d_out_scale - total * bias
            dbias = (total * (1 - out_scale)).to(bias.dtype) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[0]:
            dz = plain.scaled(grad, out_scale, out=buffer)
        return dz, d_out_scale, dbias
