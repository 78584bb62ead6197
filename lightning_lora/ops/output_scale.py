"""An output gain: one number an output, by which the sum of base product and update is multiplied before the bias is added.

A layer whose variant has one says so by ``LoRALayer.output_gain``. What computes base and update as one operation applies it in there
(:mod:`lightning_lora.ops.fused_linear`, :mod:`lightning_lora.ops.gated_mlp`); ``rescaled`` is for every other layer, a pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops import plain
from lightning_lora.ops.fused_linear import wants_definition
from lightning_lora.ops.low_rank import transformed
from lightning_lora.utils.autocast import no_autocast
from lightning_lora.utils.sharding import is_sharded


def rescaled(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """``gain∘(z − bias) + bias`` in z's dtype.

    Args:
        z: a layer's output before the gain, bias included.
        gain: broadcasts over z.
        bias: in the gain's shape.
    """
    if transformed() or is_sharded(z):
        return (z * gain if bias is None else (z - bias) * gain + bias).to(z.dtype)
    with no_autocast(z):
        return _Rescale.apply(z, gain, bias)


class _Rescale(torch.autograd.Function):
    """The passes over z are what a gain costs, so there is one forward and two, in one buffer, backward."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, gain, bias)
        return plain.times_gain(z, gain, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        z, gain, bias = ctx.saved_tensors
        h, dz, dgain, dbias = (gain - 1).to(z.dtype), None, None, None
        axis = z.ndim - gain.ndim
        others = [dim for dim in range(z.ndim) if dim != axis]

        wide = None if bias is None else gain.dtype  # with a bias two sums are subtracted, and half precision would show

        def summed(tensor: Tensor) -> Tensor:
            return (tensor.sum(others, dtype=wide) if others else tensor.clone()).to(gain.dtype).view(gain.shape)

        buffer = None if wants_definition(grad) else torch.empty_like(z)
        if ctx.needs_input_grad[1]:
            dgain = summed(torch.mul(grad, z, out=buffer))
        if bias is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            total = summed(grad)
            dgain = None if dgain is None else dgain - total * bias
            dbias = (total * (1 - gain)).to(bias.dtype) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[0]:
            dz = torch.addcmul(grad, grad, h, out=buffer)
        return dz, dgain, dbias
