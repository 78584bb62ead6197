"""How A and B start, without reading data. Each function fills the factors of one layer; the layer says which is which.

One factor is zero, so that an adapted model starts as the base exactly.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from lightning_lora.registry import register_init

if TYPE_CHECKING:
    from lightning_lora.layers.base import LoRALayer


@register_init("kaiming")
def kaiming(layer: LoRALayer) -> None:
    """Uniform in ±1/√fan_in (Kaiming with a = √5, what ``nn.Linear`` starts with), the other factor zero."""
    random, zero = layer.lora_factors()
    nn.init.kaiming_uniform_(random, a=math.sqrt(5))
    nn.init.zeros_(zero)


@register_init("gaussian")
def gaussian(layer: LoRALayer) -> None:
    """Normal with standard deviation 1/r, the other factor zero (as PEFT's ``init_lora_weights="gaussian"``)."""
    random, zero = layer.lora_factors()
    nn.init.normal_(random, std=1 / layer.rank)
    nn.init.zeros_(zero)
