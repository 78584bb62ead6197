"""The callbacks that ``LoRACallback`` adds to its trainer."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_lora.callbacks.data_position import DataPosition
from lightning_lora.callbacks.interruption import Interruption
from lightning_lora.callbacks.random_numbers import RandomNumbers
from lightning_lora.callbacks.shown_values import ShownValues
from lightning_lora.strategies.namespaces import twins


def add_companions(trainer: Trainer, temporary: bool = False, tune_loop: bool = True) -> list[Callback]:
    """Add `Interruption`, `DataPosition`, `RandomNumbers` and `ShownValues` to a trainer that lacks them. Return all its callbacks.

    Args:
        trainer: at most one of each is added.
        temporary: remove them again after a run that ended well, so that the trainer has the user's callbacks only.
        tune_loop: add `ShownValues`.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for companion in (Interruption, DataPosition, RandomNumbers, *[ShownValues] * tune_loop):
        if not any(isinstance(callback, companion) for callback in callbacks):
            first_saver = next((n for n, callback in enumerate(callbacks) if isinstance(callback, twins(Checkpoint))), len(callbacks))
            callbacks.insert(first_saver, companion(temporary))  # Lightning runs those that save checkpoints last
    return callbacks
