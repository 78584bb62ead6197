"""Run batches through a model and let statistics of adapted layers read what passes. The model is the same afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.inits.statistics import Statistics
from lightning_lora.layers.awaiting import await_data, data_came
from lightning_lora.layers.base import LoRALayer
from lightning_lora.model.modes import evaluating
from lightning_lora.model.trial_values import undone

IGNORED = -100  # the label of tokens that do not count, as in torch's cross entropy

Step = Callable[[nn.Module, Any], Any]


def read_batch(model: nn.Module, batch: Any, found: Mapping[str, Statistics], step: Step | None, kind: type[Statistics]) -> None:
    """Run a batch, and let the statistics take what they need of it."""
    mask = _counted(batch, kind.labelled)
    hooks = [each.layer.register_forward_hook(partial(_take, each, mask)) for each in found.values()]
    try:
        loss = (step or _call)(model, batch)
        if kind.gradients and loss is not None:  # a training step may return None to skip a batch
            _loss(loss).backward()
    finally:
        for hook in hooks:
            hook.remove()


def _take(statistics: Statistics, mask: Tensor | None, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Hook on a layer's output."""
    x = args[0].detach()
    if not statistics.gradients:
        statistics.take(_rows(x, mask))
    elif output.requires_grad:  # False in the first of the two passes of a re-entrant checkpoint
        output.register_hook(lambda dy: statistics.take(_rows(x, mask), _rows(dy, mask)))


def _rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and tensor.shape[:-1] == mask.shape:
        return tensor[mask.to(tensor.device)]
    return tensor.reshape(-1, tensor.shape[-1])


def _counted(batch: Any, labelled: bool) -> Tensor | None:
    """Return which tokens of a batch count, None for all."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels") if labelled else None
    found = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        counts = labels != IGNORED
        found = counts if found is None else found & counts if found.shape == counts.shape else found
    return found


def _call(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(
            f"step returned a {type(output).__name__} without a loss of one number, and this init reads gradients: give"
            " step=lambda model, batch: ..., which returns the loss."
        )
    if not loss.requires_grad:
        raise ValueError("step returned a loss that depends on no adapted layer: return the loss of the model that was adapted.")
    return loss


@contextmanager
def without_marks(layers: Iterable[LoRALayer]) -> Iterator[None]:
    """Let gradients pass through layers that wait for data, within the ``with`` block."""
    layers = list(layers)
    for layer in layers:
        data_came(layer)
    try:
        yield
    finally:
        for layer in layers:
            await_data(layer)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode, without compiling and from a fixed seed. What changes beside parameters is as before after it."""
    with undone(model), evaluating(model), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        yield
