"""Check what ``--ckpt_path`` names, before anything is written."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.adapter_io.files import CONFIG
from lightning_lora.storage.read_checkpoint import located, read_checkpoint
from lightning_lora.strategies.checkpoint_io import REST


def checkpoint_of(ckpt_path: str | None, command: str, trainer: Trainer, weights_only: bool | None) -> str | None:
    """Return ``ckpt_path``, or "last", once there is a checkpoint that can be read.

    Raises:
        ValueError: There is none; the message names the newest checkpoint that there is.
    """
    if ckpt_path is None:
        if command != "fit" and not any(getattr(callback, "start_from", None) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_info(f"No --ckpt_path: {command} runs the model as it was loaded, which no adapter has changed.")
        return None
    if ckpt_path in ("last", "best"):
        return _named(ckpt_path, trainer)
    if not ckpt_path:
        raise ValueError("ckpt_path='' is empty; name a checkpoint file (.ckpt)")
    if ckpt_path == "hpc" or ckpt_path.startswith("registry"):
        return ckpt_path  # Lightning's own values, for clusters and for its registry
    located(ckpt_path, weights_only)
    if "://" in ckpt_path:
        return ckpt_path  # in a remote storage of the user's, from where it is read only once
    path = Path(ckpt_path)
    if (path / CONFIG).is_file():
        raise ValueError(
            f"ckpt_path={ckpt_path!r} is an adapter folder; name a checkpoint (.ckpt), or give the folder to generate or merge"
        )
    if path.is_dir() and not (path / REST).is_file():
        raise ValueError(f"ckpt_path={ckpt_path!r} is a folder{_newest(path)}; name a checkpoint file (.ckpt)")
    if not path.exists():
        raise ValueError(f"ckpt_path={ckpt_path!r}: no such file{_newest(path.parent)}")
    if path.is_file() and not isinstance(content := read_checkpoint(path, weights_only), dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return ckpt_path


def _named(name: str, trainer: Trainer) -> str:
    """Check that Lightning will find a checkpoint by this name. Otherwise it would start from nothing."""
    log_dir = Path(trainer.log_dir or trainer.default_root_dir)
    dirpaths = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
    folders = [Path(dirpath) for dirpath in dirpaths if dirpath] or [log_dir / "checkpoints"]
    if name == "last" and any(found for folder in folders for found in folder.glob("last*.ckpt")):
        return name
    nearby = _newest(log_dir.parent if trainer.loggers else folders[0])
    if name == "best":
        raise ValueError(f"ckpt_path='best': only the process that trained knows which is best{nearby}; give the file")
    raise ValueError(f"ckpt_path='last': there is no last*.ckpt in {folders[0]}{nearby}; give the file")


def _newest(folder: Path) -> str:
    found = sorted(folder.rglob("*.ckpt") if folder.is_dir() and folder != Path() else [], key=lambda path: path.stat().st_mtime)
    return f", the newest checkpoint nearby is {str(found[-1])!r}" if found else ""
