"""Fill A and B with random numbers. The base is not read."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_lora.layers.filling import fill_factors
from lightning_lora.layers.whole_factors import check_pairs
from lightning_lora.registry import register_init

if TYPE_CHECKING:
    from lightning_lora.layers.base import LoRALayer
    from lightning_lora.layers.spec import LayerSpec


@register_init("kaiming")
def kaiming(layer: LoRALayer) -> None:
    """Fill one factor uniformly in ±1/√fan_in (Kaiming with a = √5, the default of ``nn.Linear``), the other with zeros."""
    random, zero = layer.lora_factors()
    nn.init.kaiming_uniform_(random, a=math.sqrt(5))
    nn.init.zeros_(zero)


@register_init("gaussian")
def gaussian(layer: LoRALayer) -> None:
    """Fill one factor from a normal distribution with standard deviation 1/r, the other with zeros. PEFT's ``"gaussian"`` is the same."""
    random, zero = layer.lora_factors()
    nn.init.normal_(random, std=1 / layer.rank)
    nn.init.zeros_(zero)


def _splits_in_halves(module: Any, spec: LayerSpec, A: tuple[int, ...], B: tuple[int, ...]) -> None:
    check_pairs(module, spec, A, B, "init='orthogonal'")
    if spec.rank % 2:
        raise ValueError(f"init='orthogonal' needs an even rank, here rank={spec.rank}; choose another rank or init")


@register_init("orthogonal", check=_splits_in_halves)
def orthogonal(layer: LoRALayer) -> None:
    """Fill A and B with random values in orthogonal subspaces of the r dimensions (as in PEFT). So B·A = 0.

    r must be even. Layers with groups or a padding row are refused.
    """
    r = layer.rank
    draw = partial(torch.randn, dtype=layer.lora_A.dtype, device="cpu")  # the default dtype may be half precision, which has no QR
    Q, _ = torch.linalg.qr(draw(r, r))
    A = Q[0::2].t() @ draw(r // 2, layer.lora_A[0].numel()) / 10
    B = draw(layer.lora_B.shape[0], r // 2) @ Q[1::2] / 10
    fill_factors(layer, A, B)
