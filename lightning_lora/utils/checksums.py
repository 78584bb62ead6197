"""Checksums of tensors: a full one that changes with any bit, and a cheap sampled one that identifies a base model."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

SAMPLES = 64  # entries that the sampled digest reads per tensor


def checksum(tensor: Tensor) -> str:
    """Return a digest of a tensor's bits: a position-weighted sum modulo 2⁶⁴.

    It is the same on every device and in any order of summation.
    """
    flat = bits(tensor.detach()).flatten()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), 1 << 22):  # in chunks, so that the int64 copy stays small
        piece = flat[start : start + (1 << 22)].to(torch.int64)
        weights = torch.arange(start, start + piece.numel(), device=flat.device).mul_(-7046029254386353131).add_(1442695040888963407)
        total += (piece * (weights | 1)).sum()
    return f"{int(total.item()) & (2**64 - 1):016x}"


def sampled_digest(tensor: Tensor) -> str:
    """Return a digest of a tensor's shape and of evenly spaced entries, rounded to bf16.

    Because of the rounding, a model loaded in fp32 and in bf16 counts as the same base.
    """
    flat = tensor.detach().flatten()
    index = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLES, flat.numel()), dtype=torch.float64).round().long()
    sample = flat[index.to(flat.device)]
    sample = sample.to(torch.bfloat16).view(torch.int16) if sample.is_floating_point() else sample.to(torch.int64)
    return hashlib.sha256(str((tuple(tensor.shape), sample.tolist())).encode()).hexdigest()[:16]


def bits(tensor: Tensor) -> Tensor:
    """Return the tensor's bits as integers. Comparing these tells -0.0 from 0.0 and finds equal NaNs equal."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
