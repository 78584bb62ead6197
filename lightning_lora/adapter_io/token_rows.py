"""Rows for new tokens in PEFT's files (``trainable_token_indices``): some rows of an embedding or of an output head, with new values.

They replace rows of the base, as PEFT's own forward pass does. So a file's rows become a whole base weight that came with the adapter
(:mod:`lightning_lora.adapter_io.extras`): the next file of that adapter has it, and a tied head follows its embedding. Source: PEFT 0.21,
``TrainableTokensLayer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.utils.sharding import full_tensor

_ROWS = ".token_adapter.trainable_tokens_delta"  # new values, not differences
FIELD = "trainable_token_indices"


def with_whole_weights(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], modules: Mapping[str, nn.Module], where: str
) -> dict[str, Tensor]:
    """Return a file's tensors with a whole weight in place of each set of rows.

    Args:
        tensors: of the file, by the names of this model.
        fields: PEFT's JSON.
        modules: name → module of this model.
        where: the file's path, for messages.

    Raises:
        ValueError: rows and indices do not belong together, or do not fit this model.
    """
    said = fields.get(FIELD)
    found = {name.removesuffix(_ROWS): tensor for name, tensor in tensors.items() if name.endswith(_ROWS)}
    if said and not found:
        raise ValueError(f"{where}: {FIELD}={said!r}, and the tensors beside it have no rows for them ({_ROWS[1:]}).")
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith(_ROWS)}
    for owner, rows in found.items():
        indices = _indices(said, owner)
        weight = getattr(modules.get(owner), "weight", None)
        if indices is None or len(indices) != len(rows) or len({*indices}) != len(indices):
            raise ValueError(f"{where}: {FIELD}={said!r} does not say which {len(rows)} rows of {owner!r} the file has.")
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
            raise ValueError(f"{where}: {owner!r} has no plain weight here, whose rows {FIELD} could replace.")
        if rows.ndim != 2 or rows.shape[1:] != weight.shape[1:]:
            raise ValueError(f"{where}: rows of {owner!r} have shape {tuple(rows.shape)}, this model's weight has {tuple(weight.shape)}.")
        if not 0 <= min(indices) <= max(indices) < len(weight):
            raise ValueError(
                f"{where}: {FIELD} names row {max(indices)} of {owner!r}, which has {len(weight)} here: call"
                f" resize_token_embeddings({max(indices) + 1}) first, or with the size that the adapter was trained with."
            )
        base = whole.get(f"{owner}.weight", full_tensor(weight.detach()).cpu())
        whole[f"{owner}.weight"] = base.index_copy(0, torch.tensor(indices), rows.to(base.dtype))
        for name, module in modules.items():  # under each of its names, because each is part of the base's fingerprint
            if getattr(module, "weight", None) is weight:
                whole.setdefault(f"{name}.weight", whole[f"{owner}.weight"])
    return whole


def _indices(said: Any, owner: str) -> list[int] | None:
    """Return the indices of one module; a list is the input embedding's. PEFT compares ends of names."""
    if isinstance(said, Mapping):
        return next((indices for name, indices in said.items() if owner.endswith(name)), None)
    return said if isinstance(said, list) else None


def why_tying_matters(fields: Mapping[str, Any], layers: set[str], saved: list[str], modules: Mapping[str, nn.Module]) -> str | None:
    """Return why ``ensure_weight_tying`` changes what an adapter means here; None if it does not.

    Args:
        fields: PEFT's JSON.
        layers: names of the layers with an adapter in the file.
        saved: names of the modules trained in full.
        modules: name → module of this model.
    """
    if not fields.get("ensure_weight_tying"):
        return None
    ends = [
        name for name, module in modules.items() if isinstance(module, nn.Embedding) and (name in layers or any(map(name.endswith, saved)))
    ]
    return f"ensure_weight_tying=True ties what is trained on {ends[0]!r} to the output head, which is not supported" if ends else None
