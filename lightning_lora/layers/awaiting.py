"""Adapters whose init reads data, before they have seen any: the first backward pass through one raises.

Their start until then is that of ``kaiming``. Without the error a training would silently use it. The mark is a hook on the layer, so
copies and pickles have it too, and a layer that has its data costs nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn


def await_data(layer: nn.Module) -> None:
    """Mark a layer."""
    if not awaits_data(layer):
        layer.register_forward_hook(_refuse_training)


def awaits_data(layer: nn.Module) -> bool:
    """True if the layer is marked."""
    return any(hook is _refuse_training for hook in layer._forward_hooks.values())


def data_came(layer: nn.Module) -> None:
    """Remove the mark: the layer's A and B have their values."""
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _refuse_training]:
        del layer._forward_hooks[key]


def _refuse_training(layer: Any, args: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(partial(_raise, layer.spec.fqn, layer.lora_config.init))


def _raise(fqn: str, init: str, grad: Tensor) -> None:
    raise ValueError(
        f"{fqn!r}: init={init!r} computes A and B from data, and has seen none: call initialize_from_data(model, batches) before training,"
        " or train under LoRACallback, which does it."
    )
