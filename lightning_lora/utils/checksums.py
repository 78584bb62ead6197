"""Checksums of tensors: a full one that changes with any bit, and a cheap sampled one that identifies a base model.

What is built on them, and where:

=========================================  ==============================================================================
:func:`checksum`                           all bits of a tensor: "did this change at all?"
:func:`sampled_digest`                     some entries, rounded: "is this the same base model?"
``quantization.content.weight_digest``     the sampled digest of a layer's weight as it was before it was quantized
``layers.mergeable.base_weight_digest``    the sampled digest of a merged layer's weight as it was before the merge
``layers.mergeable.kept_base``             the checksum of a merged layer's weight before the merge, or that weight
``strategies.digests.digest``              the checksum of a parameter in training, whatever is merged into it
=========================================  ==============================================================================
"""

from __future__ import annotations

import array
import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from lightning_lora.utils.pieces import Piece, piece_of, whole_codes

RUNS, RUN = 64, 16  # of the sampled digest: runs per tensor, entries per run
ROW, ROWS = 1 << 13, 1 << 9  # of the full digest: words per row, rows per chunk


def checksum(tensor: Tensor) -> str:
    """Return a digest of a tensor's bits: a position-weighted sum modulo 2⁶⁴.

    It is the same on every device and in any order of summation. The tensor is read as rows of 64-bit words. Each row, and each place
    in a row, has an odd weight. So a change of one word always changes the digest; any other change is missed with a chance of about
    2⁻⁶⁴. It runs at about the speed of reading the memory.
    """
    flat = tensor.detach().reshape(-1)
    flat = (flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)
    whole = flat.numel() // (8 * ROW)
    total: Tensor | int = 0
    weights = _weights(0, ROW, flat.device)
    for start in range(0, whole, ROWS):  # in chunks, so that the products stay small
        rows = min(ROWS, whole - start)
        words = _words(flat[8 * ROW * start : 8 * ROW * (start + rows)]).view(rows, ROW)
        # No product of integer matrices on GPUs; on CPUs it is what reads memory fastest.
        sums = words @ weights if flat.device.type == "cpu" else (words * weights).sum(1)
        total = total + (sums * _weights(ROW + start, rows, flat.device)).sum()
    rest = flat[8 * ROW * whole :]
    if rest.numel():
        words = _words(nn.functional.pad(rest, (0, -rest.numel() % 8)) if rest.numel() % 8 else rest)
        total = total + (words * weights[: words.numel()]).sum() * _weights(ROW + whole, 1, flat.device).sum()
    return f"{int(total) & (2**64 - 1):016x}"


def _words(flat: Tensor) -> Tensor:
    """Bytes as 64-bit words; a view where they lie so that it can be one."""
    return (flat if flat.storage_offset() % 8 == 0 else flat.clone()).view(torch.int64)


@lru_cache(maxsize=16)  # most tensors of a model need the same two
def _weights(start: int, count: int, device: torch.device) -> Tensor:
    """Odd numbers that look random, one for each position."""
    x = torch.arange(start + 1, start + 1 + count, device=device).mul_(-7046029254386353131)
    x = (x ^ (x >> 30)).mul_(-4658895280553007687)
    return (x ^ (x >> 27)).mul_(-7723592293110705685) | 1


def sampled_digest(tensor: Tensor | Piece) -> str:
    """Return :func:`sampled_digests` of one tensor."""
    return sampled_digests([tensor])[0]


def sampled_digests(tensors: Sequence[Tensor | Piece]) -> list[str]:
    """Return a digest of each tensor's shape and of some entries, rounded to bf16. Of a sharded tensor, only these entries are gathered.

    A digest reads 64 evenly spaced runs of 16 entries, or all entries of a tensor that has no more. A run lies in one or two cache lines,
    so it costs about as much as one entry. If a share p of a tensor's entries changed by more than the rounding, scattered at random, the
    digest misses that with probability (1 − p)^1024: 36 % at p = 0.1 %, 3·10⁻⁵ at 1 %. A change of one entry it misses almost always.

    Because of the rounding, a model loaded in fp32 and in bf16 counts as the same base.

    Args:
        tensors: plain ones, DTensors, or this rank's pieces. One collective for all that are sharded in the same way.
    """
    pieces = [tensor if isinstance(tensor, Piece) else piece_of(tensor) for tensor in tensors]
    codes = whole_codes(pieces, [_positions(math.prod(piece.shape)) for piece in pieces])
    contents = [str(piece.shape).encode() + array.array("q", each.tolist()).tobytes() for piece, each in zip(pieces, codes, strict=True)]
    return [hashlib.sha256(content).hexdigest()[:16] for content in contents]


def _positions(count: int) -> Tensor:
    """Return the flat positions that the sampled digest reads of a tensor with so many entries."""
    if count <= RUNS * RUN:
        return torch.arange(count)
    starts = torch.linspace(0, count - RUN, RUNS, dtype=torch.float64).round().long()
    return (starts[:, None] + torch.arange(RUN)).flatten()


def bits(tensor: Tensor) -> Tensor:
    """Return the tensor's bits as integers. Comparing these tells -0.0 from 0.0 and finds equal NaNs equal."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
