"""Triton kernels for the rank-r products. Each reads the big tensor once, at the speed of memory.

The functions are those of :mod:`lightning_lora.ops.plain`, for any size and rank, and for tensors whose last dimension is contiguous.
Sums are in fp32. ``drop`` is a seed (:func:`draw_drop`), never a stored mask. All kernels are deterministic: where several programs add to
one result, each writes its part and torch sums the parts.

The library's products replace kernels where they are as fast (``benchmarks/kernel_tiles.py``): without dropout all but :func:`add_` at
ranks up to 128. With dropout and a rank that takes several programs, each of which would draw all random numbers, the entries are dropped
in a pass of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.ops.plain import Drop, nearest_level
from lightning_lora.ops.triton_copies import copy_all
from lightning_lora.ops.triton_dropout import kept

__all__ = ["add_", "copy_all", "draw_drop", "project", "reduce", "scaled_sum", "scaled_sum_backward"]

NARROW = 128  # the largest rank up to which the kernel that adds is faster than the library's product
PROGRAMS = 528  # programs that fill an H100: four on each of its 132 multiprocessors


class Tiles(NamedTuple):
    """How a kernel splits its work: tokens and columns per tile, warps per program, loads in flight."""

    BT: int
    BC: int
    num_warps: int = 4
    num_stages: int = 4

    @property
    def options(self) -> dict[str, int]:
        """Return the keyword arguments of a launch."""
        return self._asdict()


TILES = {
    "project": Tiles(64, 128, num_stages=5),
    "add_": Tiles(64, 128, num_stages=2),
    "scaled_sum": Tiles(64, 128, num_stages=2),
    "scaled_sum_backward": Tiles(128, 64, num_stages=2),
    "reduce": Tiles(32, 64),
    "dropped": Tiles(16, 256),
}


def draw_drop(x: Tensor, dropout: float) -> tuple[Drop, float]:
    """Return a seed for one call's mask with its threshold, and the exact probability: a multiple of 2⁻¹⁶."""
    threshold = nearest_level(dropout)
    return Drop(torch.randint(2**62, (1,), device=x.device), threshold), threshold / 2**16


@triton.jit
def _project(
    x, a, out, seed, rows, cols, rank, stride_x, stride_ar, stride_ac, threshold, scale,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    x += row.to(tl.int64)[:, None] * stride_x
    a += r[None, :] * stride_ar
    total = tl.zeros((BT, BR), tl.float32)
    for column in range(0, cols, BC):
        c = column + tl.arange(0, BC)
        tile = tl.load(x + c[None, :], mask=(row < rows)[:, None] & (c < cols)[None, :], other=0.0)
        if DROP:
            tile = tl.where(kept(tl.load(seed), row, column, cols, threshold, BT, BC), tile, 0.0)
        weight = tl.load(a + c[:, None] * stride_ac, mask=(r < rank)[None, :] & (c < cols)[:, None], other=0.0)
        total = tl.dot(tile, weight, total, input_precision="ieee")
    tl.store(out + row[:, None] * rank + r[None, :], total * scale, mask=(row < rows)[:, None] & (r < rank)[None, :])


@triton.jit
def _update(t, b, row, c, rows, cols, rank, stride_t, stride_bc, stride_br, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr):
    """Return a tile of t·Bᵀ."""
    total = tl.zeros((BT, BC), tl.float32)
    for start in range(0, rank, BR):
        r = start + tl.arange(0, BR)
        part = tl.load(t + row[:, None] * stride_t + r[None, :], mask=(row < rows)[:, None] & (r < rank)[None, :], other=0.0)
        weight = tl.load(b + c[None, :] * stride_bc + r[:, None] * stride_br, mask=(c < cols)[None, :] & (r < rank)[:, None], other=0.0)
        total = tl.dot(part, weight, total, input_precision="ieee")
    return total


@triton.jit
def _add(
    y, t, b, seed, rows, cols, rank, stride_y, stride_t, stride_bc, stride_br, threshold,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BC
    c = column + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (c < cols)[None, :]
    y += row.to(tl.int64)[:, None] * stride_y + c[None, :]
    old = tl.load(y, mask=inside, other=0.0)
    total = _update(t, b, row, c, rows, cols, rank, stride_t, stride_bc, stride_br, BT, BC, BR)
    if DROP:
        total = tl.where(kept(tl.load(seed), row, column, cols, threshold, BT, BC), total, 0.0)
    tl.store(y, (old.to(tl.float32) + total).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _scaled_sum(
    z, t, b, out_scale, bias, y, rows, cols, rank, stride_z, stride_t, stride_bc, stride_br,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (c < cols)[None, :]
    old = tl.load(z + row.to(tl.int64)[:, None] * stride_z + c[None, :], mask=inside, other=0.0)
    factor = tl.load(out_scale + c, mask=c < cols, other=0.0).to(tl.float32)
    out = old.to(tl.float32) + _update(t, b, row, c, rows, cols, rank, stride_t, stride_bc, stride_br, BT, BC, BR)
    out *= factor[None, :]
    if BIAS:  # in this form a scale of 1 changes nothing
        out += (1.0 - factor)[None, :] * tl.load(bias + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * cols + c[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _scaled_sum_backward(
    dy, z, t, b, out_scale, bias, dz, sums, rows, cols, rank, stride_y, stride_z, stride_t, stride_bc, stride_br,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (c < cols)[None, :]
    grad = tl.load(dy + row.to(tl.int64)[:, None] * stride_y + c[None, :], mask=inside, other=0.0).to(tl.float32)
    old = tl.load(z + row.to(tl.int64)[:, None] * stride_z + c[None, :], mask=inside, other=0.0)
    factor = tl.load(out_scale + c, mask=c < cols, other=0.0).to(tl.float32)
    tl.store(dz + row.to(tl.int64)[:, None] * cols + c[None, :], (grad * factor[None, :]).to(dz.dtype.element_ty), mask=inside)
    out = old.to(tl.float32) + _update(t, b, row, c, rows, cols, rank, stride_t, stride_bc, stride_br, BT, BC, BR)
    if BIAS:
        out -= tl.load(bias + c, mask=c < cols, other=0.0).to(tl.float32)[None, :]
    tl.store(sums + tl.program_id(0).to(tl.int64) * cols + c, tl.sum(grad * out, 0), mask=c < cols)


@triton.jit
def _reduce(
    t, x, out, seed, rows, cols, rank, stride_t, stride_x, span, threshold,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BC
    c = column + tl.arange(0, BC)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    part = tl.program_id(2)
    total = tl.zeros((BR, BC), tl.float32)
    for start in range(part * span, min(part * span + span, rows), BT):
        row = start + tl.arange(0, BT)
        tile = tl.load(x + row.to(tl.int64)[:, None] * stride_x + c[None, :], mask=(row < rows)[:, None] & (c < cols)[None, :], other=0.0)
        if DROP:
            tile = tl.where(kept(tl.load(seed), row, column, cols, threshold, BT, BC), tile, 0.0)
        weight = tl.load(t + row[None, :] * stride_t + r[:, None], mask=(row < rows)[None, :] & (r < rank)[:, None], other=0.0)
        total = tl.dot(weight, tile, total, input_precision="ieee")
    out += part.to(tl.int64) * rank * cols
    tl.store(out + r[:, None] * cols + c[None, :], total, mask=(r < rank)[:, None] & (c < cols)[None, :])


@triton.jit
def _dropped(x, out, seed, rows, cols, stride_x, threshold, BT: tl.constexpr, BC: tl.constexpr):
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BC
    c = column + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (c < cols)[None, :]
    tile = tl.load(x + row.to(tl.int64)[:, None] * stride_x + c[None, :], mask=inside, other=0.0)
    tile = tl.where(kept(tl.load(seed), row, column, cols, threshold, BT, BC), tile, 0.0)
    tl.store(out + row.to(tl.int64)[:, None] * cols + c[None, :], tile, mask=inside)


def dropped(x: Tensor, drop: Drop) -> Tensor:
    """Return x (N, D) with its dropped entries set to zero, a new tensor."""
    (rows, cols), tiles = x.shape, TILES["dropped"]
    x, out = rows_first(x), torch.empty(rows, cols, device=x.device, dtype=x.dtype)
    _dropped[(cdiv(rows, tiles.BT), cdiv(cols, tiles.BC))](x, out, drop.source, rows, cols, x.stride(0), drop.threshold, **tiles.options)
    return out


def project(x: Tensor, A: Tensor, drop: Drop | None = None, scale: float = 1.0) -> Tensor:
    """Return ``scale·drop(x)·Aᵀ``: (N, D), (R, D) → (N, R)."""
    if drop is not None and A.shape[0] > block_of(A.shape[0]):
        x, drop = dropped(x, drop), None
    if drop is None and x.is_cuda:
        out = torch.empty(x.shape[0], A.shape[0], device=x.device, dtype=x.dtype)
        return torch.addmm(out, x, A.t(), beta=0, alpha=scale, out=out)
    (rows, cols), rank = x.shape, A.shape[0]
    x, out = rows_first(x), torch.empty(rows, rank, device=x.device, dtype=x.dtype)
    BR, tiles = block_of(rank), TILES["project"]
    grid = (cdiv(rows, tiles.BT), cdiv(rank, BR))
    seed, threshold = drop or (x, 0)
    _project[grid](x, A, out, seed, rows, cols, rank, x.stride(0), A.stride(0), A.stride(1), threshold, scale,
                   BR=BR, DROP=drop is not None, **tiles.options)  # fmt: skip
    return out


def add_(y: Tensor, t: Tensor, B: Tensor, drop: Drop | None = None) -> Tensor:
    """Compute ``y += drop(t·Bᵀ)`` in place: (N, C), (N, R), (C, R) → y."""
    (rows, cols), rank = y.shape, t.shape[1]
    if drop is None and rank > NARROW and y.is_cuda:
        return y.addmm_(t, B.t())
    tiles = TILES["add_"]
    seed, threshold = drop or (y, 0)
    _add[(cdiv(rows, tiles.BT), cdiv(cols, tiles.BC))](
        y, t, B, seed, rows, cols, rank, y.stride(0), t.stride(0), B.stride(0), B.stride(1), threshold,
        BR=block_of(rank), DROP=drop is not None, **tiles.options)  # fmt: skip
    return y


def scaled_sum(z: Tensor, t: Tensor, B: Tensor, out_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``g∘(z − bias + t·Bᵀ) + bias``, a new tensor: (N, C), (N, R), (C, R), (C,), (C,) → (N, C)."""
    (rows, cols), rank, tiles = z.shape, t.shape[1], TILES["scaled_sum"]
    z, y = rows_first(z), torch.empty(rows, cols, device=z.device, dtype=z.dtype)
    _scaled_sum[(cdiv(rows, tiles.BT), cdiv(cols, tiles.BC))](
        z, t, B, out_scale, out_scale if bias is None else bias, y, rows, cols, rank, z.stride(0), t.stride(0), B.stride(0), B.stride(1),
        BR=block_of(rank), BIAS=bias is not None, **tiles.options)  # fmt: skip
    return y


def scaled_sum_backward(
    dy: Tensor, z: Tensor, t: Tensor, B: Tensor, out_scale: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`scaled_sum`.

    They are dz = g∘dy of the sum (N, C), dB = dzᵀ·t (C, R) in fp32, and that of the scale (C,) in its dtype.
    """
    (rows, cols), rank, tiles = z.shape, t.shape[1], TILES["scaled_sum_backward"]
    dy, z, dz = rows_first(dy), rows_first(z), torch.empty(rows, cols, device=z.device, dtype=z.dtype)
    grid = (cdiv(rows, tiles.BT), cdiv(cols, tiles.BC))
    sums = torch.empty(grid[0], cols, device=z.device, dtype=torch.float32)
    _scaled_sum_backward[grid](
        dy, z, t, B, out_scale, out_scale if bias is None else bias, dz, sums, rows, cols, rank,
        dy.stride(0), z.stride(0), t.stride(0), B.stride(0), B.stride(1),
        BR=block_of(rank), BIAS=bias is not None, **tiles.options)  # fmt: skip
    return dz, reduce(dz, t), sums.sum(0, dtype=out_scale.dtype)


def reduce(t: Tensor, x: Tensor, drop: Drop | None = None) -> Tensor:
    """Return ``tᵀ·drop(x)``, the sum over the tokens: (N, R), (N, D) → (R, D) in fp32."""
    if drop is not None and t.shape[1] > block_of(t.shape[1]):
        x, drop = dropped(x, drop), None
    if drop is None and x.is_cuda:
        return torch.mm(t.t(), x, out_dtype=torch.float32)
    (rows, cols), rank = x.shape, t.shape[1]
    t, x, BR, tiles = rows_first(t), rows_first(x), block_of(rank), TILES["reduce"]
    blocks = (cdiv(cols, tiles.BC), cdiv(rank, BR))
    parts, span = split(rows, tiles.BT, blocks[0] * blocks[1])
    out = torch.empty(parts, rank, cols, device=x.device, dtype=torch.float32)
    seed, threshold = drop or (x, 0)
    _reduce[(*blocks, parts)](t, x, out, seed, rows, cols, rank, t.stride(0), x.stride(0), span, threshold,
                              BR=BR, DROP=drop is not None, **tiles.options)  # fmt: skip
    return out.sum(0)


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up. Triton's own function is too slow to call at every launch."""
    return -(-a // b)


def rows_first(x: Tensor) -> Tensor:
    """Return x with a contiguous last dimension."""
    return x if x.stride(1) == 1 else x.contiguous()


def block_of(rank: int) -> int:
    """Return how many of the rank's entries one program handles: a power of two, at least the 16 that a tensor core needs."""
    return 16 if rank <= 16 else 32 if rank <= 32 else 64


def split(rows: int, block: int, programs: int, target: int = PROGRAMS) -> tuple[int, int]:
    """Return the number of parts to split a sum into and the rows per part, so that the programs fill the device."""
    parts = max(1, min(cdiv(target, programs), cdiv(rows, 4 * block)))
    span = cdiv(cdiv(rows, parts), block) * block
    return cdiv(rows, span), span
