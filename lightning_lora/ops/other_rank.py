"""The directions of a product B·A at a lower rank, as linear maps between the old directions and the new ones.

Row i of A and column i of B are a *direction*. New factors ``A' = T·A`` and ``B' = B·S`` with T (k, r), S (r, k) and ``T·S = I`` are the
best approximation of B·A of rank k. They are computed from r × r matrices: with ``B = Q_B·R_B`` and ``A = R·Q_Aᵀ``, the decomposition
``R_B·R = U·Σ·Vᵀ`` gives ``T = c·V_kᵀ·R⁺`` and ``S = R·V_k/c``. So the rows of A' are orthogonal, and B' holds the singular values, as in
LoRA A starts at random and B at zero. c keeps the mean length of A's rows, so that T is close to a rotation.

The same maps carry gradients over: ``g_A' = Sᵀ·g_A`` and ``g_B' = g_B·Tᵀ``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_directions(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return T (..., k, r) and S (..., r, k), in float64. k is the rank, or less if B·A has fewer directions.

    Args:
        A: the factor that starts at random, finite, (..., r, in).
        B: the other factor, (..., out, r).
        rank: wanted, ≤ r.
    """
    A, B = A.double(), B.double()
    R = torch.linalg.qr(A.mT).R.mT  # (..., r, n) with n = min(r, in)
    V = torch.linalg.svd(torch.linalg.qr(B).R @ R, full_matrices=False).Vh[..., :rank, :].mT
    length = (A.square().sum((-2, -1), keepdim=True) / A.shape[-2]).sqrt()
    length = torch.where(length > 0, length, 1.0)
    return length * V.mT @ torch.linalg.pinv(R), R @ V / length
