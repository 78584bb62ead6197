"""Collect what each layer of a model exports to a file, and build the one config that describes all of them.

A layer's rank and alpha in a file may differ from those it trains with. AdaLoRA leaves out pruned triplets; a kept start doubles the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_lora.adapter_io.token_rows import rows_of_layers
from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.factors import Exported
from lightning_lora.utils.patterns import by_name


def export_layers(layers: dict[str, LoRALayer]) -> tuple[dict[str, Exported], LoRAConfig]:
    """Export every layer.

    Args:
        layers: FQN → adapted layer; at least one, and all with the same config.

    Returns:
        FQN → the layer's tensors, rank, alpha and kind as a file holds them; and the config that reads the file back.
    """
    everything = {fqn: layer.exported() for fqn, layer in layers.items()}
    exported = {fqn: each for fqn, each in everything.items() if layers[fqn].low_rank}
    config = next(iter(exported.values())).config
    read = {fqn: (*(each.own or (each.rank, each.alpha)), each.kind) for fqn, each in exported.items()}
    if any(each != _own(layers[fqn]) for fqn, each in read.items()):
        columns: Any = ({fqn: each[i] for fqn, each in read.items() if not with_parent(fqn, layers)} for i in range(3))
        ranks, alphas, kinds = columns
        config = replace(
            config,
            rank=max(ranks.values()),
            rank_pattern={} if len(set(ranks.values())) == 1 else by_name(ranks),
            alpha=max(alphas.values()),
            alpha_pattern={} if len(set(alphas.values())) == 1 else by_name(alphas),
            kind_pattern=by_name({fqn: kind for fqn, kind in kinds.items() if kind is not None}),
        )
    return everything, rows_of_layers(config, layers)


def with_parent(fqn: str, layers: Mapping[str, LoRALayer]) -> bool:
    """Return True if a layer is adapted together with the module around it, which names it."""
    parent, _, name = fqn.rpartition(".")
    return parent in layers and name in layers[parent].children_too


def _own(layer: LoRALayer) -> tuple[int, float, str | None]:
    return layer.rank, layer.alpha, layer.spec.kind
