"""The rank-r products in torch operations: the reference that tests the Triton kernels, and the version for every other device.

N tokens, D features, R the rank. ``drop`` says which entries of an (N, D) tensor count as zero, or is None. The caller applies the
factor 1/(1 − p) that compensates for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Drop(NamedTuple):
    """Which entries dropout sets to zero. Each backend interprets ``source`` in its own way.

    Attributes:
        source: here the boolean mask. For the kernels a seed from which they draw the mask each time.
        threshold: for the kernels the probability times 2¹⁶.
    """

    source: Tensor
    threshold: int = 0


def draw_drop(x: Tensor, dropout: float) -> tuple[Drop, float]:
    """Draw which entries of x to drop. Return them with the exact probability.

    On a CPU, drawing one random number per entry takes longer than the rank-r products. There one 64-bit draw serves four entries, so the
    probability is a multiple of 2⁻¹⁶.
    """
    if x.device.type != "cpu":
        return Drop(torch.empty_like(x, dtype=torch.bool).bernoulli_(dropout)), dropout
    level = nearest_level(dropout)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return Drop((draws.view(torch.int16)[: x.numel()] < level - 2**15).view(x.shape)), level / 2**16


def nearest_level(dropout: float) -> int:
    """Return the probability times 2¹⁶, rounded. It stays below 2¹⁶, since all entries zero have no factor that compensates."""
    return min(round(dropout * 2**16), 2**16 - 1)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source to its target of the same shape, whatever their dtypes."""
    torch._foreach_copy_(list(targets), list(sources))


def zeroed(x: Tensor, drop: Drop | None) -> Tensor:
    """Return x with its dropped entries set to zero."""
    return x if drop is None else x.masked_fill(drop.source, 0)


def project(x: Tensor, A: Tensor, drop: Drop | None = None, scale: float = 1.0) -> Tensor:
    """Return ``scale·drop(x)·Aᵀ``: (N, D), (R, D) → (N, R)."""
    return (zeroed(x, drop) @ A.t()) * scale


def add_(y: Tensor, t: Tensor, B: Tensor, drop: Drop | None = None) -> Tensor:
    """Compute ``y += drop(t·Bᵀ)`` in place: (N, C), (N, R), (C, R) → y."""
    return y.addmm_(t, B.t()) if drop is None else y.add_(zeroed(t @ B.t(), drop))


def scaled_sum(z: Tensor, t: Tensor, B: Tensor, out_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``g∘(z − bias + t·Bᵀ) + bias``, a new tensor: (N, C), (N, R), (C, R), (C,), (C,) → (N, C)."""
    return times_scale(z, out_scale, bias).addmm_(t, times_scale(B.t(), out_scale, None))


def times_scale(z: Tensor, out_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``g∘(z − bias) + bias``. Scale and bias have one number per output channel and broadcast over z.

    Computed as ``g∘z + (1 − g)∘bias``. A scale of 1 changes nothing, and one far below 1 leaves no small difference of large numbers.
    """
    y = scaled(z, out_scale)
    return y if bias is None else y.add_(((1 - out_scale) * bias).to(z.dtype))


def scaled(z: Tensor, out_scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``g∘z`` in z's dtype. Rounding g to half precision would lose small changes of it, so the rounding rest is multiplied too.

    In fp16 a g below 6e-5, its smallest normal number, loses digits all the same.
    """
    high = out_scale.to(z.dtype)
    y = torch.mul(z, high, out=out)
    return y if z.dtype == out_scale.dtype else torch.addcmul(y, z, (out_scale - high).to(z.dtype), out=out)


def scaled_sum_backward(
    dy: Tensor, z: Tensor, t: Tensor, B: Tensor, out_scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`scaled_sum`.

    They are dz = g∘dy of the sum (N, C), dB = dzᵀ·t (C, R), and that of the scale (C,) in its dtype. The scale's gradient is
    ``Σ dy∘(z − bias)`` over the tokens plus, for the update, ``Σ B∘(dyᵀ·t)`` over the rank.
    """
    dB, buffer = dy.t() @ t, torch.empty_like(dy)
    wide = None if bias is None else out_scale.dtype  # with a bias two sums are subtracted, and half precision would lose digits
    d_out_scale = torch.mul(dy, z, out=buffer).sum(0, dtype=wide) + (dB * B).sum(1, dtype=out_scale.dtype)
    if bias is not None:
        d_out_scale -= dy.sum(0, dtype=wide) * bias
    dz = scaled(dy, out_scale, out=buffer)
    return dz, times_scale(dB.t(), out_scale, None).t(), d_out_scale


def reduce(t: Tensor, x: Tensor, drop: Drop | None = None) -> Tensor:
    """Return ``tᵀ·drop(x)``, the sum over the tokens: (N, R), (N, D) → (R, D)."""
    return t.t() @ zeroed(x, drop)
