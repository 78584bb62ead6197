"""Log what a run adapts and trains, and what it merged."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lora.model.apply import trainable_parameters
from lightning_lora.model.merge import merge_report
from lightning_lora.model.targeting import TargetReport
from lightning_lora.optim.advice import advise_setup

CHECKPOINTS = 'checkpoints hold the adapter only: read one with load_adapter(model, "x.ckpt"), not with load_from_checkpoint'


def log_start(report: TargetReport, module: nn.Module, stays: str, checkpoints: bool) -> None:
    """Log the report and the share of parameters that train.

    Args:
        report: what the config matched.
        module: the whole LightningModule, adapted.
        stays: names of what is frozen without an adapter; empty if nothing is.
        checkpoints: True if the run writes checkpoints. The log then says how to read one.
    """
    trainable, total = trainable_parameters(module)
    rest = f"\nfrozen, without an adapter: {stays}" if stays else ""
    files = f"\n{CHECKPOINTS}" if checkpoints else ""
    rank_zero_info(f"{report}{rest}\ntrainable {trainable:,} of {total:,} parameters ({trainable / total:.2%}){files}")


def log_merge(target: nn.Module) -> None:
    """Log how many layers were merged, and what rounding lost."""
    lost = merge_report(target)
    worst = max(lost, key=lambda name: lost[name])
    rank_zero_info(f"LoRA merged into {len(lost)} modules; rounding lost at most {lost[worst]:.2%} of an update ({worst}).")


def log_advice(trainer: Trainer, target: nn.Module) -> None:
    """Log what is set that decides how well LoRA learns, and what speaks for another choice."""
    rank_zero_info("\n".join(advise_setup(target, effective_batch(trainer), trainer.strategy.root_device.type)))


def effective_batch(trainer: Trainer) -> int | None:
    """Return the rows per optimizer step over all processes; None if the loader does not say its batch size."""
    loader: Any = trainer.train_dataloader
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(size, int):
        return None
    replicas = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
    return int(size * trainer.accumulate_grad_batches * replicas)
