"""A module's state by name: its tensors, its extra state, and the state dict that a user made of them.

Most modules are what their parameters, buffers and extra state are. Where a class overrides how its state dict is made or loaded (or a
hook changes it), the state dict is the user's business: it is asked for and given back as plain Lightning would, and only what is
proved to be the base's is taken out of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import PREFIX
from lightning_lora.quantization.formats import format_of
from lightning_lora.utils.names import clean_name, persistent_buffers
from lightning_lora.utils.sharding import distribute_like, local_tensor

_METHODS = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict")
#: Who overrides these methods and adds no state by it, or state that is looked for in :func:`state_of_user`.
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_lora", "bitsandbytes", "torchao", "torchmetrics"}
_EXTRA = "_extra_state"  # torch's name for it in state dicts


def parameters_by_name(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """``(clean name, owner, name in the owner, parameter)`` of every parameter, under every name it has."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield clean_name(f"{prefix}.{name}" if prefix else name), owner, name, parameter


def places(module: nn.Module) -> dict[str, Tensor]:
    """Name → where the value of that name in a checkpoint goes: every parameter and persistent buffer."""
    return {fqn: p for fqn, _, _, p in parameters_by_name(module)} | persistent_buffers(module)


def extra_states(module: nn.Module) -> dict[str, nn.Module]:
    """Name in a state dict → module that has extra state under it (torch's ``get_extra_state``)."""
    return {
        clean_name(f"{prefix}.{_EXTRA}" if prefix else _EXTRA): child
        for prefix, child in module.named_modules()
        if type(child).get_extra_state is not nn.Module.get_extra_state
    }


def overrides(module: nn.Module) -> str | None:
    """Class of a user that overrides how a state dict is made or loaded; None if there is none in the module."""
    for child in module.modules():
        for cls in type(child).__mro__:
            if cls.__module__.partition(".")[0] not in _LIBRARIES and any(method in vars(cls) for method in _METHODS):
                return cls.__qualname__
    return None


def state_of_user(module: nn.Module) -> dict[str, Any] | None:
    """The module's own state dict if it is another than its parameters, buffers and extra state; else None."""
    state: dict[str, Any] = {key: value for key, value in module.state_dict().items() if not _of_packed(module, key)}
    if overrides(module) is not None:
        return state
    mine, theirs = {*places(module), *extra_states(module)}, {clean_name(key) for key in state}
    # A merged layer's state dict leaves its adapter out.
    missing = {name for name in mine - theirs if not name.rpartition(".")[2].startswith(PREFIX)}
    return state if missing or theirs - mine else None


def without_base(state: dict[str, Any], base: dict[str, Tensor]) -> dict[str, Any]:
    """A user's state dict without the entries that are base tensors, told by their memory, or by name and value.

    Args:
        state: as the module gave it.
        base: name → parameter, of those that are proved to be the base's.
    """
    memory = {_memory(p) for p in base.values() if p.numel()}

    def is_base(key: str, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        like = base.get(clean_name(key))
        return (value.numel() > 0 and _memory(value) in memory) or (
            like is not None and like.shape == value.shape and torch.equal(local_tensor(like.detach()), local_tensor(value))
        )

    return {key: value for key, value in state.items() if not is_base(key, value)}


def names_in(saved: Collection[str], module: nn.Module) -> set[str]:
    """Names of the parameters and buffers that a checkpoint has values for, whatever the user's state dict calls them."""
    state = state_of_user(module)
    if state is None:
        return set(saved)
    memory = {_memory(value) for key, value in state.items() if key in saved and isinstance(value, Tensor) and value.numel()}
    return {name for name, tensor in places(module).items() if name in saved or (tensor.numel() and _memory(tensor) in memory)}


def load_users(module: nn.Module, state: dict[str, Any], saved: dict[str, Any], strict: bool) -> None:
    """Load through the user's methods: what a checkpoint has, and what the module has now for the rest."""
    cut = {
        key: distribute_like(value, state[key]) if isinstance(value, Tensor) and isinstance(state.get(key), Tensor) else value
        for key, value in saved.items()
    }
    module.load_state_dict({**state, **cut}, strict=strict)


def _memory(tensor: Tensor) -> tuple[int, int]:
    mine = local_tensor(tensor.detach())
    return mine.data_ptr(), mine.numel()


def _of_packed(module: nn.Module, key: str) -> bool:
    """Whether an entry belongs to a packed weight beside the weight itself (scales, number of bits)."""
    owner_name, _, name = key.rpartition(".")
    while owner_name:
        try:
            owner = module.get_submodule(owner_name)
        except AttributeError:
            owner_name, _, last = owner_name.rpartition(".")
            name = f"{last}.{name}"
            continue
        return name not in owner._parameters and name not in owner._buffers and format_of(owner) is not None
    return False
