"""The learning rate of a ready-made task: the number that the user gave, or one that is advised for ``auto``."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.callbacks import LoRACallback
from lightning_lora.optim.advice import Rate, advise_learning_rate


def learning_rate_of(task: LightningModule) -> float:
    """Return a task's learning rate. For ``learning_rate="auto"`` log the advised one with its reason.

    Args:
        task: its hyperparameters have ``learning_rate``; it is attached to a trainer, whose callbacks and number of steps count.
    """
    given = task.hparams["learning_rate"]
    if given != "auto":
        return float(given)
    trainer, galore = task.trainer, getattr(task, "galore", None)
    ratios = [callback.lora_plus_ratio for callback in trainer.callbacks if isinstance(callback, LoRACallback)]  # type: ignore[attr-defined]
    rate = advise_learning_rate(
        task,
        lora_plus_ratio=max(ratios, default=1.0),
        steps=trainer.estimated_stepping_batches,
        galore_scale=None if galore is None else galore.scale,
    )
    share, why = getattr(task, "rate_share", (1.0, ""))
    if share != 1:
        rate = Rate(float(f"{rate.value * share:.2g}"), f"{rate.reason}, times {share:g}: {why}")
    rank_zero_info(f"learning_rate: {rate.value:g} ({rate.reason}). Set model.learning_rate to choose another.")
    return rate.value
