"""Write named tensors as safetensors: one file, or numbered files and an index. Only one file's tensors are in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lightning_lora.storage.atomic_files import write_atomic

INDEX = "model.safetensors.index.json"


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """Write tensors with the file names of Hugging Face models.

    Args:
        folder: an existing folder.
        tensors: name and tensor, in the order of the files; each is copied to the CPU when it is reached.
        limit: largest size of a file in bytes. A tensor that would exceed it begins the next file.
    """
    names: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        data = safetensors.torch.save(pending, {"format": "pt"})
        write_atomic(folder / _staged(len(names)), data)
        names.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > limit:
            write()
        pending[name] = tensor.detach().cpu().contiguous().clone()
        total += tensor.nbytes
    write()
    if len(names) == 1:
        (folder / _staged(0)).rename(folder / "model.safetensors")
        return
    files = [f"model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number in range(len(names))]
    for number, file in enumerate(files):
        (folder / _staged(number)).rename(folder / file)
    places = {name: file for file, inside in zip(files, names, strict=True) for name in inside}
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": places}
    write_atomic(folder / INDEX, json.dumps(index, indent=2).encode())


def _staged(number: int) -> str:
    return f".model-{number:05d}.part"
