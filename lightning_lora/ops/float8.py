"""Products in FP8 (e4m3, arXiv:2209.05433) with a scale per row: the definition, in torch operations that run on any device.

A row is stored as 8-bit codes and one scale, ``row ≈ scale · codes``. Scales are powers of two, so multiplying by one is exact: codes come
out the same on every device, a dequantized weight is exact in bf16, and quantizing it again changes nothing. e4m3 is a floating-point
format, so its relative rounding (2⁻⁴ at most) does not depend on the scale. Only numbers below 2⁻¹⁴ of their row's largest lose more.

``triton_float8`` computes the same on GPUs with FP8 tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
_INFINITY = 0x7F800000  # as bits of fp32
# The scale is the least power of two with largest/scale ≤ 448 = 1.75·2⁸. In bits of fp32: mantissas above that of 1.75 carry into the
# exponent. From the sum's exponent field E the scale's field is E − 8, and that of its inverse is 262 − E.
_CARRY, _LEAST, _SHIFT, _SUM = 0x1FFFFF, 9, 8, 262

_emulating = False  # a global: the products' operators read it when they run, compiled or not


@contextmanager
def emulated() -> Iterator[None]:
    """Within it, FP8 products are computed as FP8 on every device: what the tensor cores would give, slowly. For tests and studies."""
    global _emulating
    outer, _emulating = _emulating, True
    try:
        yield
    finally:
        _emulating = outer


def is_emulating() -> bool:
    """True within :func:`emulated`."""
    return _emulating


def quantize_rows(parts: Sequence[Tensor], scales: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Quantize the rows of ``[part·scale | …]``, the parts side by side; a row has one scale over all parts.

    Args:
        parts: tensors (N, C_k).
        scales: for each, one factor per column (C_k,), a power of two; or None for 1.

    Returns:
        codes (N, ΣC_k) in e4m3 and scales (N,) in fp32. A row with NaN or infinity has the scale NaN.
    """
    wide = torch.cat([part.float() if scale is None else part.float() * scale for part, scale in zip(parts, scales, strict=True)], 1)
    bits = wide.abs().amax(1).view(torch.int32).clamp(0, _INFINITY)
    exponent = ((bits + _CARRY) >> 23).clamp(min=_LEAST)
    scale, inverse = ((exponent - _SHIFT) << 23).view(torch.float32), ((_SUM - exponent) << 23).view(torch.float32)
    return (wide * inverse[:, None]).to(E4M3), scale.masked_fill(bits == _INFINITY, torch.nan)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that codes (N, C) with scales (N,) stand for, in a dtype. Exact in bf16 and wider, rounded once in fp16."""
    wide = torch.float32 if dtype == torch.float16 else dtype  # whose range is too small for some scales
    return codes.view(E4M3).to(wide).mul_(scale.to(wide)[:, None]).to(dtype)


def transposed(weights: Sequence[Tensor]) -> Tensor:
    """Return ``[W_1ᵀ | W_2ᵀ | …]``: codes (out_k, in) → (in, Σout_k), contiguous."""
    return torch.cat([codes.view(torch.uint8) for codes in weights]).t().contiguous()


def product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``(scale_a∘a)·(scale_b∘b)ᵀ``, summed in fp32: codes (N, K), scales (N,), codes (M, K), scales (M,) or None → (N, M)."""
    sums = a.view(E4M3).float() @ b.view(E4M3).float().t() * scale_a[:, None]
    return (sums if scale_b is None else sums * scale_b).to(dtype)
