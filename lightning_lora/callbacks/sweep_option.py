"""What ``LoRACallback(sweep=...)`` takes. What trains the trials stands above this folder, in :mod:`lightning_lora.trials`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer


class Sweep(ABC):
    """Several adapters that one ``fit`` trains: :class:`~lightning_lora.Trials`."""

    @abstractmethod
    def begin(self, callback: Any, trainer: Trainer, module: LightningModule) -> None:
        """Take over from a ``LoRACallback`` in its ``setup``, for the time of the run.

        Args:
            callback: the user's; each trial's is a copy of it.
            trainer: of the run.
            module: the user's module.

        Raises:
            ValueError: the run cannot train several adapters; nothing is changed then.
        """
