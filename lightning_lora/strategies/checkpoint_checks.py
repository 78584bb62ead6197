"""Check what a checkpoint says and holds before anything of it is loaded, as ``load_adapter`` does for its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_lora.adapter_io.metadata import META, began_with, understood
from lightning_lora.optim.state import holds_nan
from lightning_lora.storage.sharded_checkpoint import PARTS
from lightning_lora.strategies.adapted_part import AdaptedPart, parts_in
from lightning_lora.utils.messages import counted
from lightning_lora.utils.sharding import is_sharded
from lightning_lora.utils.values import kind_of_numbers, nonfinite


def check_parts(checkpoint: Mapping[str, Any], parts: Mapping[str, AdaptedPart], path: str) -> dict[str, dict[str, Any]]:
    """Return root here → what the checkpoint says of the adapter there.

    Raises:
        ValueError: it is no adapter checkpoint, of a newer format or malformed, or was made with another config.
    """
    meta, tensors = checkpoint.get(META), checkpoint.get("state_dict")
    if meta is None:
        raise ValueError(
            f"{path} was not written under LoRACallback. To start from a full checkpoint load it into the module before fit; to test"
            " it leave LoRACallback out."
        )
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path}: its state_dict is no mapping from names to tensors.")
    others = meta.get("others") if isinstance(meta, dict) else None
    for said in (meta, *(others if isinstance(others, list) else ())):
        understood(said, path)
    metas = parts_in(meta, parts, path)
    for root, said in metas.items():
        part, config = parts[root], understood(said, path)[0]
        if part.before_load is not None:
            part.before_load(config)
        began = began_with(said, config)
        changed = config.differences(part.config) and (part.began or began != config)  # the ranks, in the checkpoint's run or in this one
        if changed and part.take_ranks is not None and not began.differences(part.began or part.config):
            part.take_ranks(config)
        different = config.differences(part.config)
        if different:
            raise ValueError(f"{path} was made with another LoRA config (its value != yours): {'; '.join(different)}.")
    return metas


def check_values(checkpoint: Mapping[str, Any], path: str, fitting: bool) -> None:
    """Refuse NaN and infinity in what trained, and NaN in optimizer state. Buffers may hold them, as masks do.

    Args:
        checkpoint: its content.
        path: for messages.
        fitting: a training resumes from it, so its optimizer state is used.

    Raises:
        ValueError: a tensor holds them. The message names the first one, and the option that allows them.
    """
    tensors, beside = checkpoint["state_dict"], checkpoint[META].get("beside", ())
    held = {name: value for name, value in tensors.items() if isinstance(value, Tensor) and name not in beside}
    bad = nonfinite({name: value for name, value in held.items() if value.layout == torch.strided and not value.is_meta})
    what = f"{bad[0]} holds NaN or infinity ({counted(len(bad), 'tensor', 'do')})" if bad else None
    if not bad and fitting and (names := nan_states(checkpoint)):
        what = f"the optimizer state of {names[0]} holds NaN (that of {counted(len(names), 'parameter')} does)"
    if what is not None:
        raise ValueError(
            f"{path}: {what}, so a training from there cannot recover: take an earlier"
            " checkpoint, or pass LoRACallback(allow_nonfinite=True) to go on anyway."
        )


def check_whole(checkpoint: Mapping[str, Any]) -> None:
    """Refuse shards in what callbacks, loops and the module's own hooks put into a checkpoint: only the first process's would be written.

    Raises:
        ValueError: there is one. The message says where.
    """
    for part in checkpoint.keys() - PARTS:
        where = next(_sharded(checkpoint[part], str(part)), None)
        if where is not None:
            raise ValueError(
                f"{where} is sharded, and the checkpoint would hold the first process's piece of it alone: give value.full_tensor() in"
                ' state_dict or on_save_checkpoint. "Averages of adapters" in docs/callback.md does.'
            )


def _sharded(value: Any, where: str) -> Iterator[str]:
    """Yield where in a value that may be nested there are sharded tensors."""
    if isinstance(value, Tensor):
        if is_sharded(value):
            yield where
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _sharded(each, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _sharded(each, f"{where}[{index}]")


def nan_states(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the names of the parameters for which a checkpoint has optimizer state with NaN."""
    return [name for state in checkpoint.get("optimizer_states", ()) for name in holds_nan(state)]


def check_fits(saved: Mapping[str, Any], shapes: Mapping[str, torch.Size], places: Mapping[str, Tensor]) -> None:
    """Check values against the parameters and buffers that they are for.

    Args:
        saved: name → value in the checkpoint.
        shapes: name → full shape here.
        places: name → parameter or buffer here, or a shard of it.

    Raises:
        ValueError: a value is no tensor, has another shape or numbers of another kind, or two values are for one parameter and differ.
    """
    owners: dict[int, str] = {}
    for name in sorted(saved.keys() & shapes.keys()):
        value, place = saved[name], places.get(name)
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is of type {type(value).__name__} in the checkpoint, not a tensor.")
        if value.shape != shapes[name]:
            raise ValueError(f"{name} has shape {tuple(value.shape)} in the checkpoint, {tuple(shapes[name])} here.")
        if place is None:
            continue
        if value.layout != place.layout or value.is_meta:
            how = "on the meta device, without values" if value.is_meta else f"stored as {value.layout}"
            raise ValueError(f"{name} is {how} in the checkpoint, {place.layout} here.")
        mine, theirs = kind_of_numbers(place.dtype), kind_of_numbers(value.dtype)
        if mine != theirs:
            raise ValueError(f"{name} has {theirs} numbers ({value.dtype}) in the checkpoint, {mine} ones ({place.dtype}) here.")
        other = owners.setdefault(id(place), name)
        if other != name and not _same(value, saved[other]):
            first, second = sorted((name, other))
            raise ValueError(f"{first} and {second} are one parameter here, and the checkpoint has two values for it.")


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Add the checkpoint's path to a ValueError that lacks it, inside the ``with`` block."""
    try:
        yield
    except ValueError as error:
        if path is None or str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.equal(other)
