"""Checkpoints on disk: one portable file, or a folder of shards, with the same content.

A portable file is what Lightning writes, but with full tensors and optimizer state by parameter name. So it resumes under any strategy
and on any number of processes. A folder (torch's distributed checkpoint, DCP) holds the same tensors under the same names; each rank
writes its shards. Every rank reads the full folder, since adapters are small, so it resumes under any strategy too.
"""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from torch import Tensor

from lightning_lora.adapter_io.checkpoint_file import UNREADABLE, why_unreadable
from lightning_lora.utils.atomic_files import sync_folder, write_atomic
from lightning_lora.utils.sharding import on_first_rank

REST = "meta.pt"  # Lightning's name for the file of what is not in the shards; written last: a folder that has it is complete


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's ``TorchCheckpointIO``, but a crash or a full disk during a save leaves the earlier file intact.

    Lightning's own stages in ``$TMPDIR`` and moves the file without syncing it. If ``$TMPDIR`` is on another filesystem, a kill during
    the move leaves an empty file in place of a good checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary file beside the target, sync it, rename it. Remote paths are left to Lightning."""
        if storage_options is not None or "local" not in str(getattr(get_filesystem(path), "protocol", "")):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        os.makedirs(path.parent, exist_ok=True)
        shards = (path / REST).is_file()  # a folder of shards has the target's name
        if shards:
            _remove(_staged(path))
        try:
            write_atomic(_staged(path) if shards else path, lambda file: torch.save(checkpoint, file))
        except OSError as error:
            error.filename = error.filename or str(path)  # a full disk does not say where
            raise
        if shards:
            _swap(path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load to the CPU, given as a string: torchao's low-bit optimizer states refuse a function, which is Lightning's default.

        Raises:
            ValueError: the file is no checkpoint, or it is damaged.
        """
        if Path(path).is_dir():
            raise ValueError(f"ckpt_path={str(path)!r} is a folder, no checkpoint; an adapter's is read by load_adapter.")
        try:
            checkpoint = super().load_checkpoint(path, map_location, weights_only)
        except (OSError, *UNREADABLE) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which reading behind the end of a file that was cut gives
                raise
            raise ValueError(why_unreadable(path, error)) from error
        if not isinstance(checkpoint, dict):
            raise ValueError(f"{path} was not written under LoRACallback: it holds a {type(checkpoint).__name__}, no checkpoint.")
        return checkpoint


def write_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint as a folder of shards. Every rank has to call it.

    Args:
        checkpoint: as for a portable file, but its tensors may be DTensors.
        path: the folder; an existing one is replaced at the end.

    Raises:
        OSError: the first rank could not write. It is raised on every rank.
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
    """Replace the target, a file or a folder, with the staged one.

    After a kill between the two renames, the old checkpoint is beside the target under its ``.old`` name, until the next save is complete.
    """
    old = path.with_name(f".{path.name}.old")
    if os.path.lexists(path):  # else such a kill left the last checkpoint at `old`
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
    """Read a folder of shards into the dictionary of a portable file, with full tensors on the CPU."""
    import torch.distributed.checkpoint as dcp

    known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    shapes = {name: meta for name, meta in known.items() if isinstance(meta, dcp.metadata.TensorStorageMetadata)}
    tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # intended: each rank reads it all
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    checkpoint = torch.load(path / REST, map_location="cpu", weights_only=True)
    parts = ("state_dict", "optimizer_states")
    return {name: _put_tensors(value, name, tensors) if name in parts else value for name, value in checkpoint.items()}


def _extract_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Copy nested dicts and lists without their tensors, and add those to ``tensors`` by their paths."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return None
    if isinstance(value, dict):
        return {name: _extract_tensors(item, f"{key}/{name}" if key else name, tensors) for name, item in value.items()}
    if isinstance(value, list):
        return [_extract_tensors(item, f"{key}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _put_tensors(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Undo :func:`_extract_tensors`: return a copy with the tensors in their places."""
    if key in tensors:
        return tensors[key]
    if isinstance(value, dict):
        return {name: _put_tensors(item, f"{key}/{name}", tensors) for name, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, f"{key}/{index}", tensors) for index, item in enumerate(value)]
    return value
