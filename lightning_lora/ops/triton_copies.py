"""A Triton kernel that copies several tensors to other dtypes in one launch.

torch's foreach copy gives 65,536 entries to a program. Adapters fill few programs so, and most of a GPU waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

PARTS = 6  # tensors per launch: the factors of three linears
BLOCK, WARPS = 4096, 8


@triton.jit
def _copy(source, target, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < size).to(target.dtype.element_ty), mask=i < size)


@triton.jit
def _copies(
    a, b, c, d, e, f, to_a, to_b, to_c, to_d, to_e, to_f, size_a, size_b, size_c, size_d, size_e, size_f, BLOCK: tl.constexpr
):  # fmt: skip
    part = tl.program_id(1)
    if part == 0:
        _copy(a, to_a, size_a, BLOCK)
    elif part == 1:
        _copy(b, to_b, size_b, BLOCK)
    elif part == 2:
        _copy(c, to_c, size_c, BLOCK)
    elif part == 3:
        _copy(d, to_d, size_d, BLOCK)
    elif part == 4:
        _copy(e, to_e, size_e, BLOCK)
    else:
        _copy(f, to_f, size_f, BLOCK)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target, contiguous and of the same shape."""
    for start in range(0, len(targets), PARTS):
        to, from_ = list(targets[start : start + PARTS]), [source.contiguous() for source in sources[start : start + PARTS]]
        sizes, unused = [target.numel() for target in to], PARTS - len(to)
        _copies[(-(-max(sizes) // BLOCK), len(to))](
            *from_, *from_[:1] * unused, *to, *to[:1] * unused, *sizes, *[0] * unused, BLOCK=BLOCK, num_warps=WARPS
        )
