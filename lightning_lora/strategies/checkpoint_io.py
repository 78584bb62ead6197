"""Checkpoints on disk: one portable file, or a folder of shards, the same content either way.

A portable file is what Lightning writes, with every tensor whole and optimizer state by parameter name, so that it resumes
under any strategy and on any number of processes. A folder (torch's distributed checkpoint, DCP) holds the same tensors under
the same names, each rank writing its pieces; it is read whole, as adapters are small, and so resumes anywhere too.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor

from lightning_lora.utils.atomic_files import sync_folder, write_atomic
from lightning_lora.utils.sharding import on_first_rank

REST = "meta.pt"  # Lightning's name for what is no shard; written last, its presence says that the folder is complete


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's own, but a crash or a full disk in the middle of a save leaves the file that was there.

    The stock one stages in ``$TMPDIR`` and moves without syncing: with that on another filesystem, a kill in the middle
    leaves an empty file where a good checkpoint was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Stage beside the target, sync, rename; remote paths go Lightning's way."""
        if storage_options is not None or "local" not in str(getattr(get_filesystem(path), "protocol", "")):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        os.makedirs(path.parent, exist_ok=True)
        shards = (path / REST).is_file()  # a folder of them stands where the file is to be
        if shards:
            _remove(_staged(path))
        write_atomic(_staged(path) if shards else path, lambda file: torch.save(checkpoint, file))
        if shards:
            _swap(path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """To the CPU, said in a word: Lightning's default, a function, is refused for torchao's low-bit optimizer states."""
        return super().load_checkpoint(path, map_location, weights_only)


def write_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint as a folder of shards; every rank has to call it.

    Args:
        checkpoint: as for a portable file, but its tensors may be DTensors.
        path: replaced in one step if it is there.

    Raises:
        OSError: the first rank could not write; on every rank.
    """
    import torch.distributed.checkpoint as dcp

    tensors: dict[str, Tensor] = {}
    rest = _extract_tensors({name: checkpoint[name] for name in ("state_dict", "optimizer_states") if name in checkpoint}, "", tensors)
    staged = _staged(path)

    def begin() -> None:
        _remove(staged)
        staged.mkdir(parents=True)

    def finish() -> None:
        write_atomic(staged / REST, lambda file: torch.save({**checkpoint, **rest}, file))
        _swap(path)

    on_first_rank(begin)
    dcp.save(tensors, checkpoint_id=staged)
    on_first_rank(finish)


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _swap(path: Path) -> None:
    """Put what is staged in the target's place, whichever of them is a folder; after a kill between the two renames the old one is there
    beside it, until the next save is whole."""
    old = path.with_name(f".{path.name}.old")
    if os.path.lexists(path):  # else such a kill left the last checkpoint at old
        _remove(old)
        os.replace(path, old)
    os.replace(_staged(path), path)
    sync_folder(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_folder(path: Path) -> dict[str, Any]:
    """A folder of shards as the dictionary that a portable file would be, all tensors whole and on the CPU."""
    import torch.distributed.checkpoint as dcp

    known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    shapes = {name: meta for name, meta in known.items() if isinstance(meta, dcp.metadata.TensorStorageMetadata)}
    tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # as meant: each rank reads it all
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    checkpoint = torch.load(path / REST, map_location="cpu", weights_only=True)
    parts = ("state_dict", "optimizer_states")
    return {name: _put_tensors(value, name, tensors) if name in parts else value for name, value in checkpoint.items()}


def _extract_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """A copy of a nest of dicts and lists without its tensors, which go into ``tensors`` under their paths."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return None
    if isinstance(value, dict):
        return {name: _extract_tensors(item, f"{key}/{name}" if key else name, tensors) for name, item in value.items()}
    if isinstance(value, list):
        return [_extract_tensors(item, f"{key}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _put_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`_extract_tensors`."""
    if key in tensors:
        return tensors[key]
    if isinstance(value, dict):
        return {name: _put_tensors(item, f"{key}/{name}", tensors) for name, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, f"{key}/{index}", tensors) for index, item in enumerate(value)]
    return value
