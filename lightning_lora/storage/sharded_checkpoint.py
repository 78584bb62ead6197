"""Read a checkpoint that is a folder of shards into the dictionary of a portable file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.storage.read_checkpoint import read_checkpoint
from lightning_lora.storage.read_shards import read_shards
from lightning_lora.utils.messages import counted

REST = "meta.pt"  # Lightning's name for the file of what is not in the shards; written last: a folder that has it is complete
PARTS = ("state_dict", "optimizer_states")  # what the shards hold the tensors of


def read_folder(path: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a folder of shards into the dictionary of a portable file, with full tensors on the CPU.

    Args:
        path: the folder.
        weights_only: of what is not in the shards; see :func:`~lightning_lora.storage.read_checkpoint.read_checkpoint`.

    Raises:
        ValueError: a file in it is missing or damaged, or holds more than tensors and plain values.
    """
    checkpoint, tensors = read_checkpoint(path / REST, weights_only), read_shards(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} was not written under LoRACallback: {REST} holds a {type(checkpoint).__name__}.")
    used = set[str]()
    content = {name: _put_tensors(value, name, tensors, used) if name in PARTS else value for name, value in checkpoint.items()}
    if unused := sorted(tensors.keys() - used):
        raise ValueError(
            f"{path}: {REST} has no place for {counted(len(unused), 'tensor')} of the shards, such as {unused[0]!r}: it is damaged."
        )
    return content


def _put_tensors(value: Any, key: str, tensors: dict[str, Tensor], used: set[str]) -> Any:
    """Return a copy of nested dicts and lists with the tensors in their places, named by their paths, and note which are used."""
    if key in tensors and value is None:
        used.add(key)
        return tensors[key]
    if isinstance(value, dict):
        return {name: _put_tensors(item, f"{key}/{name}", tensors, used) for name, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, f"{key}/{index}", tensors, used) for index, item in enumerate(value)]
    return value
