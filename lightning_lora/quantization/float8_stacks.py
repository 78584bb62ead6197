"""FP8 stacks, such as experts: e4m3 codes with a scale per matrix and output channel, as :class:`~.float8.Float8Linear` has them.

Products dequantize, on every device: the codes of the experts are a byte each in memory, and a product reads them once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lora.ops import float8
from lightning_lora.ops.frozen_stack import FrozenStack
from lightning_lora.ops.frozen_weight import WEIGHT_LAYOUTS, WeightLayout
from lightning_lora.quantization.stacks import STACK_FORMATS, Packed, StackFormat


class Float8Stack(FrozenStack):
    """Codes (..., m, n) as bytes, scales (..., m, 1) or (..., 1, n) in fp32, powers of two."""

    name = "float8-stack"

    @property
    def leading(self) -> torch.Size:
        """The leading dimensions."""
        return self.tensors[0].shape[:-2]

    def stored(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized matrices. Exact in bf16 and wider, rounded once in fp16."""
        codes, scale = self.tensors
        wide = torch.float32 if dtype == torch.float16 else dtype  # whose range is too small for some scales
        return codes.view(float8.E4M3).to(wide).mul_(scale.to(wide)).to(dtype)


class Float8StackFormat(StackFormat):
    """``quantize="fp8"``."""

    name = "fp8"
    beside = ("scale",)

    def pack(self, weight: Tensor, transposed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize matrix by matrix, each output channel with a scale of its own."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scales = []
        for matrix, into in zip(weight.unbind(0), codes.unbind(0), strict=True):
            rows, scale = float8.quantize_rows([matrix.mT if transposed else matrix], [None])
            into.copy_((rows.mT if transposed else rows).view(torch.uint8))
            scales.append(scale[None] if transposed else scale[:, None])
        return codes, {"scale": torch.stack(scales)}

    def stack(self, codes: Tensor, packed: Packed) -> FrozenStack:
        """Return the weight as products take it."""
        rows, columns = packed.shape[-2:]
        return Float8Stack((codes, packed.tensors["scale"]), (rows, columns), packed.dtype)


WEIGHT_LAYOUTS[Float8Stack.name] = WeightLayout(2, Float8Stack.made)
STACK_FORMATS[Float8StackFormat.name] = Float8StackFormat()
