"""Frozen weights as an operation takes them: something that multiplies, whatever the layer stores it in.

A packed weight is unpacked inside the operation that multiplies by it, and again in the backward pass, one weight at a time: neither
autograd nor a compiler ever holds it dense. Which layers can be read so is told by their forward, for it has to do what the operation does.

Eager code hands the objects themselves from the forward to the backward pass. A compiler's operations take tensors and strings only: there
a weight is its tensors, and a string that says its layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.registry import qualified_name
from lightning_lora.utils.autocast import autocast_dtype


class FrozenWeight:
    """A weight (out, in) in floating point; a subclass is a packed one.

    Attributes:
        tensors: what it is stored in.
        layout: a name in ``WEIGHT_LAYOUTS``, and after spaces what the layout needs to know of this weight.
    """

    tensors: tuple[Tensor, ...]
    layout: str = ""

    def __init__(self, weight: Tensor) -> None:
        self.tensors = (weight,)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype; a new tensor if it is packed."""
        weight = self.tensors[0]
        return weight if weight.dtype == dtype else weight.to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x·Wᵀ + b`` in x's dtype, without a gradient."""
        return F.linear(x, self.dense(x.dtype), bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))


class WeightLayout(NamedTuple):
    """How to make a weight of its tensors: how many they are, and a function of them and of the words after the layout's name."""

    tensors: int
    make: Callable[[Sequence[Tensor], Sequence[str]], FrozenWeight]


class WeightReader:
    """Reads the frozen weight of layers whose forward is exactly ``x·Wᵀ + b``; this one reads a floating-point weight."""

    def read(self, module: Any, x: Tensor) -> FrozenWeight | None:
        """The layer's weight; None if the product with it, in x's dtype or autocast's, is not the layer's own for x now."""
        weight = module.weight
        if (
            type(weight) in (Tensor, nn.Parameter)  # FSDP1 has a plain tensor in its place; other classes have products of their own
            and weight.is_floating_point()
            and not weight.requires_grad
            and weight.dim() == 2  # FSDP1 flattens it between uses
            and weight.device == x.device
            and (x.dtype == weight.dtype or autocast_dtype(x) is not None)
        ):
            return FrozenWeight(weight)
        return None


WEIGHT_LAYOUTS: dict[str, WeightLayout] = {"": WeightLayout(1, lambda tensors, details: FrozenWeight(tensors[0]))}
#: By the qualified name of the class that has the forward.
WEIGHT_READERS: dict[str, WeightReader] = {"torch.nn.modules.linear.Linear": WeightReader()}


def reader_of(base: type[nn.Module]) -> WeightReader | None:
    """What reads the weight of layers of this class; None if their forward does more than multiply, or is not known."""
    owner = next(cls for cls in base.__mro__ if "forward" in vars(cls))
    return WEIGHT_READERS.get(qualified_name(owner))


def flatten_weights(weights: Sequence[Tensor | FrozenWeight]) -> tuple[list[Tensor], list[FrozenWeight] | list[str]]:
    """All the tensors of several weights, and what :func:`unflatten_weights` needs beside them: the weights themselves, or under a
    compiler their layouts."""
    frozen = [weight if isinstance(weight, FrozenWeight) else FrozenWeight(weight) for weight in weights]
    tensors = [tensor for weight in frozen for tensor in weight.tensors]
    return (tensors, [weight.layout for weight in frozen]) if torch.compiler.is_compiling() else (tensors, frozen)


def unflatten_weights(tensors: Sequence[Tensor], layouts: Sequence[FrozenWeight] | Sequence[str]) -> Sequence[FrozenWeight]:
    """The inverse of :func:`flatten_weights`."""
    weights, start = [], 0
    for layout in layouts:
        if isinstance(layout, FrozenWeight):
            return layouts  # type: ignore[return-value]
        name, *details = layout.split(" ")
        size, make = WEIGHT_LAYOUTS[name]
        weights.append(make(tensors[start : start + size], details))
        start += size
    return weights
