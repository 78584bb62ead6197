"""Hugging Face's ``Conv1D`` (GPT-2): a linear layer that stores its weight transposed, (in, out)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.ops import low_rank
from lightning_lora.registry import register_kind


@register_kind("transformers.pytorch_utils.Conv1D", name="conv1d_hf")  # by name: this package does not import transformers
class LoRAConv1DHF(LoRALayer):
    """``y = xW + b + scaling · B(A·dropout(x))`` with W (in, out), ``lora_A`` (r, in), ``lora_B`` (out, r)."""

    is_linear = reads_rows = True
    transposed = True
    sizes = ("nx", "nf")

    @classmethod
    def weight_shape(cls, module: Any) -> tuple[int, ...]:
        """Return (in, out)."""
        return module.nx, module.nf

    @classmethod
    def adapter_shapes(cls, module: Any, spec: LayerSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A, (r, in), and of B, (out, r)."""
        # Not read from the weight's shape: FSDP1 leaves a flat local shard of it.
        return (spec.rank, module.nx), (module.nf, spec.rank)

    @classmethod
    def example_input(cls, module: Any, generator: torch.Generator) -> Tensor:
        """(2, 3, in)."""
        return torch.randn(2, 3, module.nx, generator=generator, dtype=torch.float64)

    def lora_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y + scaling · B·A·dropout(x)``."""
        return low_rank.lora_update(y, x, *self.update_factors(), self.scaling, self.dropout_now())
