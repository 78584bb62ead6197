"""Stop a training that has turned NaN, before it overwrites the last good checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_lora.layers.base import kept_parameters
from lightning_lora.utils.messages import counted
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.values import nonfinite


def check_finite(strategy: Strategy, tensors: Mapping[str, Tensor], states: Sequence[str] = ()) -> None:
    """Raise on every process if what trains holds NaN or infinity on one of them. A collective.

    Args:
        strategy: the trainer's strategy.
        tensors: name → what trains.
        states: names of the parameters whose optimizer state holds NaN.

    Raises:
        RuntimeError: a tensor holds them. The message names the first one, and the option that allows them.
    """
    bad = nonfinite(tensors)
    if strategy.reduce_boolean_decision(bool(bad or states), all=False):
        what = f"{bad[0]} holds NaN or infinity ({len(bad)} of {len(tensors)} trained tensors do)" if bad else "another process has NaN"
        if states and not bad:
            what = f"the optimizer state of {states[0]} holds NaN (that of {counted(len(states), 'parameter')} does)"
        raise RuntimeError(
            f"training stops and writes no checkpoint: {what}. Earlier checkpoints are good: resume from the last one with a lower learning"
            " rate or gradient_clip_val, or look at the batches since. LoRACallback(allow_nonfinite=True) goes on instead."
        )


class FiniteCheck:
    """Checks what trains once per ``every`` batches. A check waits for the device, so it is not made in every batch.

    Args:
        strategy: the trainer's strategy.
        module: the module whose parameters train.
        every: batches from one check to the next. At Lightning's ``log_every_n_steps``, logging waits for the device anyway.
    """

    def __init__(self, strategy: Strategy, module: LightningModule, every: int) -> None:
        self.strategy, self.module, self.every = strategy, module, every
        self._batches = 0

    def after_batch(self) -> None:
        """Count the batch. Check after every ``every`` batches.

        Raises:
            RuntimeError: as :func:`check_finite`.
        """
        self._batches += 1
        if self._batches >= self.every:
            self.finish()

    def finish(self) -> None:
        """Check if a batch was trained on since the last check.

        Raises:
            RuntimeError: as :func:`check_finite`.
        """
        if self._batches:
            self._batches = 0
            check_finite(self.strategy, {clean_name(name): p for name, p in kept_parameters(self.module)})
