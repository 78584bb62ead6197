"""Shared input: linears of one parent that read the same tensor, such as a block's q, k and v projections, computed together.

The parent's forward stays unchanged and calls them one by one::

    parent's forward begins         the group opens                     (Sharing.forward in model/fuse.py)
        q_proj(x)                   computes q, k and v for x; returns q, stores k and v
        k_proj(x), v_proj(x)        each returns its stored output for the same x
    parent's forward ends           the group closes; unused outputs are dropped

They share the product with their A's, the saved input and the input's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.plan_hooks import watches_input
from lightning_lora.layers.tensor_parallel import local_outputs
from lightning_lora.ops.frozen_weight import FrozenWeight
from lightning_lora.ops.fused_linear import lora_linears, one_operation_takes
from lightning_lora.utils.autocast import autocast_dtype

#: Smallest number of input entries for which sharing pays: one product with the A's and one gradient for x.
#: Below it, Python costs more time than sharing saves.
FEW_ENTRIES = 2**16


class SharedInputGroup:
    """Adapted linears that their parent calls one after the other on the same tensor.

    They share only while their parent's forward runs (``open`` to ``close``). Called from elsewhere, each is computed alone.

    Args:
        layers: the linears, in any order; :mod:`lightning_lora.model.fuse` decides which belong together.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.open = False
        # The input, the rest of the key, and the outputs not requested yet. One attribute, so that a thread sees all of it or nothing.
        self.held: tuple[Tensor, tuple[Any, ...], dict[int, Tensor]] | None = None

    def close(self) -> None:
        """Drop the outputs that were not requested: nothing outlives the parent's forward pass."""
        self.open, self.held = False, None

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return ``layer``'s output for x; None if it must be computed alone."""
        if not self.open:
            return None
        # Without a dropout mask or a collective to share, Python dominates for a small input. A compiler's trace serves inputs of any size.
        split = layer.lora_split is not None
        if x.numel() < FEW_ENTRIES and not (split or torch.compiler.is_compiling() or layer.dropout_now()):
            return None
        index = -1
        for k, other in enumerate(self.layers):  # no generator: each of its steps would be a Python call
            if other is layer:
                index = k
        if index < 0:  # a copy of a layer, such as nn.DataParallel's replica, is not in the group
            return None
        held, key = self.held, self._key(x)
        if held is not None and held[0] is x and held[1] == key:
            y = held[2].pop(index, None)
            if y is not None:
                return y
        if split:
            outputs = local_outputs(self.layers, x) if self._complete() else None
        else:
            weights = self._weights(x)
            outputs = None if weights is None else compute(self.layers, weights, x)
        if outputs is None:
            return None
        waiting = dict(enumerate(outputs))
        y = waiting.pop(index)
        self.held = (x, key, waiting)
        return y

    def takes(self, x: Tensor) -> bool:
        """True if, open, the group computes its layers for x as one operation, with one dropout mask."""
        return self._weights(x) is not None

    def _weights(self, x: Tensor) -> list[FrozenWeight] | None:
        """Return each layer's frozen weight; None if the layers cannot be one operation for x at the moment."""
        weights: list[FrozenWeight] = []
        dropout: float | None = None
        if not one_operation_takes(x) or not self._complete():
            return None
        for layer in self.layers:
            weight, p = layer.frozen_weight(x), layer.dropout_now()
            if weight is None or dropout not in (None, p):
                return None
            weights.append(weight)
            dropout = p
        return weights

    def _complete(self) -> bool:
        """True if every layer still has its adapter, and no hooks that need it to be computed alone.

        Such hooks give each layer its own input tensor. FSDP2's, on a layer that it shards alone, also free the weight afterwards.
        """
        for layer in self.layers:
            if getattr(layer, "shared_input", None) is not self:
                return False
            if (layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks) and watches_input(layer):
                return False
        return True

    def dissolve(self) -> None:
        """Dissolve the group: each layer is computed alone from now on."""
        self.close()
        for layer in self.layers:
            layer.__dict__.pop("shared_input", None)

    @staticmethod
    def _key(x: Tensor) -> tuple[Any, ...]:
        """Return what, besides x, decides the output and may change between two calls in one forward pass."""
        if torch.compiler.is_compiling():  # one trace has one state
            return ()
        return (0 if x.is_inference() else x._version, torch.is_grad_enabled(), autocast_dtype(x))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open": False, "held": None}


def compute(layers: list[Any], weights: list[FrozenWeight], x: Tensor) -> tuple[Tensor, ...]:
    """Return the outputs for x of layers with these frozen weights, computed as one operation."""
    A_list, B_list = zip(*[layer.update_factors() for layer in layers], strict=True)
    return lora_linears(
        x,
        weights,
        [layer.bias for layer in layers],
        A_list,
        B_list,
        [layer.scaling for layer in layers],
        layers[0].dropout_now(),
        [layer.output_scale() for layer in layers],
    )
