"""Second derivatives of the fused operations: their gradients computed again from the definition, with a graph of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops import plain
from lightning_lora.ops.low_rank import NO_INPUT
from lightning_lora.utils.torch_private import is_batched


def wants_definition(grad: Tensor) -> bool:
    """Whether a backward pass is differentiated again (create_graph=True) or vectorized (is_grads_batched=True): plain operations then."""
    return torch.is_grad_enabled() or is_batched(grad)


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
    outputs, gs = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, gs, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return tuple(next(found) if need else None for need in ctx.needs_input_grad)


def _as_mask(x: Tensor, features: int, drop: plain.Drop) -> Tensor:
    """The kernels' seed as a mask of bools."""
    from lightning_lora.ops import triton_low_rank

    ones = x.new_ones(max(x.shape[0], features), 1)
    return triton_low_rank.add_(x.new_zeros(x.shape[0], features), ones[: x.shape[0]], ones[:features], drop) == 0
