"""Resume inside an epoch at the loader's position, or log which rows are trained on twice.

Lightning keeps a loader's position if the loader has ``state_dict`` and ``load_state_dict``, such as torchdata's
``StatefulDataLoader``. Any other loader starts over: the epoch has as many batches left as it lacks, but they are the loader's first ones.
A loader also starts over if ``configure_optimizers`` reads ``trainer.estimated_stepping_batches``. Lightning then makes the loader early,
and loads no position into it.

A loader with an attribute ``resumed_at`` (batches that it leaves out in this epoch; None if it did not resume) sets Lightning's count.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info

from lightning_lora.callbacks.companion import Companion
from lightning_lora.strategies.lightning_private import loader_states_not_loaded
from lightning_lora.utils.messages import counted


class DataPosition(Companion):
    """Set Lightning's count of batches to the loader's position when a run resumes. Without one, log which rows are trained on twice.

    ``LoRACallback`` adds this callback to its trainer.
    """

    def __init__(self, temporary: bool = False) -> None:
        super().__init__(temporary)
        self.saved = False  # the checkpoint has the positions of training loaders

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note whether the checkpoint has the loaders' positions."""
        self.saved = bool(checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the position, or log that there is none."""
        progress, batches = trainer.fit_loop.epoch_loop.batch_progress.current, trainer.num_training_batches
        if trainer.ckpt_path is None or not 0 < progress.ready < batches:
            return
        loaders = CombinedLoader(trainer.train_dataloader).flattened
        resumed_at = getattr(loaders[0], "resumed_at", None) if len(loaders) == 1 else None
        if resumed_at is not None:
            shift = resumed_at - progress.ready  # 0, unless the number of processes changed
            for count in ("ready", "started", "processed", "completed"):
                setattr(progress, count, getattr(progress, count) + shift)
            return
        ordinary = [loader for loader in loaders if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"))]
        if ordinary or not self.saved or loader_states_not_loaded(trainer):
            _log(trainer, type((ordinary or loaders)[0]).__name__, progress.ready, batches)


def _log(trainer: Trainer, loader: str, done: int, batches: float) -> None:
    """Log which batches are trained on twice and which are left out."""
    again = "." if batches == float("inf") else f": its first {batches - done} batches come in this epoch, its last {done} do not."
    rank_zero_info(
        f"Resumed inside epoch {trainer.current_epoch}, after {counted(done, 'batch')} of it. The position of {loader} was not saved or not"
        f" loaded, so it starts over{again} If it shuffles, it draws a new order. To go on with the next rows, use torchdata's"
        " StatefulDataLoader, give the loader state_dict and load_state_dict, or save at the end of epochs."
    )
