"""Read the progress bar's values from the device twice a second, not in every step.

What a module logs with ``prog_bar=True`` Lightning reads after every batch. Reading a value from a GPU waits until the GPU has computed all
that was launched before. The next step's kernels are launched only after that, one by one, while the GPU has nothing to do.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.callbacks.companion import Companion
from lightning_lora.strategies.lightning_private import defer_bar_values

PERIOD = 0.5  # seconds


class ShownValues(Companion):
    """Let the progress bar show the values it has for half a second, where they are on a device other than the CPU.

    The count of batches moves on with each. The values of the last batch, and those around a validation, are read at once. What loggers
    get is read when it is logged, as always. `LoRACallback` adds this callback to its trainer, unless ``tune_loop=False``.
    """

    def __init__(self, temporary: bool = False) -> None:
        super().__init__(temporary)
        self._undo = ExitStack()  # gives the trainer and its bar their own methods back
        self._read_at = -PERIOD
        self._values: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace two methods on the instances: the bar's ``get_metrics``, and Lightning's reading after a batch."""
        if trainer.strategy.root_device.type == "cpu":
            return
        self._read_at = -PERIOD
        self._undo.callback(defer_bar_values(trainer, partial(_goes_on, trainer)))
        bar: Any = trainer.progress_bar_callback
        if bar is not None and bar.is_enabled:
            own, read = vars(bar).get("get_metrics"), bar.get_metrics
            self._undo.callback(partial(setattr, bar, "get_metrics", own) if own else partial(delattr, bar, "get_metrics"))
            bar.get_metrics = partial(self._get_metrics, read)
            rank_zero_info(f"The progress bar reads its values every {PERIOD} s: steps do not wait for them (tune_loop=False: they do).")

    def _get_metrics(self, read: Any, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        if not _goes_on(trainer) or time.monotonic() - self._read_at >= PERIOD:
            self._values, self._read_at = read(trainer, pl_module), time.monotonic()
        return dict(self._values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the methods back."""
        self._undo.close()
        self._values = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the methods back."""
        self.on_train_end(trainer, pl_module)


def _goes_on(trainer: Trainer) -> bool:
    """Return whether the trainer trains, and another batch follows."""
    return trainer.training and not trainer.is_last_batch and not trainer.fit_loop.epoch_loop.done
