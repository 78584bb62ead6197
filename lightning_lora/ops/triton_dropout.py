"""Dropout without a stored mask: a seed and a counter determine for every entry whether it is kept, the same in every kernel."""

import triton
import triton.language as tl


@triton.jit
def kept(seed, row, column, cols, threshold, BT: tl.constexpr, BC: tl.constexpr):
    """Return which entries of a (BT, BC) tile are kept: those whose 16 random bits reach ``threshold`` = p·2¹⁶.

    One Philox4x32-7 draw (Salmon et al. 2011: 7 rounds pass BigCrush) serves eight neighbouring entries of a row.

    Args:
        seed: of the call.
        row: (BT,), the rows of the tile.
        column: the tile's first column, a multiple of 8.
        cols: the number of columns of the tensor.
        threshold: p·2¹⁶.
        BT: rows per tile.
        BC: columns per tile.
    """
    octets = column // 8 + tl.arange(0, BC // 8)
    counter = row[:, None] * ((cols + 7) // 8) + octets[None, :]
    a, b, c, d = tl.randint4x(seed, counter, 7)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    bits = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    return tl.reshape(bits, (BT, BC)).to(tl.int32) >= threshold
