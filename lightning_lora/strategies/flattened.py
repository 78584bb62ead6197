"""Parameters by name, while they can be read or written: under FSDP1, which flattens them, only inside its own gathering.

Each function takes the module as its strategy wrapped it. Elsewhere that is the module itself, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_lora.strategies import module_state
from lightning_lora.utils.names import clean_name, join, persistent_buffers
from lightning_lora.utils.sharding import gathered_parameters, is_flattened

T = TypeVar("T")


def parameters(wrapped: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield ``(clean name, owner, name in the owner, parameter)`` of every parameter; a collective under FSDP1."""
    if is_flattened(wrapped):
        for prefix, owner, name, p in gathered_parameters(wrapped):
            yield clean_name(join(prefix, name)), owner, name, p
    else:
        yield from module_state.parameters_by_name(wrapped)


def gathered(wrapped: nn.Module, names: Collection[str], writeback: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of these names under FSDP1. Unflattened ones go first: they are often all, without a collective."""
    left = {clean_name(name) for name, _ in wrapped.named_parameters()}.intersection(names)
    for prefix, _, name, p in gathered_parameters(wrapped, writeback) if left else ():
        fqn = clean_name(join(prefix, name))
        if fqn in left:
            yield fqn, p
            left.discard(fqn)
            if not left:
                return


def places(wrapped: nn.Module, names: Collection[str]) -> dict[str, torch.Size]:
    """Return name → full shape of the parameters and persistent buffers among these names."""
    shapes = {name: tensor.shape for name, tensor in module_state.places(wrapped).items() if name in names}
    if is_flattened(wrapped):  # the shapes above are those of shards
        shapes |= {fqn: p.shape for fqn, p in gathered(wrapped, names)}
    return shapes


def writable(wrapped: nn.Module, values: dict[str, T]) -> Iterator[tuple[Tensor, T]]:
    """Yield ``(parameter or buffer, value)`` for each name, while it can be written to."""
    if is_flattened(wrapped):
        for fqn, p in gathered(wrapped, values.keys(), writeback=True):
            yield p, values[fqn]
        found: dict[str, Tensor] = dict(persistent_buffers(wrapped))
    else:
        found = module_state.places(wrapped)
    yield from ((found[name], values[name]) for name in values.keys() & found.keys())
