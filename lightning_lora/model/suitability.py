"""Decide whether a layer suits LoRA in this model: it must be called, and merging must give the adapter's output."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.adapting import COMPUTED_BY, computed_weights
from lightning_lora.layers.classes import adapted_class
from lightning_lora.layers.linearity import why_not_linear
from lightning_lora.model.fast_paths import SWITCHED
from lightning_lora.quantization.formats import format_of
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

    def reason(self, module: nn.Module, kind: str | None = None, variant: str = _PLAIN) -> str | None:
        """Return why an adapter on this layer would be wrong; None if it would be right.

        Args:
            module: the layer.
            kind: name of the layer's kind, if its type does not determine the kind.
            variant: the adapter's.
        """
        if module in self._reads:
            where = self._reads[module]
            return (
                f"{where} reads its weight without calling it, so an adapter there would have no effect and merging would change the model"
            )
        own = adapted_class(type(module), _PLAIN, kind)
        if own is not None and (unfit := own.unfit(module)) is not None:
            return unfit
        if own is not None and any((weight := module._parameters.get(name)) is not None and weight.is_complex() for name in own.adapted):
            return "its weight is complex"
        if own is not None and format_of(module) is None and (computed := computed_weights(module, own)):
            return f"it computes its {computed[0]} anew at each call ({COMPUTED_BY})"
        return why_not_linear(module, kind, variant)
