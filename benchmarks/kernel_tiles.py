"""Each Triton kernel's time beside the torch operations it replaces and beside what memory allows, and a search over its tiles.

    python benchmarks/kernel_tiles.py                 # the tiles in use, Llama-3.1-8B's sizes, 8192 tokens, r=16, on a GPU
    python benchmarks/kernel_tiles.py --rank 64       # --dropout 0.1; --scales: the gated kernels with output scales
    python benchmarks/kernel_tiles.py --search --kernels forward,backward   # every candidate; minutes, most of them compiling

*Floor* is the bytes that have to be read and written once, over the device's copy speed. For ``forward`` and ``backward``, the gated MLP's
middle with three adapters' work, torch's column is the compiled middle without any adapter. The last table is two orders of one sum: the
update added to the base product, or the base product accumulated onto the update.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from lightning_lora.ops import plain, triton_gated_mlp, triton_gated_plans, triton_low_rank, triton_weight_norm
from lightning_lora.ops.triton_low_rank import Tiles

TABLES = (triton_gated_plans.TILES, triton_weight_norm.TILES, triton_low_rank.TILES)


@dataclass
class Case:
    """A kernel at one size."""

    kernel: str
    size: str
    moved: int  # bytes that have to be read and written
    ours: Callable[[], Any]
    torchs: Callable[[], Any]


def milliseconds(function: Callable[[], Any]) -> float:
    return do_bench(function, warmup=5, rep=25, return_mode="median")


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def cases(rows: int, hidden: int, wide: int, rank: int, p: float, scaled_sum: bool) -> Iterator[Case]:
    for cols in (hidden, wide):
        x, A, t, y = tensor(rows, cols), tensor(rank, cols), tensor(rows, rank), tensor(rows, cols)
        drop, size = triton_low_rank.draw_drop(x, p)[0] if p else None, f"{rows}x{cols} r={rank} p={p}"
        yield Case("project", size, x.nbytes, partial(triton_low_rank.project, x, A, drop), partial(plain.project, x, A))
        yield Case("add_", size, 2 * y.nbytes, partial(triton_low_rank.add_, y, t, A.t(), drop), partial(plain.add_, y, t, A.t()))
        yield Case("reduce", size, x.nbytes, partial(triton_low_rank.reduce, t, x, drop), partial(plain.reduce, t, x))
        operands = (y, t, A.t(), torch.ones(cols, device="cuda"), None)
        yield Case("scaled_sum", size, 2 * y.nbytes, partial(triton_low_rank.scaled_sum, *operands), partial(plain.scaled_sum, *operands))
        yield Case(
            "scaled_sum_backward",
            size,
            3 * y.nbytes,
            partial(triton_low_rank.scaled_sum_backward, x, *operands),
            partial(plain.scaled_sum_backward, x, *operands),
        )
    W, A, B = tensor(wide, hidden), tensor(rank, hidden), tensor(wide, rank)
    squares = partial(triton_weight_norm.squares, W, A, B, 1.0)
    yield Case("squares", f"{wide}x{hidden} r={rank}", W.nbytes, squares, lambda: (W + B @ A).float().square().sum(1))
    g, u, dh, t, dtd = tensor(rows, wide), tensor(rows, wide), tensor(rows, wide), tensor(rows, 2 * rank), tensor(rows, rank)
    Bg, Bu, Ad = tensor(wide, rank), tensor(wide, rank), tensor(rank, wide)
    drop = triton_low_rank.draw_drop(g, p)[0] if p else None
    swiglu = torch.compile(lambda g, u: F.silu(g) * u, dynamic=False)
    leaves = [z.clone().requires_grad_() for z in (g, u)]
    backward = partial(torch.autograd.grad, swiglu(*leaves), leaves, dh, retain_graph=True)
    out_scales = [torch.ones(wide, device="cuda")] * 2 if scaled_sum else ()
    plan = triton_gated_plans.plan_of(rank)
    name = partial(triton_gated_plans.tiles_name, plan=plan, drop=bool(p), scaled_sum=scaled_sum)
    factors = [torch.randn(B.shape, device="cuda") for B in (Bg, Bu, Ad)]
    copies = partial(triton_low_rank.copy_all, [Bg, Bu, Ad], factors)
    yield Case(
        "copies",
        f"3 x {wide} x {rank}",
        3 * sum(B.nbytes for B in (Bg, Bu, Ad)),
        copies,
        partial(torch._foreach_copy_, [Bg, Bu, Ad], factors),
    )
    yield Case(
        name("forward"),
        size,
        3 * g.nbytes,
        partial(triton_gated_mlp.forward, g, u, t, Bg, Bu, Ad, drop, 1.0, out_scales),
        partial(swiglu, g, u),
    )
    yield Case(
        name("backward"),
        size,
        5 * g.nbytes,
        partial(triton_gated_mlp.backward, dh, g, u, t, Bg, Bu, Ad, dtd, drop, 1.0, out_scales),
        backward,
    )


def orders(rows: int, hidden: int, wide: int, rank: int) -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    """For linears of three sizes: the base product alone, the update added after it, and the update before it."""
    for width, cols in ((hidden, hidden), (wide, hidden), (hidden, hidden // 4)):
        x, W, t, B = tensor(rows, width), tensor(cols, width), tensor(rows, rank), tensor(cols, rank)
        yield (
            f"{width} -> {cols}",
            [
                partial(F.linear, x, W),
                lambda x=x, W=W, t=t, B=B: triton_low_rank.add_(F.linear(x, W), t, B),
                lambda x=x, W=W, t=t, B=B: (t @ B.t()).addmm_(x, W.t()),
            ],
        )


def candidates(kernel: str) -> list[Tiles]:
    """Tiles to try: the gated kernels hold more at once, so theirs are smaller, and what they scale by is fetching ahead."""
    if kernel in triton_gated_plans.TILES:
        sizes = ((64, 32), (64, 64), (64, 128), (128, 32), (32, 64))
        return [Tiles(*size, *rest) for size, rest in itertools.product(sizes, itertools.product((4, 8), (1, 2, 3)))]
    return [Tiles(*c) for c in itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (2, 3, 5))]


def search(case: Case) -> None:
    """Leave the fastest candidate in the table, and print the best four."""
    table = next(table for table in TABLES if case.kernel in table)
    results: list[tuple[float, Tiles]] = []
    for tiles in candidates(case.kernel):
        table[case.kernel] = tiles
        try:
            results.append((milliseconds(case.ours), tiles))
        except OutOfResources:
            continue
    results.sort(key=lambda result: result[0])
    table[case.kernel] = results[0][1]
    for ms, tiles in results[:4]:
        print(f"  {case.kernel} {case.size} {ms * 1e3:.1f} us {tuple(tiles)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="tokens")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--wide", type=int, default=14336)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--scales", action="store_true", help="of the gated kernels, with output scales (DoRA)")
    parser.add_argument("--search", action="store_true", help="try other tiles")
    parser.add_argument(
        "--kernels", default="project,add_,reduce,scaled_sum,scaled_sum_backward,squares,copies,forward,backward", help="comma-separated"
    )
    options = parser.parse_args()
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    speed = 2 * source.nbytes / milliseconds(source.clone)  # bytes a millisecond
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, copy {speed / 1e9:.2f} TB/s")
    print("| kernel | size | ours, us | torch, us | floor, us |\n|---|---|---|---|---|")
    for case in cases(options.rows, options.hidden, options.wide, options.rank, options.dropout, options.scales):
        if case.kernel.partition(",")[0] not in options.kernels.split(","):
            continue
        if options.search and any(case.kernel in table for table in TABLES):
            search(case)
        ours, torchs, floor = milliseconds(case.ours), milliseconds(case.torchs), case.moved / speed
        print(f"| {case.kernel} | {case.size} | {ours * 1e3:.1f} | {torchs * 1e3:.1f} | {floor * 1e3:.1f} |", flush=True)
    print("\n| linear | alone, us | then add_ | update first |\n|---|---|---|---|")
    for name, ways in orders(options.rows, options.hidden, options.wide, options.rank):
        print(f"| {name} |", " | ".join(f"{milliseconds(way) * 1e3:.1f}" for way in ways), "|", flush=True)


if __name__ == "__main__":
    main()
