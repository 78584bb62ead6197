"""Wrap a module in DDP anew, after its parameters have changed their sizes: DDP's buckets are made for those that it saw."""

from __future__ import annotations

import gc

from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.strategies.namespaces import twins


def rewrap(strategy: Strategy) -> None:
    """Wrap the strategy's module anew if it is in DDP. Call it between batches. A collective, which sends the first rank's model."""
    if isinstance(strategy, twins(DDPStrategy)) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.lightning_module
        gc.collect()  # the old wrapper's hooks on the parameters go with it, and it is part of a cycle
        strategy.configure_ddp()
