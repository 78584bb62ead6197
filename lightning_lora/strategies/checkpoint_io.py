"""Checkpoints on disk: one portable file, or a folder of shards, with the same content.

A portable file is what Lightning writes, but with full tensors and optimizer state by parameter name. So it resumes under any strategy
and on any number of processes. A folder (torch's distributed checkpoint, DCP) holds the same tensors under the same names; each rank
writes its shards. Every rank reads the full folder, since adapters are small, so it resumes under any strategy too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_lora.storage.atomic_files import hidden, write_atomic
from lightning_lora.storage.file_locks import exclusive, lock_file
from lightning_lora.storage.folders import aside, erase, put_back, remove, standing, swap
from lightning_lora.storage.read_checkpoint import located, read_checkpoint, readable
from lightning_lora.storage.sharded_checkpoint import PARTS, REST, read_folder
from lightning_lora.strategies.namespaces import twins
from lightning_lora.utils.sharding import on_first_rank, summed


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's ``TorchCheckpointIO``, but a crash or a full disk during a save leaves the earlier checkpoint whole.

    For any Trainer, with or without LoRA: ``Trainer(plugins=[DurableCheckpointIO()])``, or ``AsyncCheckpointIO(DurableCheckpointIO())``.
    :class:`~lightning_lora.LoRACallback` uses it in place of Lightning's own.

    Lightning's own stages in ``$TMPDIR`` and moves the file without syncing it. If ``$TMPDIR`` is on another filesystem, a kill during
    the move leaves an empty file in place of a good checkpoint. Here the file is staged beside its target, synced and renamed.

    Raises:
        OSError: the disk is full, or the folder cannot be written to. What was there is unchanged.

    Examples:
        >>> trainer = L.Trainer(max_epochs=1, plugins=[DurableCheckpointIO()])
        >>> trainer.fit(MyModule())
        >>> trainer.save_checkpoint("last.ckpt")
    """

    def __init__(self) -> None:
        super().__init__()
        for base in twins(CheckpointIO)[1:]:  # type: ignore[type-abstract]
            base.register(type(self))  # a Trainer of pytorch_lightning then takes it as a plugin

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary file beside the target, sync it, rename it. Remote paths are left to Lightning."""
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        with _naming(path):
            os.makedirs(path.parent, exist_ok=True)
            self._write(checkpoint, path)

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        if not (standing(path) / REST).is_file():
            write_atomic(path, lambda file: torch.save(checkpoint, file))
            return
        with exclusive(lock_file(path)):  # a folder of shards has the target's name
            put_back(path)
            erase(_staged(path))
            write_atomic(_staged(path), lambda file: torch.save(checkpoint, file))
            swap(_staged(path), path)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file, or a folder of shards: a kill leaves the folder whole, or without its name. Remote paths are left to Lightning."""
        if _is_local(path):
            remove(Path(path))
        else:
            super().remove_checkpoint(path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load to the CPU, given as a string: torchao's low-bit optimizer states refuse a function, which is Lightning's default.

        Raises:
            ValueError: as :func:`~lightning_lora.storage.read_checkpoint.read_checkpoint`, and for a file in a storage likewise.
        """
        path, weights_only = located(path, weights_only)
        if _is_local(path):
            return read_checkpoint(path, weights_only)
        with readable(path):
            return super().load_checkpoint(path, map_location, weights_only)


def _is_local(path: Any) -> bool:
    return "local" in str(getattr(get_filesystem(path), "protocol", ""))


def write_folder(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint as a folder of shards. Every rank has to call it.

    Args:
        checkpoint: as for a portable file, but its tensors may be DTensors.
        path: the folder; an existing one is replaced at the end.

    Raises:
        OSError: a rank could not write. It is raised on every rank. What was there is unchanged.
    """
    tensors: dict[str, Tensor] = {}
    rest = _extract_tensors({name: checkpoint[name] for name in PARTS if name in checkpoint}, "", tensors)
    staged, held = _staged(path), ExitStack()

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(exclusive(lock_file(path)))
        put_back(path)
        erase(staged)
        held.callback(erase, staged)
        staged.mkdir()

    def finish() -> None:
        write_atomic(staged / REST, lambda file: torch.save({**checkpoint, **rest}, file))
        swap(staged, path)

    with _naming(path), held:
        on_first_rank(begin)
        # A momentum that began as a gradient may be a sum over the ranks, of which torch would save the first rank's part.
        _write_shards({name: summed(tensor) for name, tensor in tensors.items()}, staged)
        on_first_rank(finish)


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(tensors, checkpoint_id=folder)
    except dcp.CheckpointException as error:  # its text is a traceback per rank
        rank, (cause, _) = min(error.failures.items())
        full = cause if isinstance(cause, OSError) else hidden(cause)
        if full is not None:
            raise OSError(full.errno, f"{full.strerror} (rank {rank})", full.filename) from error
        raise RuntimeError(f"{folder}: rank {rank} could not write its shards: {type(cause).__name__}: {cause}") from error


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError without one, such as that of a full disk, inside the ``with`` block."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else its text is all that it has, which a filename would replace
            error.filename = error.filename or str(path)
        raise


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def found(path: str) -> str:
    """Return the path of a checkpoint. After a kill between two renames, return the path that it was moved to."""
    return path if standing(Path(path)) == Path(path) else str(aside(Path(path)))


def read(io: CheckpointIO, path: Any, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a checkpoint, file or folder.

    Args:
        io: reads a file. Lightning's own gets ``weights_only=True`` where the user said nothing.
        path: a file or a folder on this machine, or a file in a storage such as ``s3://``.
        weights_only: as the user passed it to ``fit``. False lets a file on this machine run code.

    Raises:
        ValueError: the path is a URL, or nothing that can be read is there, or it holds more than tensors and plain values.
    """
    path, weights_only = located(path, weights_only)
    if not weights_only:
        rank_zero_info(f"{path} is read with weights_only=False, as you asked: what is in it can run any code.")
    if os.path.isfile(os.path.join(path, REST)):
        return read_folder(Path(path), weights_only)
    if os.path.isdir(path) or path.endswith(".safetensors"):
        raise ValueError(f"{path} is no checkpoint. An adapter folder is loaded by load_adapter(model, folder), before fit.")
    checkpoint = io.load_checkpoint(path, weights_only=weights_only)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} was not written under LoRACallback: it holds a {type(checkpoint).__name__}.")
    return checkpoint


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
