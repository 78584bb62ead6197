"""PEFT's ``ensure_weight_tying``: what is trained on an embedding is trained on the modules that are tied to it too. Source: PEFT 0.21,
``_check_tied_modules``, ``_add_modules_to_save_to_tie`` and ``_add_targets_to_tie``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from lightning_lora.adapter_io.peft_rules import is_saved


def saved_with_ties(
    tensors: Collection[str],
    fields: Mapping[str, Any],
    layers: Collection[str],
    saved: Collection[str],
    modules: Mapping[str, nn.Module],
    where: str,
) -> list[str]:
    """Return the ``modules_to_save`` that mean here what a file's do: with the modules that PEFT tied to a saved embedding.

    The file has their weights too. Where nothing is tied to an embedding, the field means nothing.

    Args:
        tensors: names of the file's tensors, in this model.
        fields: PEFT's JSON.
        layers: FQNs of the layers with an adapter in the file.
        saved: the file's ``modules_to_save``.
        modules: FQN → module of this model.
        where: the file's path, for messages.

    Raises:
        ValueError: the file ties adapters.
    """
    names = list(saved)
    for fqn, module in modules.items() if fields.get("ensure_weight_tying") else ():
        weight = module._parameters.get("weight") if isinstance(module, nn.Embedding) else None
        tied = [name for name, other in modules.items() if other is not module and other._parameters.get("weight", name) is weight]
        if tied and fqn in layers:
            raise ValueError(
                f"{where}: ensure_weight_tying=True ties the adapter on {fqn!r} to {tied[0]!r}, so that both train as one, which is not"
                " supported."
            )
        if is_saved(saved, fqn):
            names += [name for name in tied if name not in names and f"{name}.weight" in tensors]
    return names
