"""The singular value decomposition of B·A from its factors, without the dense product.

With B = Q_B·R_B and Aᵀ = Q_A·R_A, both Q with orthonormal columns, ``B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ``. The singular values are those of the
r × r matrix in the middle.
"""

from __future__ import annotations

import torch
from torch import Tensor


def svd_of_product(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, k), S (k,) descending and Vh (k, in) with ``U·diag(S)·Vh = B·A``, in float64. k is the smallest of out, r and in.

    Args:
        B: (out, r).
        A: (r, in).
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def rank_for_energy(S: Tensor, energy: float) -> int:
    """Return the smallest rank ≥ 1 whose largest singular values have this share of ``Σ S²``.

    Args:
        S: singular values, descending.
        energy: in (0, 1].
    """
    kept = S.double().square().cumsum(0)
    # A product of rank r has singular values of rounding errors beyond r, which no share asks for.
    enough = kept >= energy * kept[-1] * (1 - 1e-12)
    return int(enough.to(torch.int8).argmax()) + 1


def check_energy(energy: object) -> None:
    """Raise ValueError for what is no share of ``Σ S²``."""
    if isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r}: give a share in (0, 1], such as 0.95.")


def balanced(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (out, rank) and A (rank, in), the best approximation of that rank. Each takes the root of the singular values."""
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root.unsqueeze(1) * Vh[:rank]
