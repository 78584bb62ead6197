"""Keep the state of random numbers in checkpoints, so that a resumed run draws the dropout that it would have drawn.

Lightning's checkpoints do not have it. Each process has its own: torch's on the CPU and on the GPU that it trains on, Python's and NumPy's.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.callbacks.companion import Companion
from lightning_lora.utils.messages import counted
from lightning_lora.utils.sharding import from_all_ranks

KEY = "lightning_lora_random_numbers"  # of a checkpoint: one state per process


class RandomNumbers(Companion):
    """Save the state of every process's random numbers, and restore it when a run resumes.

    In a run that resumes inside an epoch, it is restored before the first batch. At an epoch's end it is restored at once, so that the
    next epoch's loader shuffles as it would have. A run on another number of processes draws anew, and the log says so.

    ``LoRACallback`` adds this callback to its trainer.
    """

    def __init__(self, temporary: bool = False) -> None:
        super().__init__(temporary)
        self.loaded: dict[str, Any] | None = None  # what is restored before the first batch

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the states of all processes. Every process has to call it."""
        mine = random_states(trainer)
        checkpoint[KEY] = from_all_ranks(mine) if trainer.world_size > 1 else [mine]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the states for checkpoints that are written after the fit, when this callback is gone: a run may go on from them."""
        if (hooks := getattr(trainer.strategy, "_lora_hooks", None)) is not None:
            hooks.at_end = {}
            self.on_save_checkpoint(trainer, pl_module, hooks.at_end)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore this process's state, or keep it for the first batch.

        Raises:
            ValueError: the states are damaged.
        """
        states = checkpoint.get(KEY)
        if states is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
            raise ValueError(f"{trainer.ckpt_path}: its {KEY} is no list of states, so it is damaged; resume from another checkpoint.")
        if len(states) != trainer.world_size:
            rank_zero_info(
                f"Random numbers are drawn anew: the checkpoint has those of {counted(len(states), 'process')}, this run has"
                f" {trainer.world_size}."
            )
            return
        mine = states[trainer.global_rank]
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        if progress.get("is_last_batch"):
            restore_random_states(mine, trainer)
        else:
            self.loaded = mine

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Restore the state before the first batch of a run that resumed inside an epoch."""
        if self.loaded is not None:
            state, self.loaded = self.loaded, None
            restore_random_states(state, trainer)


def random_states(trainer: Trainer) -> dict[str, Any]:
    """Return this process's states, of plain types and tensors only."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = [name, keys.tolist(), *rest]
    device = trainer.strategy.root_device
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], trainer: Trainer) -> None:
    """Set what the states have.

    Raises:
        ValueError: they are damaged.
    """
    device = trainer.strategy.root_device
    try:
        torch.set_rng_state(states["torch"])
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))
        if "numpy" in states and (numpy := sys.modules.get("numpy")) is not None:
            name, keys, *rest = states["numpy"]
            numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
        if "cuda" in states and device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], device)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{trainer.ckpt_path}: its {KEY} are damaged ({reason}); resume from another checkpoint.") from error
