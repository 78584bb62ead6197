"""A frozen FP8 weight as products take it: in FP8 both ways on GPUs that multiply FP8, dequantized elsewhere.

In FP8 the forward pass quantizes the rows of x, once for all weights that read it. The backward pass folds each weight's scales into the
columns of dY and quantizes those rows. So the scales of W are outside the sum over its rows, and the codes that serve the forward pass
serve the backward pass too. Gradients of several weights are quantized side by side and multiplied by the weights below one another:
one product, one sum.

A GPU without FP8 tensor cores, another dtype than bf16, or a size that is no multiple of 16 takes the dequantized weight, for the time of
one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops import backends, float8
from lightning_lora.ops.frozen_weight import WEIGHT_LAYOUTS, FrozenWeight, WeightLayout

_UNIT = 16  # the sizes of an FP8 product are multiples of it
_TOGETHER = 3  # most gradients quantized side by side


class Float8Weight(FrozenWeight):
    """A weight of e4m3 codes (out, in), as bytes or in that dtype, with a scale per output channel, (out,) in fp32."""

    layout = "float8"

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.tensors = codes, scale

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight, a new tensor."""
        codes, scale = self.tensors
        return float8.dequantize(codes, scale, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x·Wᵀ + b``."""
        return next(self.products([self], x, [bias]))

    @classmethod
    def products(cls, weights: Sequence[FrozenWeight], x: Tensor, biases: Sequence[Tensor | None]) -> Iterator[Tensor]:
        """Yield ``x·Wᵀ + b`` of each weight. They share the quantized x."""
        kernels = _kernels(weights, x)
        if kernels is None:
            for W, bias in zip(weights, biases, strict=True):
                yield F.linear(x, W.dense(x.dtype), None if bias is None else bias.to(x.dtype))
            return
        rows, scales = kernels.quantize_rows([x], [None])
        for W, bias in zip(weights, biases, strict=True):
            y = kernels.product(rows, scales, *W.tensors, x.dtype)
            yield y if bias is None else y.add_(bias)

    @classmethod
    def input_gradient(cls, weights: Sequence[FrozenWeight], grads: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return ``Σ dY_k·W_k``."""
        kernels = _kernels(weights, grads[0])
        if kernels is None:
            return super().input_gradient(weights, grads, dtype)
        total = None
        for start in range(0, len(grads), _TOGETHER):
            some = weights[start : start + _TOGETHER]
            codes, factors = zip(*[W.tensors for W in some], strict=True)
            rows, scales = kernels.quantize_rows(grads[start : start + _TOGETHER], factors)
            part = kernels.product(rows, scales, kernels.transposed(codes), None, dtype)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total


def _kernels(weights: Sequence[FrozenWeight], x: Tensor) -> Any:
    """Return the functions that multiply in FP8; None if the weights are to be dequantized."""
    if float8.is_emulating():
        return float8
    fits = x.shape[0] > 0 and not any(size % _UNIT for W in weights for size in W.tensors[0].shape)
    if not fits or not backends.multiplies_float8(x):
        return None
    from lightning_lora.ops import triton_float8

    return triton_float8


WEIGHT_LAYOUTS["float8"] = WeightLayout(2, lambda tensors, details: Float8Weight(*tensors))
