"""Keep torch's fast paths off where they would bypass adapters.

In evaluation without gradients ``nn.TransformerEncoderLayer`` gives the weights of its linears to one kernel, and ``nn.TransformerEncoder``
packs its input for that kernel. Neither calls a linear. Each first looks at an attribute of its module, which an adapter inside sets to
the value that means "no fast path". Outputs at padded positions are then as in training: not filled with zeros.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.layers.base import LoRALayer

# Module → the attribute that its fast path looks at, and the value that keeps it off.
_SWITCHES: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_KEPT = "lora_fast_path"  # the attribute's own value, on the module

#: Forwards whose reads of weights are in such a path alone.
SWITCHED: frozenset[Any] = frozenset(cls.forward for cls in _SWITCHES)


def keep_off(model: nn.Module) -> None:
    """Switch off the fast path of every module that has an adapter inside."""
    for module, name, off in _with_path(model):
        if _KEPT not in module.__dict__ and any(isinstance(part, LoRALayer) for part in module.modules()):
            module.__dict__[_KEPT] = module.__dict__[name]
            module.__dict__[name] = off


def put_back(model: nn.Module) -> None:
    """Undo :func:`keep_off`."""
    for module, name, _ in _with_path(model):
        if _KEPT in module.__dict__:
            module.__dict__[name] = module.__dict__.pop(_KEPT)


def _with_path(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    pairs = [(module, *switch) for module in model.modules() for cls, switch in _SWITCHES.items() if isinstance(module, cls)]
    return [(module, name, off) for module, name, off in pairs if name in module.__dict__]
