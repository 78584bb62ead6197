"""Linears of one parent that read the same input, such as a block's q, k and v projections: computed together, called one by one.

The parent's forward stays as it is. The first sibling that is called on an input computes the others' outputs too and keeps them
for when they are called on that very tensor; they share the product with their A's, the saved input and the input's gradient.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from lightning_lora.fused_ops import lora_linears

logger = logging.getLogger(__name__)


class Siblings:
    """Adapted linears that read the same tensor.

    Args:
        names: their names in the parent, for messages.
        layers: they.
    """

    def __init__(self, names: list[str], layers: list[Any]) -> None:
        self.names, self.layers = names, layers
        self.input: Tensor | None = None
        self.version = 0
        self.waiting: dict[int, Tensor] = {}

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """``layer``'s output for x; None if it has to be computed alone."""
        index = -1
        for k, other in enumerate(self.layers):
            if other is layer:
                index = k
        if index < 0:  # a replica of the layer that the group was made for
            return None
        if index in self.waiting:
            if self.input is x and self._unchanged(x):
                return self._hand_out(index)
            self._give_up()
            return None
        # Outputs still waiting were not asked for: a sibling was not used, or recomputation stopped early.
        self.input, self.waiting = None, {}
        if not all([other.fusable(x) for other in self.layers]) or len({other.dropout_now() for other in self.layers}) > 1:
            return None
        self.input, self.waiting = x, dict(enumerate(compute(self.layers, x)))
        if not torch.compiler.is_compiling() and not x.is_inference():
            self.version = x._version
        return self._hand_out(index)

    def _hand_out(self, index: int) -> Tensor:
        y = self.waiting.pop(index)
        if not self.waiting:
            self.input = None
        return y

    def _unchanged(self, x: Tensor) -> bool:
        return torch.compiler.is_compiling() or x.is_inference() or x._version == self.version

    def _give_up(self) -> None:
        """They did not read the same tensor after all (cross-attention, a hook that replaces an input)."""
        self.input, self.waiting = None, {}
        for layer in self.layers:
            layer.lora_siblings = None
        if not torch.compiler.is_compiling():
            logger.info("%s read different inputs; from here on each is computed alone.", ", ".join(self.names))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "input": None, "waiting": {}}


def compute(layers: list[Any], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of layers that are all fusable for x."""
    As, Bs = zip(*[layer.update_factors() for layer in layers], strict=True)
    return lora_linears(
        x,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
        As,
        Bs,
        [layer.scaling for layer in layers],
        layers[0].dropout_now(),
    )
