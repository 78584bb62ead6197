"""Which weights a command runs: what ``--ckpt_path`` names, else those of the run whose config is given, else the model as it was loaded.

``test --config runs/lora/version_0/config.yaml`` tests what that run has trained: its best checkpoint, or its adapter if it kept none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.adapter_io.files import CONFIG
from lightning_lora.storage.read_checkpoint import located, read_checkpoint
from lightning_lora.strategies.checkpoint_io import REST

SETTINGS, CHECKPOINTS = "config.yaml", "checkpoints"  # what a run leaves in its folder
WEIGHTS = ("--ckpt_path", "--lora.start_from")  # the options that name weights; `--ckpt_path null` names none


def take_weights_of_run(config: Namespace, command: str | None, words: Sequence[str]) -> None:
    """Set ``ckpt_path`` or ``lora.start_from`` to what the run has trained whose config a command line names, if it names no weights.

    Args:
        config: The command's configuration.
        command: The command; ``fit`` trains anew, but finds "last" and "best" in the run's folder.
        words: The command line.

    Raises:
        ValueError: The run's newest checkpoint cannot be read.
    """
    run, named = _run_of(words), config.get("ckpt_path")
    if run is None:
        return
    if named in FIND:
        config["ckpt_path"] = str(FIND[named](run / CHECKPOINTS) or named)
    if command in (None, "fit") or named is not None or any(word.partition("=")[0] in WEIGHTS for word in words):
        return
    adapters = sorted(path.parent for path in run.glob(f"adapter*/{CONFIG}"))
    if best := best_of(run / CHECKPOINTS):
        config["ckpt_path"] = str(best)
    elif len(adapters) == 1 and not config.get("full_finetuning"):
        config["lora"]["start_from"] = str(adapters[0])


def checkpoint_of(ckpt_path: str | None, command: str, trainer: Trainer, weights_only: bool | None) -> str | None:
    """Return the checkpoint that a command reads, once it can be read. Log which weights a command runs that trains none.

    Raises:
        ValueError: There is none; the message names the newest checkpoint that there is.
    """
    path = None if ckpt_path is None else _checked(ckpt_path, trainer, weights_only)
    if command != "fit":
        starts = [start for callback in trainer.callbacks if (start := getattr(callback, "start_from", None))]  # type: ignore[attr-defined]
        base = "the model as it was loaded, which no adapter has changed: neither --ckpt_path nor --lora.start_from names one"
        named = f"the checkpoint {path}" if path else f"the adapter {', '.join(starts)}" if starts else base
        rank_zero_info(f"Weights of this {command}: {named}.")
    return path


def _checked(ckpt_path: str, trainer: Trainer, weights_only: bool | None) -> str:
    """Return the path of a checkpoint that can be read."""
    if ckpt_path in FIND:
        return _found(ckpt_path, trainer)
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
            f"ckpt_path={ckpt_path!r} is an adapter folder; name a checkpoint (.ckpt), or give the folder to --lora.start_from"
        )
    if path.is_dir() and not (path / REST).is_file():
        raise ValueError(f"ckpt_path={ckpt_path!r} is a folder{_newest(path)}; name a checkpoint file (.ckpt)")
    if not path.exists():
        raise ValueError(f"ckpt_path={ckpt_path!r}: no such file{_newest(path.parent)}")
    if path.is_file() and not isinstance(content := read_checkpoint(path, weights_only), dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return ckpt_path


def best_of(folder: Path) -> Path | None:
    """Return the best checkpoint in a folder, by what the newest one says of its ``ModelCheckpoint``; the newest if it says nothing.

    Raises:
        ValueError: The newest one cannot be read.
    """
    found = _all(folder, "*.ckpt")
    if len(found) < 2:
        return found[0] if found else None
    newest = found[-1] / REST if found[-1].is_dir() else found[-1]
    content = read_checkpoint(newest)
    callbacks = content.get("callbacks") if isinstance(content, dict) else None
    states = [state for state in (callbacks if isinstance(callbacks, dict) else {}).values() if isinstance(state, dict)]
    states.sort(key=lambda state: state.get("monitor") is None)  # one that compares checkpoints counts before one that keeps the newest
    named = [folder / Path(str(state.get("best_model_path") or "")).name for state in states]
    return next((path for path in named if path in found), found[-1])


def last_of(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that is named as a run's last."""
    return next(reversed(_all(folder, "last*.ckpt")), None)


FIND = {"best": best_of, "last": last_of}


def _found(name: str, trainer: Trainer) -> str:
    """Return the checkpoint that "last" or "best" means. Lightning would find no "best" of another process, and start from nothing."""
    log_dir = Path(trainer.log_dir or trainer.default_root_dir)
    dirpaths = [getattr(saver, "dirpath", None) for saver in trainer.checkpoint_callbacks]
    folders = [Path(dirpath) for dirpath in dirpaths if dirpath] or [log_dir / CHECKPOINTS]
    found = [path for folder in folders if (path := FIND[name](folder))]
    if not found:
        nearby = _newest(log_dir.parent if trainer.loggers else folders[0])
        kind = "last*.ckpt" if name == "last" else "checkpoint"
        raise ValueError(f"ckpt_path={name!r}: there is no {kind} in {folders[0]}{nearby}; give the file, or the run's config")
    return str(max(found, key=lambda path: path.stat().st_mtime))


def _run_of(words: Sequence[str]) -> Path | None:
    """Return the folder of the run whose config a command line names."""
    folders = []
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        file = Path(value if equals else "".join(words[index + 1 : index + 2]))
        if option in ("--config", "-c") and file.name == SETTINGS and file.is_file():
            folders.append(file.parent)
    return folders[-1] if folders else None


def _all(folder: Path, pattern: str) -> list[Path]:
    """Return checkpoints, files and folders of shards, the newest last."""
    return sorted(folder.glob(pattern), key=lambda path: (path.stat().st_mtime_ns, path.name))


def _newest(folder: Path) -> str:
    found = sorted(folder.rglob("*.ckpt") if folder.is_dir() and folder != Path() else [], key=lambda path: path.stat().st_mtime)
    return f", the newest checkpoint nearby is {str(found[-1])!r}" if found else ""
