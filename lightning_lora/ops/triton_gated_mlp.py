"""Triton kernels for a gated MLP's activation, ``h = silu(gate)·up``, that include the rank-r work of its three projections.

The elementwise pass reads and writes tensors of (tokens, intermediate size), the biggest of a block. The adapters' work on those tensors
is of two sorts. *Updates* of them: of gate and up, and in the backward pass of the gradient of h through the down projection's A. *Sums*
over them: the down projection's ``t = drop(h)·Aᵀ``, and the gradients of t, B and A. At small ranks both are done while the tensors are
in registers. At wider ones sums, and then updates too, are products of the library before and after the pass
(:mod:`lightning_lora.ops.triton_gated_plans`). Gate and up may have an output scale (:mod:`lightning_lora.ops.output_scale`), which takes
no extra pass.

N tokens, C intermediate features, r the rank of each projection (they may differ). Sums are in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lora.ops.plain import Drop
from lightning_lora.ops.triton_dropout import kept
from lightning_lora.ops.triton_gated_plans import plan_of, tiles_of
from lightning_lora.ops.triton_low_rank import add_, cdiv, project, reduce, split

LOOP = 8  # column tiles per program of the forward pass
PROGRAMS = 1584  # of the backward pass: several waves, because programs take unequal times


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    """Compute the sigmoid in one instruction where half precision hides its error of 2⁻¹¹. A full-range division takes ten."""
    if FAST:
        half = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1)
        return half * 0.5 + 0.5
    else:
        return tl.sigmoid(x)


@triton.jit
def _forward(
    g, u, h, dropped, t, bg, bu, ad, gg, gu, td, seed, rows, cols, rg, ru, rd, stride_t, threshold, scale,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr, UPDATES: tl.constexpr,
    SUMS: tl.constexpr, DROP: tl.constexpr, OUT_SCALE: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    r = tl.arange(0, BR)
    here = (row < rows)[:, None] | EVEN
    if UPDATES:
        tg = tl.load(t + row[:, None] * stride_t + r[None, :], mask=here & (r < rg)[None, :], other=0.0)
        tu = tl.load(t + row[:, None] * stride_t + rg + r[None, :], mask=here & (r < ru)[None, :], other=0.0)
    if SUMS:
        total = tl.zeros((BT, BR), tl.float32)
    for k in tl.range(0, LOOP, num_stages=STAGES):  # with num_stages given, loads that no product reads are prefetched too
        column = (tl.program_id(1) * LOOP + k) * BC
        c = column + tl.arange(0, BC)
        there = (c < cols)[None, :] | EVEN
        inside = here & there
        at = row.to(tl.int64)[:, None] * cols + c[None, :]
        gate = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
        if UPDATES:
            wg = tl.load(bg + c[None, :] * rg + r[:, None], mask=there & (r < rg)[:, None], other=0.0)
            wu = tl.load(bu + c[None, :] * ru + r[:, None], mask=there & (r < ru)[:, None], other=0.0)
            gate = tl.dot(tg, wg, gate, input_precision="ieee")
            up = tl.dot(tu, wu, up, input_precision="ieee")
        if OUT_SCALE:
            gate *= tl.load(gg + c, mask=(c < cols) | EVEN, other=0.0).to(tl.float32)[None, :]
            up *= tl.load(gu + c, mask=(c < cols) | EVEN, other=0.0).to(tl.float32)[None, :]
        out = gate * _sigmoid(gate, FAST) * up
        tl.store(h + at, out.to(h.dtype.element_ty), mask=inside)
        if DROP:
            out = tl.where(kept(tl.load(seed), row, column, cols, threshold, BT, BC), out, 0.0)
            if not SUMS:
                tl.store(dropped + at, out.to(h.dtype.element_ty), mask=inside)
        if SUMS:
            wd = tl.load(ad + r[None, :] * cols + c[:, None], mask=(c < cols)[:, None] & (r < rd)[None, :], other=0.0)
            total = tl.dot(out.to(h.dtype.element_ty), wd, total, input_precision="ieee")
    if SUMS:
        td += tl.program_id(1).to(tl.int64) * rows * rd
        tl.store(td + row[:, None] * rd + r[None, :], total * scale, mask=here & (r < rd)[None, :])


@triton.jit
def _backward(
    dh, g, u, dg, du, dropped, t, bg, bu, ad, gg, gu, dtd, dt, sums, sums_gg, sums_gu, seed,
    rows, cols, rg, ru, rd, stride_t, stride_dtd, span, threshold, scale,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr, UPDATES: tl.constexpr, SUMS: tl.constexpr,
    DROP: tl.constexpr, OUT_SCALE: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    column, part = tl.program_id(0) * BC, tl.program_id(1)
    c = column + tl.arange(0, BC)
    r = tl.arange(0, BR)
    there = (c < cols)[None, :] | EVEN
    if UPDATES:
        wg = tl.load(bg + c[None, :] * rg + r[:, None], mask=there & (r < rg)[:, None], other=0.0)
        wu = tl.load(bu + c[None, :] * ru + r[:, None], mask=there & (r < ru)[:, None], other=0.0)
        wd = tl.load(ad + r[:, None] * cols + c[None, :], mask=there & (r < rd)[:, None], other=0.0)
    if SUMS:
        sum_g = tl.zeros((BR, BC), tl.float32)
        sum_u = tl.zeros((BR, BC), tl.float32)
        sum_d = tl.zeros((BR, BC), tl.float32)
    for start in tl.range(part * span, min(part * span + span, rows), BT, num_stages=STAGES):
        row = start + tl.arange(0, BT)
        here = (row < rows)[:, None] | EVEN
        inside = here & there
        at = row.to(tl.int64)[:, None] * cols + c[None, :]
        grad = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(u + at, mask=inside, other=0.0).to(tl.float32)
        if UPDATES:
            tg = tl.load(t + row[:, None] * stride_t + r[None, :], mask=here & (r < rg)[None, :], other=0.0)
            tu = tl.load(t + row[:, None] * stride_t + rg + r[None, :], mask=here & (r < ru)[None, :], other=0.0)
            gd = tl.load(dtd + row[:, None] * stride_dtd + r[None, :], mask=here & (r < rd)[None, :], other=0.0)
            gate = tl.dot(tg, wg, gate, input_precision="ieee")
            up = tl.dot(tu, wu, up, input_precision="ieee")
        if OUT_SCALE:
            scale_g = tl.load(gg + c, mask=(c < cols) | EVEN, other=0.0).to(tl.float32)[None, :]
            scale_u = tl.load(gu + c, mask=(c < cols) | EVEN, other=0.0).to(tl.float32)[None, :]
            before_g, before_u = gate, up
            gate *= scale_g
            up *= scale_u
        sigmoid = _sigmoid(gate, FAST)
        silu = gate * sigmoid
        out = silu * up
        if DROP:
            keep = kept(tl.load(seed), row, column, cols, threshold, BT, BC)
            out = tl.where(keep, out, 0.0)
            if UPDATES:
                grad += tl.where(keep, tl.dot(gd, wd, input_precision="ieee"), 0.0)
        elif UPDATES:
            grad = tl.dot(gd, wd, grad, input_precision="ieee")
        grad_g = grad * up * (silu * (1.0 - sigmoid) + sigmoid)
        if OUT_SCALE:  # each tile's sums are written out: keeping them would take registers
            tile = start // BT * cols + c
            tl.store(sums_gg + tile, tl.sum(grad_g * before_g, 0), mask=(c < cols) | EVEN)
            grad_g *= scale_g
        grad_g = grad_g.to(dg.dtype.element_ty)
        grad_u = grad * silu
        if OUT_SCALE:
            tl.store(sums_gu + tile, tl.sum(grad_u * before_u, 0), mask=(c < cols) | EVEN)
            grad_u *= scale_u
        grad_u = grad_u.to(dg.dtype.element_ty)
        tl.store(dg + at, grad_g, mask=inside)
        tl.store(du + at, grad_u, mask=inside)
        if SUMS:
            sum_g = tl.dot(tl.trans(tg), grad_g, sum_g, input_precision="ieee")
            sum_u = tl.dot(tl.trans(tu), grad_u, sum_u, input_precision="ieee")
            sum_d = tl.dot(tl.trans(gd), out.to(dg.dtype.element_ty), sum_d, input_precision="ieee")
            to = dt + row[:, None] * (rg + ru) + r[None, :]
            dtg = tl.dot(grad_g, tl.trans(wg), input_precision="ieee") * scale
            dtu = tl.dot(grad_u, tl.trans(wu), input_precision="ieee") * scale
            tl.atomic_add(to, dtg, mask=here & (r < rg)[None, :], sem="relaxed")
            tl.atomic_add(to + rg, dtu, mask=here & (r < ru)[None, :], sem="relaxed")
        else:
            tl.store(dropped + at, out.to(dg.dtype.element_ty), mask=inside)
    if SUMS:
        sums += (part * (rg + ru + rd) + r)[:, None].to(tl.int64) * cols + c[None, :]
        tl.store(sums, sum_g, mask=there & (r < rg)[:, None])
        tl.store(sums + rg * cols, sum_u, mask=there & (r < ru)[:, None])
        tl.store(sums + (rg + ru) * cols, sum_d, mask=there & (r < rd)[:, None])


def forward(
    g: Tensor,
    u: Tensor,
    t: Tensor,
    Bg: Tensor,
    Bu: Tensor,
    Ad: Tensor,
    drop: Drop | None,
    scale: float = 1.0,
    out_scales: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Return ``h = silu(gg∘(g + tg·Bgᵀ))·(gu∘(u + tu·Buᵀ))`` and ``scale·drop(h)·Adᵀ``, with ``t = [tg | tu]``.

    Args:
        g: the gate projection's base output (N, C), contiguous. At wide ranks the update is added to it, for the backward pass.
        u: the up projection's base output, likewise.
        t: (N, rg + ru).
        Bg: (C, rg), contiguous.
        Bu: (C, ru), contiguous.
        Ad: (rd, C), contiguous.
        drop: dropout of the down projection's input.
        scale: of the down projection's adapter.
        out_scales: gg and gu, (C,) each, or empty.

    Returns:
        h (N, C) and (N, rd).
    """
    (rows, cols), (rg, ru, rd) = g.shape, (Bg.shape[1], Bu.shape[1], Ad.shape[0])
    plan = plan_of(max(rg, ru, rd))
    tiles = tiles_of("forward", plan, drop is not None, bool(out_scales))
    if not plan.updates:
        add_(g, t[:, :rg], Bg)
        add_(u, t[:, rg:], Bu)
    h, blocks = torch.empty_like(g), cdiv(cols, tiles.BC * LOOP)
    dropped = h if drop is None or plan.sums else torch.empty_like(g)
    td = torch.empty(blocks, rows, rd, device=g.device, dtype=torch.float32) if plan.sums else h
    seed, threshold = drop or (g, 0)
    fast = g.is_cuda and g.dtype != torch.float32
    _forward[(cdiv(rows, tiles.BT), blocks)](
        g, u, h, dropped, t, Bg, Bu, Ad, *(out_scales or (g, u)), td, seed, rows, cols, rg, ru, rd, t.stride(0), threshold, scale,
        LOOP=LOOP, STAGES=tiles.num_stages, DROP=drop is not None, OUT_SCALE=bool(out_scales),
        EVEN=rows % tiles.BT == 0 and cols % (tiles.BC * LOOP) == 0, FAST=fast, **plan.options, **tiles.options)  # fmt: skip
    return h, td.sum(0).to(g.dtype) if plan.sums else project(dropped, Ad, None, scale)


def backward(
    dh: Tensor,
    g: Tensor,
    u: Tensor,
    t: Tensor,
    Bg: Tensor,
    Bu: Tensor,
    Ad: Tensor,
    dtd: Tensor,
    drop: Drop | None,
    scale: float = 1.0,
    out_scales: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """Return the gradients of everything that :func:`forward` reads. ``dh`` is overwritten.

    Args:
        dh: gradient of h without the adapter's part (N, C), contiguous.
        g: as the forward pass left it; so are the next six.
        u: (N, C).
        t: (N, rg + ru).
        Bg: (C, rg).
        Bu: (C, ru).
        Ad: (rd, C).
        dtd: gradient of ``drop(h)·Adᵀ`` (N, rd).
        drop: as in the forward pass.
        scale: factor of the returned dt, because t already contains it.
        out_scales: as in the forward pass.

    Returns:
        dg (N, C), du (N, C), dt (N, rg + ru); in fp32 dBg (C, rg), dBu (C, ru), dAd (rd, C), and the scales' gradients, (C,) each.
    """
    (rows, cols), (rg, ru, rd) = g.shape, (Bg.shape[1], Bu.shape[1], Ad.shape[0])
    plan = plan_of(max(rg, ru, rd))
    tiles = tiles_of("backward", plan, drop is not None, bool(out_scales))
    if not plan.updates:
        add_(dh, dtd, Ad.t(), drop)
    blocks = cdiv(cols, tiles.BC)
    parts, span = split(rows, tiles.BT, blocks, PROGRAMS)
    dg, du = dh, torch.empty_like(u)
    if plan.sums:
        dropped, dt = g, torch.zeros(rows, rg + ru, device=g.device, dtype=torch.float32)
        sums = torch.empty(parts, rg + ru + rd, cols, device=g.device, dtype=torch.float32)
    else:
        dropped = dt = sums = torch.empty_like(g)
    sums_of_scales = [torch.empty(cdiv(rows, tiles.BT), cols, device=g.device, dtype=torch.float32) for _ in out_scales]
    seed, threshold = drop or (g, 0)
    fast = g.is_cuda and g.dtype != torch.float32
    _backward[(blocks, parts)](
        dh, g, u, dg, du, dropped, t, Bg, Bu, Ad, *(out_scales or (g, u)), dtd, dt, sums, *(sums_of_scales or (sums, sums)), seed,
        rows, cols, rg, ru, rd, t.stride(0), dtd.stride(0), span, threshold, scale,
        STAGES=tiles.num_stages, DROP=drop is not None, OUT_SCALE=bool(out_scales),
        EVEN=rows % tiles.BT == 0 and cols % tiles.BC == 0, FAST=fast, **plan.options, **tiles.options)  # fmt: skip
    if plan.sums:
        dBg, dBu, dAd = sums.sum(0).split([rg, ru, rd])
        dt, dBg, dBu = dt.to(g.dtype), dBg.t(), dBu.t()
    else:
        dt = torch.cat([project(dg, Bg.t(), None, scale), project(du, Bu.t(), None, scale)], 1)
        dBg, dBu, dAd = reduce(dg, t[:, :rg]), reduce(du, t[:, rg:]), reduce(dtd, dropped)
    return dg, du, dt, dBg, dBu, dAd, *(part.sum(0) for part in sums_of_scales)
