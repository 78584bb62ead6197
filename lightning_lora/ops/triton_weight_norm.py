"""A Triton kernel for ‖W + s·B·A‖² of every row. It reads W once and computes B·A one tile at a time, in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.ops.triton_low_rank import Tiles, block_of, cdiv

TILES = {"squares": Tiles(64, 128, num_stages=2)}  # rows and columns of W


@triton.jit
def _squares(
    w, a, b, out, rows, cols, rank, stride_w, stride_ar, stride_ac, stride_br, stride_bc, scale,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    tile = tl.load(w + row.to(tl.int64)[:, None] * stride_w + c[None, :], mask=(row < rows)[:, None] & (c < cols)[None, :], other=0.0)
    total = tl.zeros((BT, BC), tl.float32)
    for start in range(0, rank, BR):
        r = start + tl.arange(0, BR)
        low = tl.load(b + row[:, None] * stride_br + r[None, :] * stride_bc, mask=(row < rows)[:, None] & (r < rank)[None, :], other=0.0)
        high = tl.load(a + r[:, None] * stride_ar + c[None, :] * stride_ac, mask=(r < rank)[:, None] & (c < cols)[None, :], other=0.0)
        total = tl.dot(low.to(tile.dtype), high.to(tile.dtype), total, input_precision="ieee")
    total = tile.to(tl.float32) + total * scale
    tl.store(out + tl.program_id(1).to(tl.int64) * rows + row, tl.sum(total * total, 1), mask=row < rows)


def squares(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return ``‖W + scale·B·A‖²`` of every row, as partial sums over groups of columns.

    The caller sums the parts, because a compiler fuses that sum with the operations that follow.

    Args:
        W: (out, in), its last dimension contiguous.
        A: (r, in), of any floating dtype; rounded to W's dtype, as for the layer's own products.
        B: (out, r), likewise.
        scale: α/r.

    Returns:
        (parts, out), fp32.
    """
    (rows, cols), rank = W.shape, A.shape[0]
    tiles = TILES["squares"]
    grid = (cdiv(rows, tiles.BT), parts(cols))
    out = torch.empty(grid[1], rows, device=W.device, dtype=torch.float32)
    _squares[grid](W, A, B, out, rows, cols, rank, W.stride(0), *A.stride(), *B.stride(), scale, BR=block_of(rank), **tiles.options)
    return out


def parts(cols: int) -> int:
    """Return the number of partial sums that :func:`squares` returns for this many columns."""
    return cdiv(cols, TILES["squares"].BC)
