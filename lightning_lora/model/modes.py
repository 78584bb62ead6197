"""Flags of a model that LoRA sets for training: the adapters' dropout mode, and ``requires_grad``."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_lora.layers.base import lora_layers


def wake_dropout(model: nn.Module) -> list[str]:
    """Put adapted layers with dropout into training mode, but nothing inside or around them. Return the names of those that were not."""
    asleep = {name: layer for name, layer in lora_layers(model) if layer.lora_dropout.p > 0 and not layer.training}
    for layer in asleep.values():
        layer.training = True  # not `train()`, because submodules must stay in evaluation mode
    return list(asleep)


def restore_flags(flags: Iterable[tuple[nn.Parameter, bool]]) -> None:
    """Set ``requires_grad`` of each parameter to the flag beside it."""
    for parameter, flag in flags:
        if not is_lazy(parameter):
            parameter.requires_grad_(flag)
