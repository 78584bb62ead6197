"""Frozen weights as an operation takes them: the tensors that a layer stores, and the layout that they are in.

A packed weight is unpacked inside the operation that multiplies by it, and again in the backward pass, one weight at a time: neither
autograd nor a compiler ever holds it dense. Which layers can be read so is told by their forward, for it has to do what the operation does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.registry import qualified_name
from lightning_lora.utils.autocast import autocast_dtype
from lightning_lora.utils.sharding import is_sharded


class FrozenWeight(NamedTuple):
    """A weight (out, in).

    Attributes:
        tensors: the weight itself, or what it is packed in.
        layout: a name in ``WEIGHT_LAYOUTS``, and after spaces what the layout needs to know of this weight.
    """

    tensors: tuple[Tensor, ...]
    layout: str = ""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype; a new tensor if it is packed."""
        layout, details = _read(self.layout)
        return layout.dense(self.tensors, details, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x·Wᵀ + b`` in x's dtype, without a gradient."""
        layout, details = _read(self.layout)
        return layout.linear(self.tensors, details, x, None if bias is None else bias.to(x.dtype))


class WeightLayout(NamedTuple):
    """How many tensors a weight is stored in, and functions from them and the layout's details: with a dtype to the weight, with x and
    a bias to the product."""

    tensors: int
    dense: Callable[[Sequence[Tensor], Sequence[str], torch.dtype], Tensor]
    linear: Callable[[Sequence[Tensor], Sequence[str], Tensor, Tensor | None], Tensor]


class WeightReader:
    """How the layers of one forward, which multiplies by the weight and adds the bias if there is one, store that weight: here as it is."""

    def can_read(self, module: Any, x: Tensor) -> bool:
        """Whether the product with :meth:`stored`, in x's dtype or autocast's, is the layer's own for x now."""
        weight = module.weight
        return (
            type(weight) in (Tensor, nn.Parameter)  # FSDP1 has a plain tensor in its place; other classes have products of their own
            and weight.is_floating_point()
            and not weight.requires_grad
            and weight.dim() == 2  # FSDP1 flattens it between uses
            and weight.device == x.device
            and (x.dtype == weight.dtype or autocast_dtype(x) is not None)
            and not is_sharded(weight)
        )

    def read(self, module: Any) -> FrozenWeight:
        """The weight of a layer that is served."""
        return FrozenWeight((module.weight,))


WEIGHT_LAYOUTS: dict[str, WeightLayout] = {
    "": WeightLayout(
        1,
        dense=lambda tensors, details, dtype: tensors[0].to(dtype),
        linear=lambda tensors, details, x, bias: F.linear(x, tensors[0].to(x.dtype), bias),
    )
}
WEIGHT_READERS: dict[str, WeightReader] = {
    "torch.nn.modules.linear.Linear": WeightReader()
}  # by the qualified name of the class that has the forward


def reader_of(base: type[nn.Module]) -> WeightReader | None:
    """How layers of this class store what their forward multiplies by; None if that does more, or is not known."""
    owner = next(cls for cls in base.__mro__ if "forward" in vars(cls))
    return WEIGHT_READERS.get(qualified_name(owner))


def flatten_weights(weights: Sequence[Tensor | FrozenWeight]) -> tuple[list[Tensor], list[str]]:
    """All the tensors of several weights, and each one's layout: what the schema of an operation has types for."""
    stored = [weight if isinstance(weight, FrozenWeight) else FrozenWeight((weight,)) for weight in weights]
    return [tensor for weight in stored for tensor in weight.tensors], [weight.layout for weight in stored]


def unflatten_weights(tensors: Sequence[Tensor], layouts: Sequence[str]) -> Iterator[FrozenWeight]:
    """The inverse of :func:`flatten_weights`."""
    start = 0
    for layout in layouts:
        end = start + _read(layout)[0].tensors
        yield FrozenWeight(tuple(tensors[start:end]), layout)
        start = end


def _read(layout: str) -> tuple[WeightLayout, list[str]]:
    """What :attr:`Stored.layout` says."""
    name, *details = layout.split(" ")
    return WEIGHT_LAYOUTS[name], details
