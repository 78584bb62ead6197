"""``x·Wᵀ`` with a quantized weight alone, for the forward of a layer of our own: nothing dense is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.frozen_weight import FrozenWeight, flatten_weights, input_gradient, unflatten_weights
from lightning_lora.ops.second_derivatives import wants_definition
from lightning_lora.utils.autocast import autocast_dtype, no_autocast
from lightning_lora.utils.custom_op import dispatch, register_custom_op
from lightning_lora.utils.torch_private import transforms_active


def frozen_linear(x: Tensor, weight: FrozenWeight, out_features: int) -> Tensor:
    """Return ``x·Wᵀ`` with a gradient for x.

    Args:
        x: (..., in), of any floating dtype.
        weight: (out, in).
        out_features: out.

    Returns:
        (..., out), in x's dtype, or in autocast's where it is on.
    """
    x = x.to(autocast_dtype(x) or x.dtype)
    with no_autocast(x):
        if not torch.compiler.is_compiling() and transforms_active():
            return F.linear(x, weight.dense(x.dtype))
        rows, (tensors, layouts) = x.reshape(-1, x.shape[-1]), flatten_weights([weight])
        if rows.requires_grad and torch.is_grad_enabled():
            y = _FrozenLinear.apply(rows, layouts, out_features, *tensors)
        else:  # Dynamo traces an autograd function only where it is needed
            y = dispatch(_product, rows, tensors, layouts, out_features)[0]
        return y.view(*x.shape[:-1], out_features)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layouts: Any, out_features: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.layouts, ctx.width = layouts, x.shape[1]
        return dispatch(_product, x, list(tensors), layouts, out_features)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), tensors = grads, list(ctx.saved_tensors)
        with no_autocast(grad):
            if not torch.compiler.is_compiling() and wants_definition(grad):
                (weight,) = unflatten_weights(tensors, ctx.layouts)
                dx = grad @ weight.dense(grad.dtype)
            else:
                dx = dispatch(_gradient, grad, tensors, ctx.layouts, ctx.width)[0]
        return dx, None, None, *[None] * len(tensors)


def _product(x: Tensor, tensors: list[Tensor], layouts: Sequence[Any], out_features: int) -> list[Tensor]:
    (weight,) = unflatten_weights(tensors, layouts)
    return [weight.linear(x)]


def _gradient(grad: Tensor, tensors: list[Tensor], layouts: Sequence[Any], in_features: int) -> list[Tensor]:
    return [input_gradient(unflatten_weights(tensors, layouts), [grad], grad.dtype)]


def _shapes(rows: Tensor, tensors: Any, layouts: Any, features: int) -> list[Tensor]:
    return [rows.new_empty(rows.shape[0], features)]


_OPERANDS = "Tensor rows, Tensor[] weights, str[] layouts, int features"
register_custom_op(f"frozen_product({_OPERANDS}) -> Tensor[]", _product, _shapes)
register_custom_op(f"frozen_gradient({_OPERANDS}) -> Tensor[]", _gradient, _shapes)
