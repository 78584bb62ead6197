"""Check what a checkpoint says to Lightning, which trusts it: version, counts of the loops, states of optimizers and schedulers.

Lightning would raise a KeyError or a TypeError after the module has been changed, or continue from a count that is a text. A checkpoint of
another version of Lightning may count in other ways, which Lightning converts. In such a checkpoint the loops are not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from packaging.version import InvalidVersion, Version

from lightning_lora.strategies.lightning_private import progress_of

VERSION = "pytorch-lightning_version"
_LISTS = ("optimizer_states", "lr_schedulers")


def check_fields(checkpoint: Mapping[str, Any], trainer: Trainer, path: str) -> None:
    """Check the fields that Lightning reads, for what the trainer is about to do.

    Raises:
        ValueError: a field is missing or malformed. The message names it.
    """
    version = checkpoint.get(VERSION)
    try:
        Version(version if isinstance(version, str) else "")
    except InvalidVersion as error:
        raise ValueError(_wrong(path, VERSION, version)) from error
    if not isinstance(callbacks := checkpoint.get("callbacks", {}), dict):
        raise ValueError(_wrong(path, "callbacks", callbacks))
    if not isinstance(loops := checkpoint.get("loops", {}), dict):
        raise ValueError(_wrong(path, "loops", loops))
    for name, loop in loops.items():
        states = [value for key, value in loop.items() if str(key).endswith("state_dict")] if isinstance(loop, dict) else [loop]
        if not all(isinstance(each, dict) for each in states):
            raise ValueError(_wrong(path, f"loops[{name!r}]", loop))
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if version == L.__version__:
        _check_counts(loops.get("fit_loop"), progress_of(trainer.fit_loop), "loops['fit_loop']", path)
    for name in _LISTS:
        listed = checkpoint.get(name)
        if name not in checkpoint:
            raise ValueError(
                f"{path} has no {name}: it was saved with save_weights_only=True, and no training resumes from it. To start another one"
                " with its adapter, call load_adapter(model, path) and fit without ckpt_path."
            )
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            raise ValueError(_wrong(path, name, listed))


def _check_counts(saved: Any, here: Mapping[str, Any], name: str, path: str) -> None:
    """Check nested counts against those of a trainer."""
    if not isinstance(saved, dict):
        raise ValueError(_wrong(path, name, saved))
    for key, mine in here.items():
        value, inner = saved.get(key), f"{name}[{key!r}]"
        if isinstance(mine, dict):
            _check_counts(value, mine, inner, path)
        elif isinstance(mine, bool):
            if not isinstance(value, bool):
                raise ValueError(_wrong(path, inner, value))
        elif isinstance(mine, int) and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63):
            raise ValueError(_wrong(path, inner, value))


def _wrong(path: str, name: str, value: object) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    return f"{path}: {name} is {shown}, which Lightning does not write: the file was changed by hand, or is damaged."
