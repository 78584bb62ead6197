"""The base of callbacks that ``LoRACallback`` adds to its trainer for the time of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Companion(Callback):
    """A callback that removes itself after a run, so that the trainer then has the user's callbacks only.

    Copies and pickles hold nothing that belongs to a run.

    Args:
        temporary: remove it after a run that ended well.
    """

    def __init__(self, temporary: bool = False) -> None:
        self.temporary = temporary

    def __getstate__(self) -> dict[str, Any]:
        return vars(type(self)(self.temporary))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove it. Lightning is iterating over the old list, so a new one is made."""
        if self.temporary:
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
