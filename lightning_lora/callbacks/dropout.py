"""Switch on the dropout of adapters whose base is in evaluation mode, as ``from_pretrained`` leaves a model."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lora.model.modes import wake_dropout


def wake_and_log(target: nn.Module) -> None:
    """Put the adapted layers that have dropout into training mode. The rest of the model stays in its mode. Log it."""
    woken = wake_dropout(target)
    if woken:
        more = f" and {len(woken) - 1} more adapted layers" if len(woken) > 1 else ""
        rank_zero_info(
            f"{woken[0]}{more} was in evaluation mode (from_pretrained leaves a model in it), which disables the adapter's dropout."
            " Adapted layers are in training mode now; the rest of the model is unchanged."
        )
