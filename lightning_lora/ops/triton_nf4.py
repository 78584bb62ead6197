"""Dequantize a 4-bit NormalFloat weight (QLoRA, arXiv:2305.14314) in one Triton kernel, double quantization included.

bitsandbytes makes three passes of it: over the scales, over their offset, over the weight. Launching them takes 53 µs of Python a weight
on the host of an H200, this kernel 25; the GPU takes 76 and 43 µs for 14336 × 4096 (``benchmarks/nf4_kernel.py``). The results are equal
to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.ops.triton_low_rank import cdiv

ENTRIES, WARPS = 8192, 8  # entries of the weight in one program, about


@triton.jit
def _dequantize(
    codes, absmax, values, offset, outer, outer_values, out, scales, outer_shift,
    BLOCKS: tl.constexpr, BYTES: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = block < scales
    scale = tl.load(absmax + block, mask=here, other=0)
    if NESTED:
        outer_scale = tl.load(outer + (block >> outer_shift), mask=here, other=0.0)
        scale = tl.load(outer_values + scale.to(tl.int32)) * outer_scale + tl.load(offset)
    byte = block.to(tl.int64)[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    pair = tl.load(codes + byte, mask=here[:, None], other=0).to(tl.int32)
    first = tl.load(values + (pair >> 4)) * scale[:, None]
    second = tl.load(values + (pair & 15)) * scale[:, None]
    entries = tl.interleave(first.to(out.dtype.element_ty), second.to(out.dtype.element_ty))
    to = block.to(tl.int64)[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(out + to, entries, mask=here[:, None])


def dequantize(tensors: Sequence[Tensor], shape: tuple[int, int], block: int, outer_block: int, dtype: torch.dtype) -> Tensor:
    """Return the dense weight, a new tensor.

    Args:
        tensors: codes, two in a byte; scales, one a block; the 16 values (fp32). With double quantization the scales are codes of a byte,
            and there are their offset (a scalar), scales and 256 values (fp32) too.
        shape: (out, in), a multiple of ``block`` entries.
        block: entries that share a scale, a power of two.
        outer_block: scales that share a scale, a power of two; 0 without double quantization.
        dtype: of the result.
    """
    codes, absmax, values, *nested = tensors
    offset, outer, outer_values = nested or (values, values, values)
    out, blocks = torch.empty(shape, dtype=dtype, device=codes.device), max(1, ENTRIES // block)
    scales = absmax.numel()
    _dequantize[(cdiv(scales, blocks),)](
        codes.view(torch.uint8), absmax, values, offset, outer, outer_values, out, scales, outer_block.bit_length() - 1,
        BLOCKS=blocks, BYTES=block // 2, NESTED=bool(nested), num_warps=WARPS,
        enable_fp_fusion=False)  # fmt: skip # a fused scale·value + offset would be rounded once, not twice
    return out
