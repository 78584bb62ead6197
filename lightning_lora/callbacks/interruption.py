"""Stop a run on SIGTERM or Ctrl-C: after the batch, with a checkpoint to resume from and an exit code that is not 0.

On SIGTERM Lightning raises ``SIGTERMException`` after the batch. That is a ``SystemExit`` without a code: the process exits with 0, as if
it had finished, and what was trained since the last checkpoint is lost. On Ctrl-C it stops within a step, where no state can be saved.

Here Ctrl-C counts as SIGTERM, and a second one stops at once, as in Lightning. On several processes Lightning's handler waits for the
others, whatever they do, and before each batch all wait for their GPUs to compare flags. Both are replaced: all processes stop after
the same batch, soon after one of them gets the signal. A handler that the user has set for SIGTERM is still called.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lora.callbacks.companion import Companion
from lightning_lora.strategies.agreed_stop import AgreedStop
from lightning_lora.strategies.lightning_private import handler_before, skip_sigterm_broadcast, stop_after_batch
from lightning_lora.strategies.namespaces import twin, twins
from lightning_lora.utils.sharding import is_distributed

#: The checkpoint of an interrupted run. ``ckpt_path="last"`` finds it: Lightning takes the newest file whose name begins with "last".
NAME = "last-interrupted.ckpt"


class Interruption(Companion):
    """Leave a resumable checkpoint and the exit code 128 + signal (130, 143) when a run is told to stop.

    The checkpoint is written to the folder of the trainer's checkpoint callback. Without such a callback, or if one saves on exceptions
    itself, nothing is written here. `LoRACallback` adds this callback to its trainer.
    """

    def __init__(self, temporary: bool = False) -> None:
        super().__init__(temporary)
        self.signal: signal.Signals | None = None  # what told this process to stop
        self._stop: AgreedStop | None = None  # of a run on several processes
        self._users: Any = None  # the user's own handler of SIGTERM
        self._undo = ExitStack()  # gives Lightning's loop its own method back

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the handlers. Lightning restores the earlier handlers after the run."""
        several = is_distributed() and trainer.world_size > 1
        self.signal, self._stop = None, AgreedStop(trainer.strategy.root_device) if several else None
        if self._stop is not None:
            self._undo.callback(skip_sigterm_broadcast(trainer))
        lightnings = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread() or not callable(lightnings):
            return
        if self._stop is not None:
            self._users = handler_before(trainer, signal.SIGTERM)
            signal.signal(signal.SIGTERM, self._note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note_ctrl_c)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop all processes if one was told to stop. Before a batch, a resumable loader would count that batch as trained on."""
        if self._told():
            stop_after_batch(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop all processes if one was told to stop."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._told():
            raise twin(SIGTERMException, trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save a checkpoint, and give the exception its exit code."""
        self._undo.close()
        if not isinstance(exception, twins(SIGTERMException)):
            return
        exception.code = 128 + (self.signal or signal.SIGTERM)
        if trainer.state.fn != TrainerFn.FITTING or trainer.global_step == 0:
            return
        folder = _folder(trainer)
        if folder is None:
            rank_zero_info(f"Interrupted at step {trainer.global_step}.")
            return
        path = os.path.join(folder, NAME)
        trainer.save_checkpoint(path)
        rank_zero_info(f"Interrupted at step {trainer.global_step}; resume with ckpt_path={path!r}.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the exchange between the processes. A run that is told to stop within its last batches ends normally."""
        self._undo.close()
        if self._stop is not None:
            self._stop.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the checkpoint of an interruption that this run resumed from, so that "last" no longer finds it."""
        if trainer.ckpt_path is not None and os.path.basename(trainer.ckpt_path) == NAME:
            trainer.strategy.remove_checkpoint(trainer.ckpt_path)

    def _note(self, number: int, frame: Any) -> None:
        self.signal = self.signal or signal.Signals(number)
        if callable(self._users):
            self._users(number, frame)

    def _note_ctrl_c(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.signal = signal.SIGINT
        rank_zero_info("Ctrl-C: training stops after this batch. Press it again to stop at once, without a checkpoint.")
        signal.raise_signal(signal.SIGTERM)

    def _told(self) -> bool:
        """Return True on every process once one was told to stop."""
        return self._stop is not None and self._stop.after_batch(self.signal is not None)


def _folder(trainer: Trainer) -> str | None:
    """Return the folder of the trainer's checkpoints; None if it saves none, or saves one on exceptions itself."""
    savers: list[Any] = trainer.checkpoint_callbacks
    off = trainer.fast_dev_run  # type: ignore[attr-defined]
    if off or any(isinstance(s, twins(OnExceptionCheckpoint)) or getattr(s, "save_on_exception", False) for s in savers):
        return None
    return next((str(saver.dirpath) for saver in savers if getattr(saver, "dirpath", None)), None)
