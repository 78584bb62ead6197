"""The factors A and B as products take them: copies in the activations' dtype, which is narrower than an adapter's.

The backward pass needs them again. Copies of small factors are kept for it. Those of wide ones are made again, because they weigh more than
copying takes: at rank 256, all linears of an 8B model, 1.3 GiB against 0.3 % of a step's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KEPT_RANK = 64


def working_copies(backend: Any, A_list: Sequence[Tensor], B_list: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the A's stacked by rows, then each B (or any other tensors given in its place), contiguous and in the activations' dtype. One
    launch casts them all."""
    if {factor.dtype for factor in (*A_list, *B_list)} == {dtype}:
        return [A_list[0].contiguous() if len(A_list) == 1 else torch.cat(list(A_list)), *[B.contiguous() for B in B_list]]
    shapes = [(sum([A.shape[0] for A in A_list]), A_list[0].shape[1]), *[B.shape for B in B_list]]
    copies = [torch.empty(shape, dtype=dtype, device=A_list[0].device) for shape in shapes]
    backend.copy_all([*copies[0].split([A.shape[0] for A in A_list]), *copies[1:]], [*A_list, *B_list])
    return copies


def keeps_copies(B_list: Sequence[Tensor]) -> bool:
    """True if the factors' copies (out_k, r_k) are kept for the backward pass."""
    return max([B.shape[1] for B in B_list]) <= KEPT_RANK
