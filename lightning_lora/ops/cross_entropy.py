"""Cross entropy through a frozen output layer, a block of rows at a time: the logits never exist all at once.

With 128k words the logits of 8192 tokens take 2 GiB in bf16, and several times that as fp32 and as gradients. A frozen layer wants no
gradient of its own, so the forward pass can go the whole way to the gradient of the hidden states, block by block: two products, as
in the plain way, and one block's logits. torch 2.13 has the same in ``F.linear_cross_entropy``, releases before it have not; Liger's
needs a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private import may_vary

IGNORE = -100  # as in torch's cross entropy


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, chunk: int = 2048, compiled: bool = False
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)``, with no more than ``chunk`` rows of logits at a time.

    If the weight or the bias trains, or is sharded, it is computed just so.

    Args:
        hidden: (N, d); under autocast in any floating dtype.
        weight: (V, d), frozen.
        labels: (N,), class indices; rows with -100 do not count.
        bias: (V,), frozen.
        chunk: rows of logits at a time.
        compiled: compile what is elementwise in it; on a GPU half the passes over the logits.

    Returns:
        The mean over the rows that count, in fp32 (float64 for float64).

    Raises:
        ValueError: ``chunk`` is no positive number.
        RuntimeError: in the backward pass, if second derivatives are asked for.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a positive number of rows.")
    head = [tensor for tensor in (weight, bias) if tensor is not None]
    wants_grad = torch.is_grad_enabled()
    if any(is_sharded(tensor) or (tensor.requires_grad and wants_grad) for tensor in head):
        return F.cross_entropy(_wide(F.linear(hidden, weight, bias)), labels, ignore_index=IGNORE)
    kind, dtype = hidden.device.type, autocast_dtype(hidden)
    if dtype is not None:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, chunk, compiled, wants_grad and hidden.requires_grad)


def unchunkable(head: Any) -> str | None:
    """Why the loss through this output layer cannot be taken in blocks; None if it can."""
    if type(head) is not nn.Linear:
        return f"its output layer is a {type(head).__name__}, not a plain nn.Linear"
    if "forward" in head.__dict__:
        return "its output layer has a forward of its own set on the instance"
    weight = head._parameters.get("weight")  # FSDP1 leaves a flat piece of it here, or nothing
    if weight is None or is_sharded(weight) or weight.shape != (head.out_features, head.in_features):
        return "its output layer is sharded"
    if any(p.requires_grad for p in head.parameters()):
        return "its output layer trains"
    return None


@contextmanager
def bypassed(head: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, the output layer hands on its input; the list receives it at each call.

    The model's own forward stays in charge of everything before, so this fits any model whose last step is its output layer. What
    comes out of the model is the same object, if nothing is done to the logits (Gemma caps them, Cohere and Granite scale them).
    """
    inputs: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        inputs.append(hidden)
        return hidden

    head.__dict__["forward"] = forward
    try:
        yield inputs
    finally:
        del head.__dict__["forward"]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Keeps the gradient of the hidden states, unscaled, so that it neither under- nor overflows in half precision."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, compiled: bool, wants_grad: bool
    ) -> Tensor:
        grad = torch.empty_like(hidden) if wants_grad else None
        step = _compiled() if compiled else _loss_and_gradient
        losses = []
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits, answers = F.linear(hidden[rows], weight, bias), labels[rows]  # (n, V), (n,)
            if compiled:  # the last block is shorter, and the number of answers moves from batch to batch
                may_vary(logits, 0)
                may_vary(answers, 0)
            loss, dlogits = step(logits, answers)
            losses.append(loss)
            if grad is not None:
                torch.mm(dlogits, weight, out=grad[rows])
            del logits, dlogits
        counts = labels != IGNORE
        count = counts.sum()
        if grad is not None:
            grad.masked_fill_(~counts[:, None], 0)
        ctx.save_for_backward(grad, count)
        return (torch.stack(losses).sum() if losses else hidden.new_zeros((), dtype=_wide(hidden).dtype)) / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # without create_graph=True it is off here
            raise RuntimeError("chunked_cross_entropy has no second derivatives; use torch.nn.functional.cross_entropy for those.")
        grad, count = ctx.saved_tensors
        scale = grads[0] / count.clamp(min=1)  # where no row counts there is no gradient, as in torch
        return (_wide(grad) * scale).to(grad.dtype), *[None] * 6  # in half precision the scale would lose digits, or overflow


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss, and its gradient for each row of logits that counts: the softmax, less one at the label."""
    counts = labels != IGNORE
    label = torch.where(counts, labels, 0)[:, None]  # (n, 1)
    logp = torch.log_softmax(logits, dim=-1, dtype=_wide(logits[:0]).dtype)  # (n, V)
    picked = logp.gather(1, label)  # (n, 1)
    loss = -torch.where(counts[:, None], picked, 0).sum()
    # Rounded before the one is taken off, the entry of a label that is nearly sure would lose all its digits.
    return loss, logp.exp_().to(logits.dtype).scatter_(1, label, torch.expm1(picked).to(logits.dtype))


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_loss_and_gradient)


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
