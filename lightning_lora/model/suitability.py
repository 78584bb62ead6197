"""Whether an adapter on a layer does what it promises in this model: the layer is called, and merging leaves what the adapter did."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from lightning_lora.layers.linearity import why_not_linear
from lightning_lora.utils.weight_reads import weight_reads


class Suitability:
    """Asked about the layers of one model.

    Args:
        model: the whole model, for what a layer's parent does with it counts too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def _reads(self) -> dict[nn.Module, str]:
        return weight_reads(self.model)

    def reason(self, module: nn.Module, kind: str | None = None) -> str | None:
        """Why an adapter on this layer would be wrong; None if it would not.

        Args:
            module: the layer.
            kind: name of its kind, where its type does not tell.
        """
        if module in self._reads:
            where = self._reads[module]
            return (
                f"{where} reads its weight without calling it, so an adapter there would do nothing and merging it would change the model"
            )
        return why_not_linear(module, kind)
