"""LoftQ: A and B start as what quantizing the weight lost, so that the adapted model begins near the base in full precision.

``quantize_base(model, how, lora=config)`` computes them (:mod:`lightning_lora.model.quantize`), because only it has both weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_lora.layers.filling import fill_factors
from lightning_lora.layers.spec import LayerSpec, Option
from lightning_lora.layers.whole_factors import check_pairs
from lightning_lora.quantization.content import lost_factors
from lightning_lora.quantization.formats import format_of
from lightning_lora.registry import for_packed_base, register_init

if TYPE_CHECKING:
    from lightning_lora.layers.base import LoRALayer


def _is_quantized(module: Any, spec: LayerSpec, A: tuple[int, ...], B: tuple[int, ...]) -> None:
    check_pairs(module, spec, A, B, "init='loftq'")
    if format_of(module) is None:
        raise ValueError(
            "init='loftq' belongs to a quantized base, and its weight is not quantized; quantize it with quantize_base(model, how,"
            " lora=config) or LoRACallback(quantize=...), or exclude it"
        )


@register_init(
    "loftq",
    check=_is_quantized,
    options={"iterations": Option(1, lambda value: type(value) is int and 1 <= value <= 1000, "a whole number ≥ 1, such as 5")},
)
@for_packed_base
def loftq(layer: LoRALayer) -> None:
    """Fill A and B such that Q + s·B·A ≈ W, for the quantized weight Q of W (LoftQ, arXiv:2310.08659, algorithm 1).

    Options:
        iterations: of the alternation between quantizing W − s·B·A and decomposing W − Q. Default 1: Q is the quantized W. With more, Q
            is another one, which the adapter needs.
    """
    lost = lost_factors(layer)
    if lost is None:  # an adapter file follows
        nn.init.zeros_(layer.lora_A)
        nn.init.zeros_(layer.lora_B)
    elif not layer.lora_A.is_meta:
        fill_factors(layer, *lost)
