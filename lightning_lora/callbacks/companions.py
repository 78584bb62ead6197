"""The callbacks that ``LoRACallback`` adds to its trainer."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from lightning_lora.callbacks.data_position import DataPosition
from lightning_lora.callbacks.interruption import Interruption


def add_companions(trainer: Trainer) -> list[Callback]:
    """Add `Interruption` and `DataPosition` to a trainer that lacks them. Return all its callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for companion in (Interruption, DataPosition):
        if not any(isinstance(callback, companion) for callback in callbacks):
            callbacks.append(companion())
    return callbacks
