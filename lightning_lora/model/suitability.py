"""Decide whether a layer suits LoRA in this model: it must be called, and merging must give the adapter's output."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.classes import adapted_class
from lightning_lora.layers.linearity import why_not_linear
from lightning_lora.model.fast_paths import SWITCHED
from lightning_lora.utils.weight_reads import weight_reads

_PLAIN = LoRAConfig().variant


class Suitability:
    """Tell which layers of one model LoRA can adapt.

    Args:
        model: the whole model, because a layer's parents matter too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def _reads(self) -> dict[nn.Module, str]:
        return weight_reads(self.model, SWITCHED)

    def reason(self, module: nn.Module, kind: str | None = None) -> str | None:
        """Return why an adapter on this layer would be wrong; None if it would be right.

        Args:
            module: the layer.
            kind: name of the layer's kind, if its type does not determine the kind.
        """
        if module in self._reads:
            where = self._reads[module]
            return (
                f"{where} reads its weight without calling it, so an adapter there would have no effect and merging would change the model"
            )
        own = adapted_class(type(module), _PLAIN, kind)
        return (own and own.unfit(module)) or why_not_linear(module, kind)
