"""FP8 products on GPUs with FP8 tensor cores: Triton kernels that quantize and transpose, and torch's row-wise scaled product.

The functions are those of :mod:`lightning_lora.ops.float8`, and their codes and scales are the same to the bit.

The tensor cores multiply only rows by rows: both operands must be contiguous along the summed dimension. The forward pass takes a weight as
it is stored. The backward pass takes its transpose, made anew each time: one byte per entry read and written, a few percent of the
product's time, and no second copy is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.ops.float8 import E4M3
from lightning_lora.ops.triton_low_rank import cdiv, rows_first
from lightning_lora.utils.torch_private import scaled_mm

PARTS = 3  # most tensors side by side in one pass
# Entries of a row in registers at a time, and warps; the second reading of a row comes from the cache. (benchmarks/float8_kernels.py)
CHUNKS = {"narrow": (2048, 8), "wide": (4096, 16)}
WIDE = 8192  # entries of a row
TILE, TILE_WARPS = 128, 8  # of a transposition, both ways


@triton.jit
def _load(part, factor, row, column, cols, stride, CHUNK: tl.constexpr, SCALED: tl.constexpr):
    c = column + tl.arange(0, CHUNK)
    x = tl.load(part + row.to(tl.int64) * stride + c, mask=c < cols, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(factor + c, mask=c < cols, other=0.0)
    return x


@triton.jit
def _largest(found, part, factor, row, cols, stride, CHUNK: tl.constexpr, SCALED: tl.constexpr):
    """Return the largest magnitudes so far, as bits: integers order them as numbers, NaN above infinity."""
    for column in range(0, cols, CHUNK):
        x = _load(part, factor, row, column, cols, stride, CHUNK, SCALED)
        found = tl.maximum(found, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return found


@triton.jit
def _store(codes, inverse, part, factor, row, cols, stride, CHUNK: tl.constexpr, SCALED: tl.constexpr):
    for column in range(0, cols, CHUNK):
        x = _load(part, factor, row, column, cols, stride, CHUNK, SCALED) * inverse
        c = column + tl.arange(0, CHUNK)
        tl.store(codes + c, x.to(codes.dtype.element_ty), mask=c < cols)


@triton.jit
def _quantize(
    a, b, c, factor_a, factor_b, factor_c, codes, scales, cols_a, cols_b, cols_c, stride_a, stride_b, stride_c, total,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    found = _largest(tl.zeros((CHUNK,), tl.int32), a, factor_a, row, cols_a, stride_a, CHUNK, SCALED)
    if PARTS > 1:
        found = _largest(found, b, factor_b, row, cols_b, stride_b, CHUNK, SCALED)
    if PARTS > 2:
        found = _largest(found, c, factor_c, row, cols_c, stride_c, CHUNK, SCALED)
    bits = tl.minimum(tl.max(found, 0), 0x7F800000)
    exponent = tl.maximum((bits + 0x1FFFFF) >> 23, 9)  # see float8.py
    scale = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
    inverse = ((262 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(scales + row, tl.where(bits == 0x7F800000, float("nan"), scale))
    codes += row.to(tl.int64) * total
    _store(codes, inverse, a, factor_a, row, cols_a, stride_a, CHUNK, SCALED)
    if PARTS > 1:
        _store(codes + cols_a, inverse, b, factor_b, row, cols_b, stride_b, CHUNK, SCALED)
    if PARTS > 2:
        _store(codes + cols_a + cols_b, inverse, c, factor_c, row, cols_c, stride_c, CHUNK, SCALED)


@triton.jit
def _transpose(w, out, rows, cols, total, TILE: tl.constexpr):
    r = tl.program_id(1) * TILE + tl.arange(0, TILE)
    c = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tile = tl.load(w + r.to(tl.int64)[:, None] * cols + c[None, :], mask=(r < rows)[:, None] & (c < cols)[None, :], other=0)
    tl.store(out + c.to(tl.int64)[:, None] * total + r[None, :], tl.trans(tile), mask=(c < cols)[:, None] & (r < rows)[None, :])


def quantize_rows(parts: Sequence[Tensor], scales: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Quantize the rows of up to three tensors side by side: see :func:`lightning_lora.ops.float8.quantize_rows`.

    Either all parts have column scales, or none.
    """
    parts, total = [rows_first(part) for part in parts], sum(part.shape[1] for part in parts)
    rows, first = parts[0].shape[0], parts[0]
    codes = torch.empty(rows, total, device=first.device, dtype=E4M3)
    row_scales = torch.empty(rows, device=first.device, dtype=torch.float32)
    scaled, unused = scales[0] is not None, PARTS - len(parts)
    chunk, warps = CHUNKS["wide" if total > WIDE else "narrow"]
    factors = [first if scale is None else scale for scale in scales]
    _quantize[(rows,)](
        *parts, *[first] * unused, *factors, *[first] * unused, codes, row_scales,
        *[part.shape[1] for part in parts], *[0] * unused, *[part.stride(0) for part in parts], *[0] * unused, total,
        CHUNK=chunk, PARTS=len(parts), SCALED=scaled, num_warps=warps)  # fmt: skip
    return codes, row_scales


def transposed(weights: Sequence[Tensor]) -> Tensor:
    """Return ``[W_1ᵀ | W_2ᵀ | …]``: codes (out_k, in) → (in, Σout_k), contiguous."""
    cols, total, start = weights[0].shape[1], sum(codes.shape[0] for codes in weights), 0
    out = torch.empty(cols, total, device=weights[0].device, dtype=torch.uint8)
    for codes in weights:
        rows = codes.shape[0]
        _transpose[(cdiv(cols, TILE), cdiv(rows, TILE))](
            codes.view(torch.uint8), out[:, start:], rows, cols, total, TILE=TILE, num_warps=TILE_WARPS
        )
        start += rows
    return out


def product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``(scale_a∘a)·(scale_b∘b)ᵀ``: codes (N, K), scales (N,), codes (M, K), scales (M,) or None → (N, M)."""
    scale_b = scale_a.new_ones(b.shape[0]) if scale_b is None else scale_b
    return scaled_mm(a.view(E4M3), b.view(E4M3).t(), scale_a=scale_a[:, None], scale_b=scale_b[None], out_dtype=dtype, use_fast_accum=True)
