"""Find the routers of mixtures that are plain linears, which ``"all-linear"`` leaves alone.

A small change of a router sends tokens to other experts, so that the outputs jump. Most routers are classes of their own, which no kind
adapts. A linear is a router if it is in the module that contains the experts, outside of them, has one output per expert, and is named so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.model.heads import within
from lightning_lora.registry import kind_of

_NAMES = {"gate", "router"}


def routers(modules: Mapping[str, nn.Module], linears: Collection[str]) -> dict[str, str]:
    """Return FQN of each linear that routes tokens → why it is not adapted.

    Args:
        modules: FQN → module of the model.
        linears: FQNs of the layers to look at.
    """
    stacked = {fqn: count for fqn, module in modules.items() if (count := _in_one_tensor(module))}
    experts = stacked | {
        fqn: n for fqn, module in modules.items() if not any(within(s, [fqn]) for s in stacked) and (n := _named(fqn, module))
    }
    found = {}
    for each, count in experts.items():
        parent = each.rpartition(".")[0]
        for fqn in linears:
            parts = fqn.removeprefix(f"{parent}.").split(".") if within(fqn, [parent]) and not within(fqn, experts) else ()
            if _NAMES.intersection(parts) and getattr(modules[fqn], "out_features", None) == count:
                found[fqn] = "it routes tokens to experts"
    return found


def _in_one_tensor(module: nn.Module) -> int:
    """Return the number of experts that a kind adapts, 0 for other modules."""
    if not issubclass(kind_of(type(module)) or object, SeveralWeights):
        return 0
    return next((p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3), 0)


def _named(fqn: str, module: nn.Module) -> int:
    """Return the number of experts in a list, or in a class that no kind adapts, by its name; 0 for other modules."""
    if fqn.rpartition(".")[2] != "experts":
        return 0
    count = len(module) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else getattr(module, "num_experts", 0)
    return count if isinstance(count, int) else 0
