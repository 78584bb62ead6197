"""A rank for each layer from the spectrum of its update, in the form that ``rank_pattern`` takes.

A layer needs as many singular values as hold a share of ``‖ΔW‖²``. One that needs all it has may want more, so it is given twice its rank.
This is a rule of thumb from one run: directions that a smaller rank never had cannot be seen, and rank 1 always uses all it has. No rank
is above min(in, out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer, lora_layers
from lightning_lora.model.ranks import with_ranks
from lightning_lora.ops.low_rank_svd import rank_for_energy
from lightning_lora.utils.names import adapter_root, clean_name


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
            limit = min(max(wanted), max(layer.rank, _most(layer)))
            fitting = next((rank for rank in range(limit, max(limit, layer.rank) + 1) if _takes(layer, rank)), None)
            if fitting is not None:
                found[name] = fitting
    return found


def _most(layer: LoRALayer) -> int:
    """Return the rank from which a layer's products have as many directions as its smallest matrix."""
    rank, inputs, outputs = type(layer).pair_sizes(layer, layer.spec)
    return layer.rank // rank * min(inputs, outputs)


def within_budget(model: nn.Module, spectra: Mapping[str, Tensor], ranks: Mapping[str, int], budget: float) -> dict[str, int]:
    """Return the ranks of :func:`advise_ranks`, lowered until A and B have no more parameters than a share of what they have now.

    Directions are taken in the order of the share of their layer's ``‖ΔW‖²`` for each parameter; then those that a layer does not have yet,
    which count as its last one. Layers without a suggestion keep their rank.

    Args:
        model: adapted.
        spectra: as there.
        ranks: module's name → suggested rank.
        budget: share, > 0.

    Raises:
        ValueError: the lowest ranks have more parameters than that.
    """
    layers = {clean_name(long): layer for long, layer in lora_layers(model) if layer.low_rank}
    costs = {name: sum(p.numel() for p in _factors(layer)) / layer.rank for name, layer in layers.items()}
    room = budget * sum(costs[name] * layer.rank for name, layer in layers.items())
    allowed = {name: [r for r in range(1, ranks[name] + 1) if r == layers[name].rank or _takes(layers[name], r)] for name in ranks}
    found = {name: allowed[name].pop(0) if name in ranks else layer.rank for name, layer in layers.items()}
    room -= sum(costs[name] * rank for name, rank in found.items())
    if room < 0:
        raise ValueError(f"rank_budget={budget!r}: even the lowest ranks have more parameters than that; give a larger share.")
    shares = {name: _shares(layers[name], name, spectra) for name in ranks}

    def worth(name: str) -> tuple[bool, float]:
        """Whether a layer has the directions of its next rank, and the share of ‖ΔW‖² that they add for each parameter."""
        after = allowed[name][0]
        added = [shares[name][min(rank, len(shares[name])) - 1] for rank in range(found[name] + 1, after + 1)]
        return after <= layers[name].rank, sum(added) / len(added) / costs[name]

    while raising := [name for name in ranks if allowed[name]]:
        name = max(raising, key=worth)
        rank = allowed[name].pop(0)
        price = costs[name] * (rank - found[name])
        if price <= room:
            found[name], room = rank, room - price
        else:
            allowed[name] = []
    return {name: found[name] for name in ranks}


def _factors(layer: LoRALayer) -> list[nn.Parameter]:
    return [factor for part in layer.by_weight().values() for factor in part.lora_factors()]


def _shares(layer: LoRALayer, name: str, spectra: Mapping[str, Tensor]) -> list[float]:
    """Return the share of ‖ΔW‖² in each direction of a layer, (r,); the mean of its weights."""
    squares = [spectra[key].square() for part in layer.by_weight() for key in (name, f"{name}.{part}") if key in spectra]
    shares = [each / each.sum() for each in squares if each.isfinite().all() and each.any()]
    return (sum(shares) / len(shares)).tolist()  # type: ignore[union-attr]


def patterns(model: nn.Module, ranks: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Return ``rank_pattern``, and the ``alpha_pattern`` that keeps each layer's scaling, for a ``LoRAConfig``.

    Layers without a suggestion are in it with the rank they have: a name also matches longer names that end with it.

    Args:
        model: adapted.
        ranks: of :func:`advise_ranks`.
    """
    if not ranks:
        return {"rank_pattern": {}, "alpha_pattern": {}}
    prefix, _ = adapter_root(model)
    named = {clean_name(name): layer for name, layer in lora_layers(model) if layer.low_rank}
    # Names as they were when LoRA was applied, relative to the adapted part, without what a LightningModule adds: both accept them.
    short = {name: (layer.spec.fqn or name).removeprefix(f"{prefix}.") for name, layer in named.items()}
    layers = {short[name]: layer for name, layer in named.items()}
    all_ranks = {short[name]: ranks.get(name, layer.rank) for name, layer in named.items()}
    config = with_ranks(next(iter(layers.values())).lora_config, "", layers, all_ranks)
    return {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": {name: round(a, 9) for name, a in config.alpha_pattern.items()}}


def _takes(layer: LoRALayer, rank: int) -> bool:
    """Return True if a layer can have this rank by a pattern, while the config's own rank stays."""
    try:
        type(layer).check(layer, replace(layer.spec, rank=rank))
    except ValueError:
        return False
    return True
