"""Resume inside an epoch: go on where the loader goes on, or say which rows come again.

Lightning keeps a loader's position if the loader has ``state_dict`` and ``load_state_dict``, such as torchdata's
``StatefulDataLoader``. Any other loader starts over: the epoch goes on for as many batches as it lacks, but with the loader's first ones.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info


def has_positions(checkpoint: dict[str, Any]) -> bool:
    """True if the checkpoint has the positions of training loaders."""
    return bool(checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader"))


def go_on(trainer: Trainer, positions: bool) -> None:
    """Set Lightning's count of batches to the loader's position. Without one, log what a resumed run trains twice and leaves out.

    Args:
        trainer: at the start of training, after the checkpoint was loaded.
        positions: True if the checkpoint has the loaders' positions.
    """
    progress, batches = trainer.fit_loop.epoch_loop.batch_progress.current, trainer.num_training_batches
    if trainer.ckpt_path is None or progress.ready == 0:
        return
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    ordinary = [loader for loader in loaders if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"))]
    if positions and not ordinary:
        resumed_at = getattr(loaders[0], "resumed_at", None)
        if len(loaders) == 1 and resumed_at is not None and progress.ready < batches:
            shift = resumed_at - progress.ready  # 0, unless the number of processes is another
            for count in ("ready", "started", "processed", "completed"):
                setattr(progress, count, getattr(progress, count) + shift)
    elif progress.ready < batches:
        _log(trainer, type((ordinary or loaders)[0]).__name__, progress.ready, batches)


def _log(trainer: Trainer, loader: str, done: int, batches: float) -> None:
    """Say what is trained twice and what is left out."""
    again = "." if batches == float("inf") else f": its first {batches - done} batches come in this epoch, its last {done} do not."
    rank_zero_info(
        f"Resumed inside epoch {trainer.current_epoch}, after {done} batches of it. The checkpoint has no position of {loader}, so it"
        f" starts over{again} If it shuffles, it draws a new order. To go on with the next rows, use torchdata's StatefulDataLoader, give"
        " the loader state_dict and load_state_dict, or save at the end of epochs."
    )
