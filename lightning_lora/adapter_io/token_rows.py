"""Rows of embeddings in adapter files (``trainable_token_indices``), in PEFT's layout: their values, and a field that says which rows.

PEFT writes the rows of an embedding once; modules that are tied to it follow when the file is read, there as here. Source: PEFT 0.21,
``TrainableTokensWrapper`` and ``_set_trainable``.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.base import LoRALayer
from lightning_lora.model.token_rows import FIELD, input_embedding
from lightning_lora.utils.patterns import exactly
from lightning_lora.utils.sharding import full_tensor

ROWS = "lora_rows"  # the parameter's name in the layer


def rows_of_file(
    tensors: Mapping[str, Tensor], fields: Mapping[str, Any], root: nn.Module, modules: Mapping[str, nn.Module], where: str
) -> tuple[dict[str, Tensor], Sequence[int] | dict[str, Sequence[int]] | None]:
    """Return the tensors of a file that PEFT wrote, and the ``trainable_token_indices`` that mean on this model what the file means.

    A tied module's copy of the rows is left out. In a whole weight beside the rows, this model's own stand in their place: they have no
    effect, so they are not compared.

    Args:
        tensors: of the file, by the names of this model.
        fields: PEFT's JSON.
        root: the model.
        modules: name → module of it.
        where: the file's path, for messages.

    Raises:
        ValueError: rows and indices do not belong together, or PEFT computes something else with them.
    """
    said = fields.get(FIELD)
    owners = [name.removesuffix(f".{ROWS}") for name in tensors if name.endswith(f".{ROWS}")]
    if said and not owners:
        raise ValueError(f"{where}: {FIELD}={said!r}, and the tensors beside it have no rows for them ({ROWS}).")
    tensors, found = dict(tensors), dict[str, Sequence[int]]()
    for owner in sorted(owners, key=lambda name: not isinstance(modules.get(name), nn.Embedding)):
        rows, weight = tensors[f"{owner}.{ROWS}"], _weight(modules, owner)
        source = next((name for name in found if weight is not None and _weight(modules, name) is weight), None)
        indices = _indices(said, owner) or (found[source] if source is not None else None)
        if indices is None or len(indices) != len(rows):
            raise ValueError(f"{where}: {FIELD}={said!r} does not say which {len(rows)} rows of {owner!r} the file has.")
        whole = tensors.get(f"{owner}.weight")
        if whole is not None and weight is not None and whole.shape == weight.shape and max(indices) < len(whole):
            index = torch.tensor(indices)
            own = full_tensor(weight.detach()).cpu()[index]
            tensors[f"{owner}.weight"] = whole.index_copy(0, index, own.to(whole.dtype))
        if source is not None and found[source] == indices and torch.equal(rows, tensors[f"{source}.{ROWS}"]):
            del tensors[f"{owner}.{ROWS}"]
        else:
            found[owner] = list(indices)
    if biased := _biased(modules, found):
        raise ValueError(
            f"{where}: {FIELD} has rows of {biased!r}, which has a bias here. PEFT 0.21 leaves that out where it has rows, so the adapter"
            " is for a model without it."
        )
    if isinstance(said, list) and found and [*found] == [_input(root, modules)]:
        return tensors, tuple(said)
    return tensors, {exactly(owner): indices for owner, indices in found.items()} or None


def rows_of_layers(config: LoRAConfig, layers: Mapping[str, LoRALayer]) -> LoRAConfig:
    """Return the config with the names that its rows have in the adapter's root, from which a file is read."""
    if not isinstance(config.trainable_token_indices, Mapping):
        return config
    return replace(config, trainable_token_indices={exactly(fqn): rows for fqn, rows in _own_rows(layers).items()})


def peft_rows(root: nn.Module, layers: Mapping[str, LoRALayer], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return PEFT's field; nothing if the adapter has no rows.

    Raises:
        ValueError: PEFT, which compares ends of names, would take another module too.
    """
    rows = _own_rows(layers)
    tied = [fqn for fqn, layer in layers.items() if layer.spec.rows_of]
    odd = None
    if biased := _biased(modules, rows):
        odd = f"leaves out the bias of {biased!r} where it has rows of its own"
    elif tied and not getattr(getattr(root, "config", None), "tie_word_embeddings", False):
        odd = f"lets {tied[0]!r} follow the rows only if the model's config says tie_word_embeddings"
    if odd:
        warnings.warn(f"PEFT 0.21 {odd} ({FIELD}): load_adapter reads this folder, PEFT computes something else with it.", stacklevel=4)
    for fqn in rows:
        if other := next((name for name in modules if name.endswith(fqn) and name != fqn), None):
            raise ValueError(f"{FIELD}: {fqn!r} cannot be saved in PEFT's format, which would take {other!r}, a name that ends in it, too.")
    if [*rows] == [_input(root, modules)] and hasattr(root, "get_input_embeddings"):
        return {FIELD: next(iter(rows.values()))}
    return {FIELD: rows} if rows else {}


def _own_rows(layers: Mapping[str, LoRALayer]) -> dict[str, list[int]]:
    """Return FQN → rows of the layers that have some, without those that are tied to one of them."""
    return {fqn: list(layer.replaced_rows) for fqn, layer in layers.items() if layer.replaced_rows and not layer.spec.rows_of}


def _weight(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    return getattr(modules.get(name), "weight", None)


def _biased(modules: Mapping[str, nn.Module], owners: Collection[str]) -> str | None:
    """Return the first module with a bias that has one of these modules' weights."""
    weights = {id(weight) for name in owners if (weight := _weight(modules, name)) is not None}
    users = [fqn for fqn in modules if id(_weight(modules, fqn)) in weights]
    return next((fqn for fqn in users if modules[fqn]._parameters.get("bias") is not None), None)


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
