"""Cross entropy through a frozen output layer, one chunk of rows at a time: the full logits are never in memory.

With a vocabulary of 128k the logits of 8192 tokens take 2 GiB in bf16, and several times that in fp32 and as gradients. A frozen layer
needs no gradient itself. So the forward pass can compute the gradient of the hidden states as well, chunk by chunk. It takes two
products, as many as the plain way, and the logits of one chunk. torch 2.13 has the same in ``F.linear_cross_entropy``; earlier releases
do not. Liger's version needs a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.ops.token_rows import replace_projected
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.torch_private import may_vary
from lightning_lora.utils.torch_private_parallel import fsdp2_original

IGNORE = -100  # as in torch's cross entropy
SHARDED = "its output layer is sharded"
POSITIONS = "answer_positions"  # the key in a batch of what `answer_positions` returns
WHOLE = "whole"  # the key in a batch that has no padding: it needs no mask, which a model would have to read on the device


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    chunk: int = 2048,
    compiled: bool = False,
    reduction: Literal["mean", "none"] = "mean",
    replaced: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return ``F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)``, with at most ``chunk`` rows of logits in memory.

    If the weight or the bias is trainable or sharded, exactly that expression is computed.

    Args:
        hidden: (N, d); under autocast in any floating dtype.
        weight: (V, d), frozen.
        labels: (N,), class indices; rows with -100 do not count.
        bias: (V,), frozen.
        chunk: rows of logits at a time.
        compiled: compile the elementwise part. On a GPU this halves the passes over the logits.
        reduction: "mean" over the rows that count, or "none": each row's loss (N,), 0 where it does not count.
        replaced: numbers (n,) of rows of the weight, and the rows (n, d) that stand in their place; these may train.

    Returns:
        The loss in fp32 (float64 for float64).

    Raises:
        ValueError: ``chunk`` is not a positive number, or ``reduction`` is another.
        RuntimeError: in the backward pass, if second derivatives are requested.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be a positive number of rows.")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} is not known; it is 'mean' or 'none'.")
    head = [tensor for tensor in (weight, bias) if tensor is not None]
    wants_grad = torch.is_grad_enabled()
    if any(is_sharded(tensor) or (tensor.requires_grad and wants_grad) for tensor in head):
        logits = F.linear(hidden, weight, bias)
        if replaced is not None:
            logits = replace_projected(logits, hidden, replaced[1], replaced[0], bias)
        return F.cross_entropy(wide(logits), labels, ignore_index=IGNORE, reduction=reduction)
    kind, dtype = hidden.device.type, autocast_dtype(hidden)
    if dtype is not None:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    index, rows = (None, None) if replaced is None else (replaced[0], replaced[1].to(hidden.dtype))
    wants_grad = wants_grad and (hidden.requires_grad or (rows is not None and rows.requires_grad))
    with torch.autocast(kind, enabled=False):
        losses = _ChunkedCrossEntropy.apply(hidden, rows, weight, bias, index, labels, chunk, compiled, wants_grad)
        return losses if reduction == "none" else losses.sum() / (labels != IGNORE).sum()


def answer_positions(labels: Tensor) -> Tensor:
    """Return where labels (B, T) have a loss, as positions in the flattened batch (N,). A row's first token is predicted by nothing."""
    answers = labels != IGNORE
    answers[:, 0] = False
    return answers.flatten().nonzero()[:, 0]


def unchunkable(head: Any) -> str | None:
    """Return why the loss through this output layer cannot be computed in chunks, None if it can.

    FSDP2 may have sharded it: it gathers the weight for the layer's forward, and only there. :func:`bypassed` looks again.
    """
    cls: Any = fsdp2_original(type(head))
    if (cls.lora_base if getattr(cls, "replaces_rows", False) else cls) is not nn.Linear:
        return f"its output layer is a {type(head).__name__}, not a plain nn.Linear"
    if "forward" in head.__dict__:
        return "its output layer has a forward of its own set on the instance"
    weight = head._parameters.get("weight")  # under FSDP1 this is a flat shard or missing
    if weight is None or weight.shape != (head.out_features, head.in_features):
        return SHARDED
    if any(p.requires_grad for name, p in head.named_parameters() if name != "lora_rows"):
        return "its output layer trains"
    return None


@contextmanager
def bypassed(head: nn.Module, model: nn.Module, measure: Callable[[Tensor], Any] | None = None) -> Iterator[list[tuple[Tensor, Any]]]:
    """While active, replace the output layer's forward by the identity. The yielded list receives ``(output, measured)`` at each call.

    The model's own forward still computes everything before, so this works for any model whose last step is its output layer. The
    model's output is then the same object as the layer's. It is not if the model changes its logits: Gemma caps them, Cohere and
    Granite scale them.

    A layer whose weight is a DTensor even now, as under tensor parallelism, computes its logits, and the list stays empty.

    Args:
        head: the output layer.
        model: the model around it.
        measure: called with the output inside the layer's forward, where FSDP2 has gathered the weight. None: measured is None.
    """
    outputs: list[tuple[Tensor, Any]] = []
    copied = any(fsdp2_original(type(unit)) is not type(unit) for unit in (head, model))  # FSDP2 warns of outputs that are views

    def forward(hidden: Tensor) -> Tensor:
        if any(is_sharded(parameter) for parameter in head.parameters(recurse=False)):
            logits: Tensor = type(head).forward(head, hidden)
            return logits
        output = hidden.clone() if copied else hidden
        outputs.append((output, None if measure is None else measure(output)))
        return output

    head.__dict__["forward"] = forward
    try:
        yield outputs
    finally:
        del head.__dict__["forward"]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Keeps the gradient of the hidden states for the backward pass.

    It is kept unscaled, so that it neither underflows nor overflows in half precision.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        own: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        labels: Tensor,
        chunk: int,
        compiled: bool,
        wants_grad: bool,
    ) -> Tensor:
        grad = torch.empty_like(hidden) if wants_grad else None
        columns = [hidden.new_empty(0, 0 if index is None else len(index))]  # the gradient of the logits of the weight's replaced rows
        step = _compiled() if compiled else _loss_and_gradient
        losses = []
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits, answers = F.linear(hidden[rows], weight, bias), labels[rows]  # (n, V), (n,)
            if index is not None and own is not None:
                logits[:, index] = F.linear(hidden[rows], own, None if bias is None else bias[index])
            if compiled:  # the last chunk is shorter, and the number of labels differs between batches
                may_vary(logits, 0)
                may_vary(answers, 0)
            loss, dlogits = step(logits, answers)
            losses.append(loss)
            if grad is not None and index is not None and own is not None:
                columns.append(dlogits[:, index])
                torch.mm(dlogits.index_fill_(1, index, 0), weight, out=grad[rows])
                grad[rows].addmm_(columns[-1], own)
            elif grad is not None:
                torch.mm(dlogits, weight, out=grad[rows])
            del logits, dlogits
        counts = labels != IGNORE
        if grad is not None:
            grad.masked_fill_(~counts[:, None], 0)
        ctx.save_for_backward(grad, counts, *([] if index is None else [torch.cat(columns), hidden]))
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=wide(hidden[:0]).dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # on only with create_graph=True
            raise RuntimeError("chunked_cross_entropy has no second derivatives; use torch.nn.functional.cross_entropy for them.")
        grad, counts, *of_rows = ctx.saved_tensors
        scale = torch.where(counts, grads[0], 0)[:, None]  # of a mean over no rows it is infinite; the gradient is zero, as in torch
        scaled = (wide(grad) * scale).to(grad.dtype)  # in half precision the scale would lose digits or overflow
        own = None if not of_rows else wide(of_rows[0]).mul(scale).t() @ wide(of_rows[1])
        return scaled, None if own is None else own.to(grad.dtype), *[None] * 7


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's loss, and its gradient with respect to that row of logits, if it counts.

    That gradient is the softmax minus one at the label.
    """
    counts = labels != IGNORE
    label = torch.where(counts, labels, 0)[:, None]  # (n, 1)
    logp = torch.log_softmax(logits, dim=-1, dtype=wide(logits[:0]).dtype)  # (n, V)
    picked = logp.gather(1, label)  # (n, 1)
    loss = -torch.where(counts, picked[:, 0], 0)
    # expm1 subtracts the one before rounding. After rounding, a label with probability near 1 would lose all its digits.
    return loss, logp.exp_().to(logits.dtype).scatter_(1, label, torch.expm1(picked).to(logits.dtype))


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_loss_and_gradient)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32 if its dtype is narrower."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
