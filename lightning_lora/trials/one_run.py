"""What a trial's run does beyond what it does alone: it shares the base, waits for joint steps, and notes its best value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_lora.callbacks import AdaLoRACallback, LoRACallback
from lightning_lora.strategies.lightning_private import stop_after_batch
from lightning_lora.strategies.namespaces import twins

Mode = Literal["min", "max"]


@dataclass
class Outcome:
    """How a trial stands.

    Attributes:
        name: its name.
        settings: what it has of its own.
        status: "waiting", "running", "complete", "failed" or "interrupted".
        monitor: name of the value that trials are compared by; empty before the first is known.
        best: the best of it so far.
        best_step: optimizer steps until then.
        steps: optimizer steps so far.
        last: the last value of every metric.
        seen: metric → "min" and "max" → its smallest and largest value so far, and the optimizer steps until then.
        error: why it failed.
        folder: where its results are, where the command line writes them.
    """

    name: str
    settings: Mapping[str, Any]
    status: str = "waiting"
    monitor: str = ""
    mode: Mode = "min"
    best: float | None = None
    best_step: int = 0
    steps: int = 0
    last: dict[str, float] = field(default_factory=dict)
    seen: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    error: str = ""
    folder: str = ""

    def note(self, trainer: Trainer) -> None:
        """Note the trainer's values, and whether they are the best so far."""
        self.steps = trainer.global_step
        self.last = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        for name, value in self.last.items():
            if not math.isnan(value):
                seen = self.seen.setdefault(name, {mode: [value, self.steps] for mode in ("min", "max")})
                for mode, better in (("min", value < seen["min"][0]), ("max", value > seen["max"][0])):
                    if better:
                        seen[mode] = [value, self.steps]
        self.compare_by(self.monitor, self.mode)

    def compare_by(self, monitor: str, mode: Mode) -> None:
        """Compare by a value, which may be another than before."""
        self.monitor, self.mode = monitor, mode
        self.best, self.best_step = self.seen[monitor][mode] if monitor in self.seen else (None, 0)


class OneRun(Callback):
    """The callback of one trial. It stands right behind the ``LoRACallback``.

    Args:
        outcome: what is noted in.
        share: shares the base of an adapted module.
        ask: returns the loss of a module for a batch from a joint step, or None if it is to compute it itself.
        changed: called when the outcome has changed.
        stopped: returns True once all runs are told to stop.
    """

    def __init__(
        self,
        outcome: Outcome,
        share: Callable[[LightningModule, LoRACallback], None],
        ask: Callable[[LightningModule, Any], Any],
        changed: Callable[[], None],
        stopped: Callable[[], bool],
    ) -> None:
        self.outcome, self.share, self.ask, self.changed, self.stopped = outcome, share, ask, changed, stopped
        self._began = False

    def join(self, trainer: Trainer, module: LightningModule) -> None:
        """Join a trainer that has not begun.

        Raises:
            ValueError: the run cannot be one of several in a process.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        places = [k for k, callback in enumerate(callbacks) if isinstance(callback, LoRACallback)]
        _check(self.outcome.name, trainer, [callback for callback in callbacks if isinstance(callback, LoRACallback)])
        callbacks[places[0]].merge_on_fit_end = False  # type: ignore[attr-defined]
        callbacks.insert(places[0] + 1, self)
        vars(module)["cpu"] = lambda: module  # at the end of fit, Lightning would take the base off the device under the others

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Share the base. Let joint steps compute the losses of a module that allows it."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self.share(pl_module, next(callback for callback in callbacks if isinstance(callback, LoRACallback)))
        alone = getattr(pl_module, "training_loss", None)
        if alone is not None:
            vars(pl_module)["training_loss"] = partial(self._loss, pl_module, alone)

    def _loss(self, module: LightningModule, alone: Callable[[Any], Any], batch: Any) -> Any:
        # Before training, an init that reads data runs training steps too: what it reads is this trial's alone.
        loss = self.ask(module, batch) if self.outcome.status == "running" and module.trainer.training else None
        return alone(batch) if loss is None else loss

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose what trials are compared by, if nobody has: what a checkpoint or an early stop looks at, or the validation loss."""
        outcome = self.outcome
        outcome.status = "running"
        if not outcome.monitor:
            watching = [c for c in trainer.callbacks if isinstance(getattr(c, "monitor", None), str)]  # type: ignore[attr-defined]
            if watching:
                outcome.monitor, outcome.mode = watching[0].monitor, watching[0].mode
            else:
                outcome.monitor = "val_loss" if trainer.enable_validation else "train_loss"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the values."""
        if trainer.training or trainer.validating:
            self.outcome.note(trainer)
            self.changed()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say that the first batch is done. Stop, with a checkpoint, once all are told to."""
        if not self._began:
            self._began = True
            self.changed()
        if self.stopped():
            stop_after_batch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last values."""
        self.outcome.note(trainer)


def _check(name: str, trainer: Trainer, callbacks: list[LoRACallback]) -> None:
    """Raise ValueError if a run cannot be one of several in a process."""
    if not callbacks:
        raise ValueError(f"{name}: it trains every weight, and trials share a frozen base; leave full fine-tuning out, or run it with fit.")
    if len(callbacks) != 1:
        raise ValueError(f"{name}: its Trainer has {len(callbacks)} LoRACallbacks, and a trial has one: the base must stay frozen.")
    if isinstance(callbacks[0], AdaLoRACallback):
        raise ValueError(f"{name}: AdaLoRACallback finds the ranks itself; run it alone, with fit.")
    if not isinstance(trainer.strategy, twins(SingleDeviceStrategy)):
        raise ValueError(
            f"{name}: strategy={type(trainer.strategy).__name__} is for several devices, and trials share one; set devices=1, or run them"
            " one by one, with fit."
        )
    if callbacks[0].offload is not None and "frozen" in callbacks[0].offload:
        raise ValueError(f"{name}: offload='frozen' moves the base for one run, and trials share it; leave it out.")
