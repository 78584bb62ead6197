"""Flags of a model: the adapters' dropout mode, training and evaluation mode, and ``requires_grad``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.layers.base import lora_layers


def wake_dropout(model: nn.Module) -> list[str]:
    """Put adapted layers with dropout into training mode, but nothing inside or around them. Return the names of those that were not."""
    asleep = {name: layer for name, layer in lora_layers(model) if layer.lora_dropout.p > 0 and not layer.training}
    for layer in asleep.values():
        layer.training = True  # not `train()`, because submodules must stay in evaluation mode
    return list(asleep)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within the ``with`` block. Each module has its own mode again after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training  # not `train()`, because submodules have modes of their own


def restore_flags(flags: Iterable[tuple[nn.Parameter, bool]]) -> None:
    """Set ``requires_grad`` of each parameter to the flag beside it."""
    for parameter, flag in flags:
        if not is_lazy(parameter):
            parameter.requires_grad_(flag)
