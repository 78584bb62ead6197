"""Switch on the dropout of adapters whose base is in evaluation mode, as ``from_pretrained`` leaves a model."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lora.layers.base import lora_layers


def wake_dropout(target: nn.Module) -> None:
    """Put the adapted layers that have dropout into training mode. The rest of the model stays in its mode. Log it."""
    asleep = [(name, layer) for name, layer in lora_layers(target) if layer.lora_dropout.p > 0 and not layer.training]
    for _, layer in asleep:
        layer.training = True  # not `train()`, because submodules must stay in evaluation mode
        layer.lora_dropout.train()
    if asleep:
        rank_zero_info(
            f"{asleep[0][0]} and {len(asleep) - 1} more adapted layers were in evaluation mode (as from_pretrained leaves a model),"
            " which disables their adapters' dropout: they are in training mode now, the rest of the model is unchanged."
        )
