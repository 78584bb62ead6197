"""What is done to the optimizers that ``configure_optimizers`` returns, before they take a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer

from lightning_lora.optim.groups import take_over
from lightning_lora.optim.lora_plus import apply_lora_plus, check_kept, holds_b
from lightning_lora.optim.preconditioning import apply_preconditioner, pairs_of
from lightning_lora.optim.state import check_named
from lightning_lora.strategies.adapted_part import AdaptedPart


def check_trains(module: LightningModule) -> None:
    """Raise ValueError if nothing trains. torch would only say that an optimizer got an empty list."""
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"nothing in {type(module).__name__} trains: its adapters were frozen after LoRACallback added them, as by freeze() or"
            " requires_grad_(False) in setup, or by a BaseFinetuning callback. LoRA freezes the base itself, so leave that out."
        )


def prepare(optimizers: Sequence[Optimizer], schedulers: Sequence[Any], module: LightningModule, parts: Iterable[AdaptedPart]) -> None:
    """Give them adapters in place of frozen weights, check that their states can be saved, and apply LoRA+ and preconditioners.

    Args:
        optimizers: of the strategy.
        schedulers: the strategy's ``lr_scheduler_configs``.
        module: the LightningModule.
        parts: its adapted parts.

    Raises:
        ValueError: an optimizer cannot be resumed, or a part's options do not fit it.
    """
    for optimizer in optimizers:
        take_over(optimizer, module)
        check_named(optimizer, module)
        check_kept(optimizer)
        for part in parts:
            adapted = module.get_submodule(part.root)
            if part.lora_plus_ratio != 1 and holds_b(optimizer, adapted):
                mine = [config.scheduler for config in schedulers if config.scheduler.optimizer is optimizer]
                apply_lora_plus(optimizer, adapted, part.lora_plus_ratio, *mine)
            if part.precondition is not None and pairs_of(adapted, part.precondition, optimizer):
                apply_preconditioner(optimizer, adapted, part.precondition)
