"""See that a module's ``configure_model`` leaves its adapters where they are.

Lightning calls it at the start of every fit, validation, test and prediction. One that builds the model each time, without looking whether
it is there, would test fresh weights after a training, in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.layers.base import lora_layers


@contextmanager
def keeping_adapters(module: nn.Module) -> Iterator[None]:
    """Refuse what is done within if the module has fewer adapters after it. Its modules are put back, with what they learnt.

    Raises:
        ValueError: An adapter is gone. The message names the first one.
    """
    layers, children = dict(lora_layers(module)), [(parent, dict(parent._modules)) for parent in module.modules()]
    yield
    left = {id(layer) for _, layer in lora_layers(module)}
    gone = [name for name, layer in layers.items() if id(layer) not in left]
    if gone and len(left) < len(layers):
        for parent, mine in children:
            parent._modules.update(mine)
        raise ValueError(
            f"{type(module).__name__}.configure_model built the model anew, without the adapter of {gone[0]!r} ({len(gone)} of"
            f" {len(layers)} are gone). Lightning calls it before each fit, validate, test and predict: begin it with"
            " `if self.model is not None: return`, with your attribute's name."
        )
