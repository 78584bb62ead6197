"""A kind that no type tells: a linear that is q, k and v below one another, each with an adapter of its own.

It is what ``kind_pattern`` is for (Phi-3's ``qkv_proj`` is a plain ``nn.Linear``), and its file is plain LoRA of three times the rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.factors import Exported
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.registry import register_kind

PARTS = 3


@register_kind(name="test_qkv")
class LoRAFusedQKV(LoRALinear):
    """``lora_A`` (3r, in), ``lora_B`` (out, r): a third of the rows of B meets a third of the rows of A."""

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (PARTS * spec.rank, module.in_features), (module.out_features, spec.rank)

    @classmethod
    def check(cls, module: Any, spec: LayerSpec) -> None:
        super().check(module, spec)
        if getattr(module, "out_features", 1) % PARTS:
            raise ValueError(f"its outputs cannot be shared out among {PARTS} parts")

    def update_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, torch.block_diag(*self.lora_B.chunk(PARTS))

    def exported(self) -> Exported:
        return replace(super().exported(), rank=PARTS * self.rank, alpha=PARTS * self.alpha, kind=None)
