"""Read and write a module's state by name: its tensors, its extra state, and a state dict that the user's own code makes.

The state of most modules is their parameters, buffers and extra state. But a class can override how its state dict is made or loaded, and
a hook can change it. Then the module's own state dict is saved and loaded as plain Lightning does. Only entries that are proved to be the
base's are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import PREFIX
from lightning_lora.model.noted_state import EXTRA, has_extra_state
from lightning_lora.quantization.formats import format_of
from lightning_lora.strategies.namespaces import LIGHTNING, library
from lightning_lora.utils.names import clean_name, join, persistent_buffers
from lightning_lora.utils.sharding import distribute_like, local_tensor

_METHODS = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict")
#: Libraries whose overrides of these methods add no state, or state that :func:`state_of_user` finds.
_LIBRARIES = LIGHTNING | {"torch", "lightning_lora", "bitsandbytes", "torchao", "torchmetrics"}


def parameters_by_name(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield ``(clean name, owner, name in the owner, parameter)`` of every parameter, under each of its names."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield clean_name(join(prefix, name)), owner, name, parameter


def places(module: nn.Module) -> dict[str, Tensor]:
    """Return name → tensor that a checkpoint's value of that name is copied into: every parameter and persistent buffer."""
    return {fqn: p for fqn, _, _, p in parameters_by_name(module)} | persistent_buffers(module)


def extra_states(module: nn.Module) -> dict[str, nn.Module]:
    """Return name in a state dict → module that has extra state under that name (torch's ``get_extra_state``)."""
    return {clean_name(join(prefix, EXTRA)): child for prefix, child in module.named_modules() if has_extra_state(child)}


def overrides(module: nn.Module) -> str | None:
    """Return the name of a user's class in the module that overrides how a state dict is made or loaded; None if there is none."""
    for child in module.modules():
        for cls in type(child).__mro__:
            if library(cls) not in _LIBRARIES and any(method in vars(cls) for method in _METHODS):
                return cls.__qualname__
    return None


def state_of_user(module: nn.Module) -> dict[str, Any] | None:
    """Return the module's own state dict if user code changes it; None if it is just parameters, buffers and extra state."""
    state: dict[str, Any] = {key: value for key, value in module.state_dict().items() if not _of_packed(module, key)}
    if overrides(module) is not None:
        return state
    mine, theirs = {*places(module), *extra_states(module)}, {clean_name(key) for key in state}
    # A merged layer's state dict leaves its adapter out.
    missing = {name for name in mine - theirs if not name.rpartition(".")[2].startswith(PREFIX)}
    return state if missing or theirs - mine else None


def without_base(state: dict[str, Any], base: dict[str, Tensor]) -> dict[str, Any]:
    """Return a user's state dict without its base tensors. They are recognized by their memory, or by name and value.

    Args:
        state: the state dict that the module returned.
        base: name → parameter that is proved to be the base's.
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
    """Return the names of the parameters and buffers that a checkpoint has values for, also if user code saves them by other names."""
    state = state_of_user(module)
    if state is None:
        return set(saved)
    memory = {_memory(value) for key, value in state.items() if key in saved and isinstance(value, Tensor) and value.numel()}
    return {name for name, tensor in places(module).items() if name in saved or (tensor.numel() and _memory(tensor) in memory)}


def load_users(module: nn.Module, state: dict[str, Any], saved: dict[str, Any], strict: bool) -> None:
    """Load a checkpoint by the user's methods. What the checkpoint lacks is loaded with its present value."""
    cut = {
        key: distribute_like(value, state[key]) if isinstance(value, Tensor) and isinstance(state.get(key), Tensor) else value
        for key, value in saved.items()
    }
    module.load_state_dict({**state, **cut}, strict=strict)


def _memory(tensor: Tensor) -> tuple[int, int]:
    mine = local_tensor(tensor.detach())
    return mine.data_ptr(), mine.numel()


def _of_packed(module: nn.Module, key: str) -> bool:
    """Return True if an entry belongs to a quantized weight but is not the weight itself (scales, number of bits)."""
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
