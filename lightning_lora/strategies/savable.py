"""Check before the first step that the checkpoints of a run can be written.

The folders of all checkpoint callbacks on this machine are tried, with at least the space that one checkpoint takes. A checkpoint that is
left under its ``.old`` name, after a kill between two renames, gets its own name back. Lock files of killed processes are removed: a run
that was killed in its last save writes no other checkpoint when it resumes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_lora.storage.file_locks import remove_unheld
from lightning_lora.storage.folders import put_back
from lightning_lora.storage.room import check_room
from lightning_lora.utils.names import persistent_buffers
from lightning_lora.utils.sharding import on_first_rank


def check_savable(trainer: Trainer, module: LightningModule) -> None:
    """Check the folders of the checkpoint callbacks. Every rank has to call it.

    Raises:
        ValueError: a folder cannot be written to, or has no room for one checkpoint. It is raised on every rank.
    """
    on_first_rank(lambda: _check(trainer, module))


def _check(trainer: Trainer, module: LightningModule) -> None:
    for callback in trainer.checkpoint_callbacks if not trainer.fast_dev_run else ():  # type: ignore[attr-defined]
        folder = getattr(callback, "dirpath", None)
        if folder is None or "://" in str(folder):  # none, or a remote storage
            continue
        check_room(folder, least_bytes(module, [] if getattr(callback, "save_weights_only", False) else trainer.optimizers), "dirpath")
        for lock in Path(folder).glob(".*.ckpt.lock"):
            remove_unheld(lock)
        for old in Path(folder).glob(".*.ckpt.old"):
            path = old.with_name(old.name[1:].removesuffix(".old"))
            if not os.path.lexists(path):
                put_back(path)
                rank_zero_warn(f"{path} had been renamed by a save that was killed. It has its name again: resume with ckpt_path=.")


def least_bytes(module: LightningModule, optimizers: list[Optimizer]) -> int:
    """Return the least size of a checkpoint in bytes: what trains, the buffers, and the moments of torch's own optimizers."""
    tensors = [p for p in module.parameters() if p.requires_grad] + list(persistent_buffers(module).values())
    trained: list[Any] = [
        (p.numel() * p.element_size(), _moments(group))
        for optimizer in optimizers
        if type(optimizer).__module__.startswith("torch.optim.")
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return sum(t.numel() * t.element_size() for t in tensors) + sum(size * moments for size, moments in trained)


def _moments(group: dict[str, Any]) -> int:
    """Return the least number of values per parameter in the state of a group."""
    return 2 if "betas" in group else int(bool(group.get("momentum")))
