"""Frozen weights as the fused operations use them: objects that multiply, whatever format the layer stores the weight in.

A quantized weight is dequantized inside the operation that multiplies by it, one weight at a time, and again in the backward pass.
Neither autograd nor a compiler ever keeps it dense. A layer qualifies only if its forward is known to compute the same as the fused
operation.

Eager code passes the objects themselves from the forward to the backward pass. A compiler's operations take only tensors and strings.
There a weight is its tensors and a string that describes its layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.registry import qualified_name
from lightning_lora.utils import custom_op
from lightning_lora.utils.autocast import autocast_dtype


class FrozenWeight:
    """A weight (out, in) in floating point. Subclasses are quantized weights.

    Attributes:
        tensors: the tensors that store it.
        layout: a name in ``WEIGHT_LAYOUTS``, then, separated by spaces, what the layout needs to know of this weight.
    """

    tensors: tuple[Tensor, ...]
    layout: str = ""

    def __init__(self, weight: Tensor) -> None:
        self.tensors = (weight,)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in a dtype; a new tensor if it is quantized."""
        weight = self.tensors[0]
        return weight if weight.dtype == dtype else weight.to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x·Wᵀ + b`` in x's dtype, without a gradient."""
        return F.linear(x, self.dense(x.dtype), bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype))

    @classmethod
    def products(cls, weights: Sequence[FrozenWeight], x: Tensor, biases: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """Yield :meth:`linear` of each weight. A subclass may share work on x between weights of its class."""
        for W, bias in zip(weights, biases, strict=True):
            yield W.linear(x, bias)

    @classmethod
    def input_gradient(cls, weights: Sequence[FrozenWeight], grads: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return ``Σ dY_k·W_k``, (N, in), a new tensor; the gradients dY_k (N, out_k) have this dtype."""
        dx = grads[0] @ weights[0].dense(dtype)
        for grad, W in zip(grads[1:], weights[1:], strict=True):
            dx.addmm_(grad, W.dense(dtype))
        return dx


class WeightLayout(NamedTuple):
    """How to rebuild a weight: the number of its tensors, and a function of the tensors and of the words after the layout's name."""

    tensors: int
    make: Callable[[Sequence[Tensor], tuple[str, ...]], FrozenWeight]


class WeightReader:
    """Reads the frozen weight of layers whose forward is exactly ``x·Wᵀ + b``. This base class reads a floating-point weight."""

    def read(self, module: Any, x: Tensor) -> FrozenWeight | None:
        """Return the layer's weight, None if the fused operation may not replace the layer's own forward for this x.

        It may only if the product in x's dtype, or in autocast's, is what the layer itself would compute.
        """
        weight = module.weight
        if (
            type(weight) in (Tensor, nn.Parameter)  # FSDP1 puts a plain tensor here; other subclasses define their own products
            and weight.is_floating_point()
            and not weight.requires_grad
            and weight.dim() == 2  # FSDP1 flattens it between uses
            and weight.device == x.device
            and (x.dtype == weight.dtype or autocast_dtype(x) is not None)
        ):
            return FrozenWeight(weight)
        return None


WEIGHT_LAYOUTS: dict[str, WeightLayout] = {"": WeightLayout(1, lambda tensors, details: FrozenWeight(tensors[0]))}
#: Qualified name of the class that defines the forward → reader.
WEIGHT_READERS: dict[str, WeightReader] = {"torch.nn.modules.linear.Linear": WeightReader()}


def reader_of(base: type[nn.Module]) -> WeightReader | None:
    """Return the reader for layers of this class, None if their forward does more than multiply or is not known."""
    owner = next(cls for cls in base.__mro__ if "forward" in vars(cls))
    return WEIGHT_READERS.get(qualified_name(owner))


def flatten_weights(weights: Sequence[Tensor | FrozenWeight]) -> tuple[list[Tensor], list[FrozenWeight] | list[str]]:
    """Return all tensors of several weights, and what :func:`unflatten_weights` needs to rebuild them.

    The latter is the weights themselves, or under a compiler their layouts.
    """
    frozen = [weight if isinstance(weight, FrozenWeight) else FrozenWeight(weight) for weight in weights]
    tensors = [tensor for weight in frozen for tensor in weight.tensors]
    operators = custom_op.without_values or torch.compiler.is_compiling()
    return (tensors, [weight.layout for weight in frozen]) if operators else (tensors, frozen)


def unflatten_weights(tensors: Sequence[Tensor], layouts: Sequence[FrozenWeight] | Sequence[str]) -> Sequence[FrozenWeight]:
    """Rebuild weights: the inverse of :func:`flatten_weights`."""
    weights, start = [], 0
    for layout in layouts:
        if isinstance(layout, FrozenWeight):
            return layouts  # type: ignore[return-value]
        size, make, details = _parsed(layout)
        weights.append(make(tensors[start : start + size], details))
        start += size
    return weights


@functools.cache  # a compiled step rebuilds every weight twice
def _parsed(layout: str) -> tuple[int, Callable[[Sequence[Tensor], tuple[str, ...]], FrozenWeight], tuple[str, ...]]:
    name, *details = layout.split(" ")
    return *WEIGHT_LAYOUTS[name], tuple(details)


def base_products(weights: Sequence[FrozenWeight], x: Tensor, biases: Sequence[Tensor | None]) -> Iterator[Tensor]:
    """Yield ``x·Wᵀ + b`` of each weight, a new tensor each."""
    return _class_of(weights).products(weights, x, biases)


def input_gradient(weights: Sequence[FrozenWeight], grads: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the gradient of x from those of the products, ``Σ dY_k·W_k``, a new tensor."""
    return _class_of(weights).input_gradient(weights, grads, dtype)


def _class_of(weights: Sequence[FrozenWeight]) -> type[FrozenWeight]:
    """Return the class of all the weights; the base class if they differ."""
    return type(weights[0]) if len({type(W) for W in weights}) == 1 else FrozenWeight
