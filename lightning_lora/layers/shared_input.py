"""Linears of one parent that read the same input, such as a block's q, k and v projections: computed together, called one by one.

The parent's forward stays as it is::

    parent's forward begins         the group opens                     (Sharing.forward in model/fuse.py)
        q_proj(x)                   computes q, k and v for x; returns q, keeps k and v
        k_proj(x), v_proj(x)        each takes what was kept for this very x
    parent's forward ends           the group closes; what nobody took is dropped

They share the product with their A's, the saved input and the input's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.frozen_weight import FrozenWeight
from lightning_lora.ops.fused_linear import lora_linears, serves
from lightning_lora.utils.autocast import autocast_dtype

#: Of an input, from which on sharing saves more (one product with the A's, one gradient for x) than its Python takes.
FEW_ENTRIES = 2**16


class SharedInputGroup:
    """Adapted linears whose parent calls them one after the other on the same tensor.

    They share while their parent's forward runs (``open`` to ``close``); called by themselves they are computed by themselves.

    Args:
        layers: they, in any order; what decides that they belong together is :mod:`lightning_lora.model.fuse`.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.open = False
        # Input, what else decided the outputs, and those not asked for yet. One attribute, so that threads see all or nothing of it.
        self.held: tuple[Tensor, tuple[Any, ...], dict[int, Tensor]] | None = None

    def close(self) -> None:
        """Drop what was not asked for: nothing outlives the parent's forward pass."""
        self.open, self.held = False, None

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """``layer``'s output for x; None if it has to be computed alone."""
        if not self.open:
            return None
        # Without a mask to share, a small input is bound by Python. One trace of a compiler is for inputs of any size.
        if x.numel() < FEW_ENTRIES and not torch.compiler.is_compiling() and not layer.dropout_now():
            return None
        index = -1
        for k, other in enumerate(self.layers):
            if other is layer:
                index = k
        if index < 0:  # a replica of the layer that the group was made for
            return None
        held, key = self.held, self._key(x)
        if held is not None and held[0] is x and held[1] == key:
            y = held[2].pop(index, None)
            if y is not None:
                return y
        weights = self._weights(x)
        if weights is None:
            return None
        waiting = dict(enumerate(compute(self.layers, weights, x)))
        y = waiting.pop(index)
        self.held = (x, key, waiting)
        return y

    def _weights(self, x: Tensor) -> list[FrozenWeight] | None:
        """Each layer's frozen weight; None if something keeps them from being one operation for x now."""
        weights: list[FrozenWeight] = []
        dropout = None
        if not serves(x):
            return None
        for layer in self.layers:
            if getattr(layer, "shared_input", None) is not self:  # it was unloaded
                return None
            # These hand each layer an input of its own; FSDP2's, around what it shards by itself, also frees the weight when that is done.
            if layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
                return None
            weight, p = layer.frozen_weight(x), layer.dropout_now()
            if weight is None or p != (p if dropout is None else dropout):
                return None
            weights.append(weight)
            dropout = p
        return weights

    def dissolve(self) -> None:
        """Let each be computed alone."""
        self.close()
        for layer in self.layers:
            layer.__dict__.pop("shared_input", None)

    @staticmethod
    def _key(x: Tensor) -> tuple[Any, ...]:
        """What else may change between two calls in one forward pass and decide the output."""
        if torch.compiler.is_compiling():  # one trace is one state
            return ()
        return (0 if x.is_inference() else x._version, torch.is_grad_enabled(), autocast_dtype(x))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open": False, "held": None}


def compute(layers: list[Any], weights: list[FrozenWeight], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs for x of layers with these frozen weights, as one operation."""
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
