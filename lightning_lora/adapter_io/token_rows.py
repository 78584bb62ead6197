"""Rows of embeddings in adapter files (``trainable_token_indices``), in PEFT's layout: their values, and a field that says which rows.

PEFT writes the rows of an embedding once; modules that are tied to it follow when the file is read, there as here. Source: PEFT 0.21,
``TrainableTokensWrapper`` and ``_set_trainable``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.model.token_rows import FIELD, input_embedding

ROWS = "lora_rows"  # the parameter's name in the layer


def rows_of_file(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], root: nn.Module, modules: Mapping[str, nn.Module], where: str
) -> tuple[int, ...] | dict[str, list[int]] | None:
    """Return the ``trainable_token_indices`` that mean on this model what a file means that PEFT wrote.

    Args:
        tensors: of the file, by the names of this model.
        fields: PEFT's JSON.
        root: the model.
        modules: name → module of it.
        where: the file's path, for messages.

    Raises:
        ValueError: rows and indices do not belong together.
    """
    said = fields.get(FIELD)
    owners = [name.removesuffix(f".{ROWS}") for name in tensors if name.endswith(f".{ROWS}")]
    if said and not owners:
        raise ValueError(f"{where}: {FIELD}={said!r}, and the tensors beside it have no rows for them ({ROWS}).")
    found = {}
    for owner in owners:
        indices, count = _indices(said, owner), len(tensors[f"{owner}.{ROWS}"])
        if indices is None or len(indices) != count or len({*indices}) != count:
            raise ValueError(f"{where}: {FIELD}={said!r} does not say which {count} rows of {owner!r} the file has.")
        found[owner] = list(indices)
        module: Any = modules.get(owner)
        if getattr(module, "bias", None) is not None:
            raise ValueError(
                f"{where}: {FIELD} has rows of {owner!r}, which has a bias here. PEFT 0.21 leaves the bias out while it trains them, so the"
                " adapter is for a model without it."
            )
    if isinstance(said, list) and owners and owners == [_input(root, modules)]:
        return tuple(said)
    return {f"^{re.escape(owner)}$": indices for owner, indices in found.items()} or None


def rows_of_layers(config: LoRAConfig, layers: Mapping[str, LoRALayer]) -> LoRAConfig:
    """Return the config with the names that its rows have in the adapter's root, from which a file is read."""
    if not isinstance(config.trainable_token_indices, Mapping):
        return config
    rows = {f"^{re.escape(fqn)}$": list(layer.replaced_rows) for fqn, layer in layers.items() if layer.spec.rows and not layer.spec.rows_of}
    return replace(config, trainable_token_indices=rows)


def peft_rows(root: nn.Module, layers: Mapping[str, LoRALayer], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return PEFT's field; nothing if the adapter has no rows.

    Raises:
        ValueError: PEFT, which compares ends of names, would take another module too.
    """
    rows = {fqn: list(layer.replaced_rows) for fqn, layer in layers.items() if layer.spec.rows and not layer.spec.rows_of}
    if len(rows) == 1 and hasattr(root, "get_input_embeddings") and [*rows] == [_input(root, modules)]:
        return {FIELD: next(iter(rows.values()))}
    for fqn in rows:
        if other := next((name for name in modules if name.endswith(fqn) and name != fqn), None):
            raise ValueError(f"{FIELD}: {fqn!r} cannot be saved in PEFT's format, which would take {other!r}, a name that ends in it, too.")
    return {FIELD: rows} if rows else {}


def _input(root: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    try:
        return input_embedding(root, modules)
    except ValueError:
        return None


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
