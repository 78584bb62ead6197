"""Whole adapters in a model under FSDP1 that flattened them with their base, for code that reads them as they are elsewhere.

Wrapped with ``ignored_states``, as under :class:`~lightning_lora.LoRACallback`, adapters stay whole. Fabric's strategy and a plain
``FullyShardedDataParallel(model)`` flatten them: each process then has a piece of A, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_lora.layers.base import lora_layers
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import flattened, gathered, is_distributed
from lightning_lora.utils.torch_private_parallel import fsdp1_flattened


@contextmanager
def whole_adapters(root: nn.Module) -> Iterator[None]:
    """Replace the adapters by whole copies inside the ``with`` block, where FSDP1 has flattened them (a collective).

    Its units are gathered one after another, so that no process holds the whole base. Inside the block the model must neither run nor give
    a state dict.

    Raises:
        ValueError: an FSDP1 unit around the root flattened them, which alone can tell them apart.
    """
    if not is_distributed():
        yield
        return
    flat = {
        (module, name): parameter
        for _, module in lora_layers(root)
        for name, parameter in module.lora_parameters().items()
        if fsdp1_flattened(parameter)
    }
    units = flattened(root) if flat else {}
    for fqn, layer in lora_layers(root) if flat else ():
        if layer not in units and any(module is layer for module, _ in flat):
            raise ValueError(
                f"the adapter of {clean_name(fqn)!r} is part of an FSDP1 unit around {type(root).__name__}, which alone can tell its"
                " parameters apart: give the module that FSDP1 wrapped as a whole."
            )
    for unit in dict.fromkeys(units.values()):  # the outermost first, which begins FSDP1's work as the root
        with gathered(unit):
            mine = [(module, name) for module, name in flat if units[module] is unit]
            whole = [module.get_parameter(name).detach().clone() for module, name in mine]
        for (module, name), tensor in zip(mine, whole, strict=True):
            module._parameters[name] = nn.Parameter(tensor, requires_grad=flat[module, name].requires_grad)
    try:
        yield
    finally:
        for (module, name), parameter in flat.items():
            module._parameters[name] = parameter


def check_not_flattened(root: nn.Module) -> None:
    """Raise ValueError if FSDP1 has flattened an adapter of the model: what is written to it would be lost."""
    for fqn, layer in lora_layers(root) if is_distributed() else ():
        if any(fsdp1_flattened(parameter) for parameter in layer.lora_parameters().values()):
            raise ValueError(
                f"FSDP1 flattened the adapter of {clean_name(fqn)!r} into one parameter with the base, so that nothing can be loaded into"
                " it: load before FSDP1 wraps the model, or wrap a model without adapters and load then."
            )
