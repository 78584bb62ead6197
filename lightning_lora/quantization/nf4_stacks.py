"""NF4 stacks, such as experts (QLoRA, arXiv:2305.14314): bitsandbytes' 4-bit NormalFloat with double quantization, matrix by matrix.

Each matrix has the codes that a ``Linear4bit`` of it would have: blocks of 64 entries along its rows, whose scales are 8-bit codes with a
scale per 256 of them. What bitsandbytes keeps in a ``QuantState`` per weight is here in tensors (E, ...) for all matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lora.ops.frozen_stack import FrozenStack
from lightning_lora.ops.frozen_weight import WEIGHT_LAYOUTS, WeightLayout
from lightning_lora.quantization.bitsandbytes import FrozenWeight4bit, Layout4bit, library_of
from lightning_lora.quantization.stacks import STACK_FORMATS, Packed, StackFormat

BLOCK, OUTER = 64, 256  # entries that share a scale; scales that share one
_NATIVE = (torch.float16, torch.bfloat16, torch.float32)  # what the library dequantizes to


class NF4Stack(FrozenStack):
    """Codes (..., m·n/2) and scales (..., blocks) as bytes, the scales' offsets (...) and scales (..., blocks/256); 256 and 16 values."""

    name = "nf4-stack"
    tables = 2

    @property
    def leading(self) -> torch.Size:
        """The leading dimensions."""
        return self.tensors[0].shape[:-1]

    def stored(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized matrices, equal to the bit to what the library gives for each."""
        codes, scales, offset, outer, nested, values = self.tensors
        blocks = scales.shape[-1]
        wide = outer.repeat_interleave(OUTER, -1)[..., :blocks]
        absmax = (nested[scales.int()] * wide + offset[..., None]).flatten()
        direct = dtype if dtype in _NATIVE else torch.float32
        # As one weight whose rows are its blocks: CPUs with AVX512 read others wrong (see bitsandbytes.py).
        together = FrozenWeight4bit((codes.reshape(-1), absmax, values), Layout4bit("nf4", BLOCK, absmax.numel(), BLOCK))
        return together.dense(direct).view(*self.leading, *self.size_stored).to(dtype)


class NF4StackFormat(StackFormat):
    """``quantize="nf4"``."""

    name = "nf4"
    beside = ("absmax", "offset", "nested_absmax", "nested_quant_map", "quant_map")
    unit = BLOCK

    def pack(self, weight: Tensor, transposed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize matrix by matrix, along the rows as they are stored."""
        functional = library_of().functional
        codes, states = [], list[Any]()
        for matrix in weight.unbind(0):
            plain = matrix if matrix.dtype in _NATIVE else matrix.float()
            code, state = functional.quantize_4bit(plain.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
            codes.append(code.view(torch.uint8).flatten())
            states.append(state)
        parts = {
            "absmax": torch.stack([state.absmax for state in states]),
            "offset": torch.stack([state.offset.reshape(()) for state in states]),
            "nested_absmax": torch.stack([state.state2.absmax for state in states]),
            "nested_quant_map": states[0].state2.code,
            "quant_map": states[0].code,
        }
        return torch.stack(codes), parts

    def stack(self, codes: Tensor, packed: Packed) -> FrozenStack:
        """Return the weight as products take it."""
        rows, columns = packed.shape[-2:]
        return NF4Stack((codes, *[packed.tensors[name] for name in self.beside]), (rows, columns), packed.dtype)


WEIGHT_LAYOUTS[NF4Stack.name] = WeightLayout(6, NF4Stack.made)
STACK_FORMATS[NF4StackFormat.name] = NF4StackFormat()
