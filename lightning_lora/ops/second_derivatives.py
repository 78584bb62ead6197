"""Second derivatives of the fused operations: compute their gradients again from the definition, with an autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops import plain
from lightning_lora.utils.torch_private import is_batched

NO_INPUT = (
    "second derivatives (create_graph=True) and vectorized Jacobians need the layer's input, which is not kept while lora_A is frozen."
)


def wants_definition(grad: Tensor) -> bool:
    """True if a backward pass must use plain operations.

    That is so if it is differentiated again (create_graph=True) or vectorized (is_grads_batched=True).
    """
    return torch.is_grad_enabled() or is_batched(grad)


def differentiable(
    ctx: Any, definition: Any, inputs: Sequence[Any], sources: Sequence[tuple[Tensor | None, int]], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a definition, with an autograd graph.

    Args:
        ctx: the context of the autograd function, with its ``settings``.
        definition: function from one drop per entry of ``sources`` to the outputs.
        inputs: the autograd function's inputs, as saved.
        sources: one ``(source, features)`` per tensor that dropout applies to: the drop's source and the tensor's features.
        grads: gradients of the outputs.

    Raises:
        RuntimeError: the input was not kept, because lora_A is frozen.
    """
    x = inputs[0]
    if x is None:
        raise RuntimeError(NO_INPUT)
    drops = [None if source is None else _drop(x, features, source, ctx.settings) for source, features in sources]
    wanted = [tensor for tensor, need in zip(inputs, ctx.needs_input_grad, strict=True) if need]
    with torch.enable_grad():
        outputs = definition(*drops)
    pairs = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if grad is not None]
    used, used_grads = zip(*pairs, strict=True)
    gradients = iter(torch.autograd.grad(used, wanted, used_grads, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return tuple(next(gradients) if need else None for need in ctx.needs_input_grad)


def _drop(x: Tensor, features: int, source: Tensor, settings: Any) -> plain.Drop:
    """Return a drop of the forward pass for plain operations. The kernels' seed becomes a boolean mask."""
    if not settings.fast:
        return plain.Drop(source)
    from lightning_lora.ops import triton_low_rank

    ones, drop = x.new_ones(max(x.shape[0], features), 1), plain.Drop(source, settings.threshold)
    return plain.Drop(triton_low_rank.add_(x.new_zeros(x.shape[0], features), ones[: x.shape[0]], ones[:features], drop) == 0)
