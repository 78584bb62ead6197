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
    experts = [fqn for fqn in linears if issubclass(kind_of(type(modules[fqn])) or object, SeveralWeights)]
    found = {}
    for each in experts:
        parent, tensors = each.rpartition(".")[0], [p for p in modules[each]._parameters.values() if p is not None]
        count = tensors[0].shape[0]
        for fqn in linears:
            parts = fqn.removeprefix(f"{parent}.").split(".") if within(fqn, [parent]) and not within(fqn, experts) else ()
            if _NAMES.intersection(parts) and getattr(modules[fqn], "out_features", None) == count:
                found[fqn] = "it routes tokens to experts"
    return found
