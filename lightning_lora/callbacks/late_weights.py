"""Load the weights of a module on the meta device when there is memory for them: at once, or after the strategy has sharded the module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_lora.callbacks.starting import part_root
from lightning_lora.model.weight_folder import WeightFolder
from lightning_lora.model.weights import load_base, on_meta
from lightning_lora.strategies.namespaces import twins


def load_or_defer(callback: Any, trainer: Trainer, module: LightningModule) -> Callable[[], object] | None:
    """Load the base's weights of the part that a ``LoRACallback`` adapted, if it names them and the part is on the meta device.

    Under a strategy that shards the module in its ``setup``, return a function that loads them, to be called after that. FSDP1 takes no
    module on the meta device.

    Raises:
        ValueError: the folder has no weights.
    """
    target, strategy = module.get_submodule(callback.module or ""), trainer.strategy
    if callback.weights is not None and callback.part is None and not on_meta(target):
        rank_zero_warn(
            f"weights={callback.weights!r} is not read: {type(target).__name__} has weights already. Build it on the meta device, or leave"
            " weights out."
        )
    if callback.weights is None or not on_meta(target) or isinstance(strategy, twins(FSDPStrategy)):
        return None
    read = callback.weights if callable(callback.weights) else WeightFolder(callback.weights)
    load = partial(load_base, module.get_submodule(part_root(callback, target)), read, device=strategy.root_device)
    if isinstance(strategy, twins(ModelParallelStrategy)):
        return load
    load()
    return None
