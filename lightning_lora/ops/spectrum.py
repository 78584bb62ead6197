"""Singular values of B·A from two r × r matrices, for many layers at once, and the ranks that they say.

With Gram matrices ``G_A = A·Aᵀ`` and ``G_B = Bᵀ·B``, and ``G_A = L·Lᵀ`` (the triangle of a QR decomposition of Aᵀ is Lᵀ), the squares of
the singular values are the eigenvalues of ``Lᵀ·G_B·L``. The products run where the factors are. Only r × r matrices leave that device:
LAPACK decomposes many small ones faster than a GPU does. A Gram matrix squares the condition number, so all is float64, and each pair of
row and column is first scaled to equal norms. The error is about 1e-7 of ``‖B‖·‖A‖`` after that scaling; the singular vectors, and an
error of 1e-16, are in :mod:`lightning_lora.ops.low_rank_svd`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gram_matrices(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``A·Aᵀ`` and ``Bᵀ·B``, (..., r, r), in float64; in float32 on MPS, which has no other.

    Costs 2·r²·(in + out) floating-point operations.

    Args:
        A: (..., r, in).
        B: (..., out, r).
    """
    wide = torch.float32 if A.device.type == "mps" else torch.float64
    A, B = A.to(wide), B.to(wide)
    return A @ A.mT, B.mT @ B


def singular_values(G_A: Tensor, G_B: Tensor) -> Tensor:
    """Return the singular values of B·A, (..., r), descending, in float64 on the CPU.

    Args:
        G_A, G_B: of :func:`gram_matrices`, (..., r, r). NaN where they hold NaN or infinity.
    """
    tiny = torch.finfo(G_A.dtype).tiny
    a, b = (G.diagonal(dim1=-2, dim2=-1) for G in (G_A, G_B))
    # A zero row of A or column of B makes the pair add nothing; it is left out.
    scale = torch.where((a <= tiny) | (b <= tiny), 0.0, (b / a.clamp_min(tiny)) ** 0.25)
    inverse = torch.where(scale > 0, 1 / scale.clamp_min(tiny), 0.0)
    G_A = G_A * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    G_B = G_B * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    largest = G_A.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    damping = (4 * G_A.shape[-1] * torch.finfo(G_A.dtype).eps * largest).clamp_min(tiny)
    L, _ = torch.linalg.cholesky_ex(G_A + torch.diag_embed(damping.expand(G_A.shape[:-1])))
    core = (L.mT @ G_B @ L).cpu().double()
    sound = core.isfinite().all(-1).all(-1)  # LAPACK refuses others
    squares = torch.linalg.eigvalsh(torch.where(sound[..., None, None], core, 0.0)).flip(-1)
    return torch.where(sound.unsqueeze(-1), squares.clamp_min(0.0).sqrt(), torch.nan)


def stable_rank(S: Tensor) -> Tensor:
    """Return ``Σ σ² / σ₁²``, (...); 0 where all are zero (Rudelson and Vershynin, arXiv:math/0503442).

    Args:
        S: singular values, (..., r).
    """
    largest = S.amax(-1)
    return torch.where(largest == 0, 0.0, (S / largest.unsqueeze(-1)).square().sum(-1))


def effective_rank(S: Tensor) -> Tensor:
    """Return ``exp(−Σ p·log p)`` with ``p = σ / Σ σ``, (...); 0 where all are zero (Roy and Vetterli, EUSIPCO 2007).

    Args:
        S: singular values, (..., r).
    """
    total = S.sum(-1, keepdim=True)
    return torch.where(total[..., 0] == 0, 0.0, torch.special.entr(S / total).sum(-1).exp())
