"""Begin a run on several processes: check that their settings are equal, and make them watch each other's errors."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_lora.config import LoRAConfig
from lightning_lora.strategies import RollCall, check_same_settings
from lightning_lora.strategies.lightning_private import collective_timeout
from lightning_lora.utils.sharding import is_distributed


def begin_together(config: LoRAConfig, attributes: dict[str, Any], first: bool, trainer: Trainer) -> RollCall | None:
    """Compare a callback's settings between the processes. Every process has to call it.

    Args:
        config: the callback's config.
        attributes: the callback's attributes; public ones of plain types are settings.
        first: True for the first callback of a trainer. It starts the roll call, one per run.
        trainer: the trainer.

    Returns:
        The roll call; None for other callbacks, and for a run on one process.

    Raises:
        ValueError: a process has other settings. It is raised on all.
    """
    if not is_distributed():
        return None
    loop = trainer.fit_loop.epoch_loop

    def position() -> list[int]:
        return [trainer.current_epoch, loop.batch_progress.total.ready, loop.val_loop.batch_progress.total.ready]

    roll_call = RollCall(position, collective_timeout(trainer.strategy)) if first else None
    plain = {name: value for name, value in attributes.items() if value is None or isinstance(value, (str, int, float))}
    check_same_settings(config.to_dict() | {name: value for name, value in plain.items() if not name.startswith("_")})
    return roll_call
