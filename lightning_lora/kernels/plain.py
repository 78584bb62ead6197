"""The rank-r products with torch operations: what the Triton kernels are tested against, and what every other device runs.

N tokens, D features, R the rank. ``drop`` is None, or says which entries of an (N, D) tensor count as zero: here a mask of bools,
in the kernels a seed with a threshold. The factor that makes up for them is the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

Drop = tuple[Tensor, int]


def draw_drop(x: Tensor, dropout: float) -> tuple[Drop, float]:
    """Which entries of x to drop, and with what probability exactly.

    On a CPU, drawing one random number an entry takes longer than the rank-r products. There one 64-bit draw serves four
    entries, so the probability is a multiple of 2⁻¹⁶.
    """
    if x.device.type != "cpu":
        return (torch.empty_like(x, dtype=torch.bool).bernoulli_(dropout), 0), dropout
    level = round(dropout * 2**16)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return ((draws.view(torch.int16)[: x.numel()] < level - 2**15).view(x.shape), 0), level / 2**16


def zeroed(x: Tensor, drop: Drop | None) -> Tensor:
    """x with its dropped entries at zero."""
    return x if drop is None else x.masked_fill(drop[0], 0)


def project(x: Tensor, A: Tensor, drop: Drop | None = None) -> Tensor:
    """``drop(x)·Aᵀ``: (N, D), (R, D) → (N, R)."""
    return zeroed(x, drop) @ A.t()


def add_(y: Tensor, t: Tensor, B: Tensor, drop: Drop | None = None) -> Tensor:
    """``y += drop(t·Bᵀ)`` in place: (N, C), (N, R), (C, R) → y."""
    return y.addmm_(t, B.t()) if drop is None else y.add_(zeroed(t @ B.t(), drop))


def reduce(t: Tensor, x: Tensor, drop: Drop | None = None) -> Tensor:
    """``tᵀ·drop(x)``, the sum over the tokens: (N, R), (N, D) → (R, D)."""
    return t.t() @ zeroed(x, drop)


def both(g: Tensor, B: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``g·B`` and ``gᵀ·t``: (N, C), (C, R), (N, R) → (N, R), (C, R)."""
    return g @ B, g.t() @ t
