"""Read a layer's weight as a matrix, and write matrices or random numbers into its factors: what starts of adapters need."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_lora.utils.sharding import full_tensor, local_shard, local_tensor

if TYPE_CHECKING:
    from lightning_lora.layers.base import LoRALayer


def weight_matrix(layer: LoRALayer, why: str) -> Tensor:
    """Return the full weight, dequantized, as an (out, in) matrix in the factors' dtype.

    Args:
        layer: an adapted layer without groups.
        why: the config's field that reads the weight, for the message.

    Raises:
        ValueError: FSDP1 has flattened the weight, so it cannot be read.
    """
    if layer.weight.ndim < 2:
        raise ValueError(f"{why} reads the weight, which FSDP1 has flattened: apply LoRA before wrapping")
    matrix = layer.to_matrix(full_tensor(layer.base_weight().detach())).to(layer.lora_A.dtype)
    return matrix.flatten(0, -2)  # a convolution's matrix has a leading dimension of groups, here one group


def fill_random(layer: LoRALayer) -> None:
    """Fill one factor uniformly in ±1/√fan_in, the other with zeros."""
    random, zero = layer.lora_factors()
    nn.init.kaiming_uniform_(random, a=math.sqrt(5))
    nn.init.zeros_(zero)


def fill_factors(layer: LoRALayer, A: Tensor, B: Tensor) -> None:
    """Copy these matrices, (r, in) and (out, r), into the factors."""
    for factor, value in ((layer.lora_A, A), (layer.lora_B, B)):
        local_tensor(factor).copy_(local_shard(value.reshape(factor.shape), factor))
