"""A rank for each layer from the spectrum of its update, in the form that ``rank_pattern`` takes.

A layer needs as many singular values as hold a share of ``‖ΔW‖²``. One that needs all it has may want more, so it is given twice its rank.
This is a rule of thumb from one run: directions that a smaller rank never had cannot be seen, and rank 1 always uses all it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.model.ranks import with_ranks
from lightning_lora.ops.low_rank_svd import rank_for_energy
from lightning_lora.utils.names import clean_name


def wanted_rank(values: Tensor, rank: int, energy: float) -> int | None:
    """Return the rank that a spectrum suggests; None if the update is zero or not finite.

    Args:
        values: singular values of the update, descending.
        rank: that of the adapter. The spectrum has more values if the adapter keeps its start: they share the rank.
        energy: share of ``Σ σ²`` that the rank keeps, in (0, 1].
    """
    if not values.isfinite().all() or not values.any():
        return None
    needed = rank_for_energy(values, energy)
    return 2 * rank if needed == len(values) else math.ceil(needed * rank / len(values))


def advise_ranks(model: nn.Module, spectra: Mapping[str, Tensor], energy: float) -> dict[str, int]:
    """Return module's name → suggested rank, for the modules whose variant, init and shape take another rank.

    A module with several weights gets the largest rank that one of them wants.

    Args:
        model: adapted.
        spectra: name → singular values, as :func:`lightning_lora.model.layer_statistics.low_rank_layers` names layers.
        energy: share of ``‖ΔW‖²`` that a rank keeps.
    """
    found = {}
    for long, layer in lora_layers(model):
        name = clean_name(long)
        own = [spectra[key] for part in layer.by_weight() for key in (name, f"{name}.{part}") if key in spectra]
        wanted = [rank for values in own if (rank := wanted_rank(values, layer.rank, energy)) is not None]
        others = (rank for rank in range(1, 2 * layer.rank + 1) if rank != layer.rank)
        if wanted and any(_takes(layer, rank) for rank in others):
            limit = max(wanted)
            fitting = next((rank for rank in range(limit, max(limit, layer.rank) + 1) if _takes(layer, rank)), None)
            if fitting is not None:
                found[name] = fitting
    return found


def patterns(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Return ``rank_pattern``, and the ``alpha_pattern`` that keeps each layer's scaling, for a ``LoRAConfig``.

    Layers without a suggestion are in it with the rank they have: a name also matches longer names that end with it.

    Args:
        model: adapted.
        ranks: of :func:`advise_ranks`.
    """
    if not ranks:
        return {"rank_pattern": {}, "alpha_pattern": {}}
    named = {clean_name(name): layer for name, layer in lora_layers(model) if layer.low_rank}
    # Patterns match names as they were when LoRA was applied: relative to the adapted part of a LightningModule.
    layers = {layer.spec.fqn or name: layer for name, layer in named.items()}
    all_ranks = {layer.spec.fqn or name: ranks.get(name, layer.rank) for name, layer in named.items()}
    config = with_ranks(next(iter(layers.values())).lora_config, "", layers, all_ranks)
    return {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": {name: round(a, 9) for name, a in config.alpha_pattern.items()}}


def _takes(layer: LoRALayer, rank: int) -> bool:
    """Return True if a layer can have this rank by a pattern, while the config's own rank stays."""
    try:
        type(layer).check(layer, replace(layer.spec, rank=rank))
    except ValueError:
        return False
    return True
