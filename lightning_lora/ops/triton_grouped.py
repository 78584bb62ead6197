"""A Triton kernel that adds the update of each row's group, ``y += t·Bᵀ`` with another B in each group, in one pass over y.

Rows are sorted by group, and how many each group has is known on the device only. So one program is launched for every tile of rows that
there can be, finds its group from the offsets, and ends at once if it has none.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.ops.triton_low_rank import Tiles, block_of, cdiv

TILES = {"add_": Tiles(64, 128, num_stages=2)}


@triton.jit
def _add(
    y, t, b, offsets, groups, cols, rank, stride_y, stride_t, stride_bg, stride_bc, stride_br,
    BG: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    g = tl.arange(0, BG)
    ends = tl.load(offsets + g, mask=g < groups, other=0)
    starts = tl.load(offsets + g - 1, mask=(g > 0) & (g < groups), other=0)
    tiles = (ends - starts + BT - 1) // BT
    last = tl.cumsum(tiles, 0)
    tile = tl.program_id(0)
    group = tl.sum((last <= tile).to(tl.int32), 0)
    if group < groups:
        mine = g == group
        start = tl.sum(tl.where(mine, starts + (tile - last + tiles) * BT, 0), 0)
        row = start + tl.arange(0, BT)
        inside = row < tl.sum(tl.where(mine, ends, 0), 0)
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        out = y + row.to(tl.int64)[:, None] * stride_y + c[None, :]
        low = t + row.to(tl.int64)[:, None] * stride_t
        high = b + group.to(tl.int64) * stride_bg + c[None, :] * stride_bc
        old = tl.load(out, mask=inside[:, None] & (c < cols)[None, :], other=0.0)
        total = tl.zeros((BT, BC), tl.float32)
        for begin in range(0, rank, BR):
            r = begin + tl.arange(0, BR)
            part = tl.load(low + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0.0)
            weight = tl.load(high + r[:, None] * stride_br, mask=(c < cols)[None, :] & (r < rank)[:, None], other=0.0)
            total = tl.dot(part, weight, total, input_precision="ieee")
        tl.store(out, (old.to(tl.float32) + total).to(y.dtype.element_ty), mask=inside[:, None] & (c < cols)[None, :])


def add_(y: Tensor, t: Tensor, B: Tensor, offsets: Tensor) -> Tensor:
    """Compute ``y += t·B_gᵀ`` in place for the rows of each group g. Rows after the last group stay as they are.

    Args:
        y: (N, C), its rows contiguous.
        t: (N, R), its rows contiguous.
        B: (groups, C, R), of any strides.
        offsets: (groups,), where each group's rows end; int32.
    """
    (rows, cols), (groups, _, rank), tiles = y.shape, B.shape, TILES["add_"]
    _add[(cdiv(rows, tiles.BT) + groups, cdiv(cols, tiles.BC))](
        y, t, B, offsets, groups, cols, rank, y.stride(0), t.stride(0), *B.stride(),
        BG=triton.next_power_of_2(groups), BR=block_of(rank), **tiles.options)  # fmt: skip
    return y
