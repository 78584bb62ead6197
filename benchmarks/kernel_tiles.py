"""Each Triton kernel's time beside the torch operations it replaces and beside what memory allows, and a search over its tiles.

    python benchmarks/kernel_tiles.py                 # the tiles in use, Llama-3.1-8B's sizes, 8192 tokens, r=16
    python benchmarks/kernel_tiles.py --search        # every candidate; start with `--compile` in several processes to fill Triton's cache

*Floor* is the bytes that have to be read and written once, over the device's copy speed.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench

from lightning_lora.kernels import gated, low_rank, plain
from lightning_lora.kernels.low_rank import Tiles


def milliseconds(function: Callable[[], Any]) -> float:
    return do_bench(function, warmup=5, rep=25, return_mode="median")


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def cases(
    rows: int, hidden: int, wide: int, narrow: int, rank: int, p: float
) -> Iterator[tuple[str, str, float, Callable, Callable | None]]:
    """Kernel, sizes, bytes moved at the least, ours, torch's."""
    for cols, r in ((hidden, 3 * rank), (hidden, rank), (wide, rank)):
        x, A, t, y = tensor(rows, cols), tensor(r, cols), tensor(rows, r), tensor(rows, cols)
        drop = low_rank.draw_drop(x, p)[0] if p else None
        size = f"{rows}x{cols} r={r} p={p}"
        yield "project", size, x.nbytes, lambda: low_rank.project(x, A, drop), lambda: plain.project(x, A)
        yield "add_", size, 2 * y.nbytes, lambda: low_rank.add_(y, t, A.t(), drop), lambda: plain.add_(y, t, A.t())
        yield "reduce", size, x.nbytes, lambda: low_rank.reduce(t, x, drop), lambda: plain.reduce(t, x)
    if not p:
        for cols in (hidden, narrow, wide):
            g, B, t, y = tensor(rows, cols), tensor(cols, rank), tensor(rows, rank), tensor(rows, cols)
            size = f"{rows}x{cols} r={rank}"
            low_rank.WIDEST_BOTH = 10**9
            yield "both", size, g.nbytes, lambda: low_rank.both(g, B, t), lambda: plain.both(g, B, t)
        yield (
            "add_",
            size.replace(str(wide), str(narrow)),
            2 * y.nbytes * narrow // wide,
            lambda: low_rank.add_(y[:, :narrow], t, B[:narrow]),
            None,
        )
    g, u, dh, t, dtd = tensor(rows, wide), tensor(rows, wide), tensor(rows, wide), tensor(rows, 2 * rank), tensor(rows, rank)
    Bg, Bu, Ad = tensor(wide, rank), tensor(wide, rank), tensor(rank, wide)
    drop = low_rank.draw_drop(g, p)[0] if p else None
    swiglu = torch.compile(lambda g, u: F.silu(g) * u, dynamic=False)
    g_, u_ = g.clone().requires_grad_(), u.clone().requires_grad_()
    h_ = swiglu(g_, u_)
    size = f"{rows}x{wide} r={rank} p={p}"
    yield "forward", size, 3 * g.nbytes, lambda: gated.forward(g, u, t, Bg, Bu, Ad, drop), lambda: swiglu(g, u)
    yield ("backward", size, 5 * g.nbytes, lambda: gated.backward(dh, g, u, t, Bg, Bu, Ad, dtd, drop),
           lambda: torch.autograd.grad(h_, (g_, u_), dh, retain_graph=True))  # fmt: skip


CANDIDATES = {
    "project": [Tiles(*c) for c in itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (3, 5))],
    "add_": [Tiles(*c) for c in itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (2,))],
    "reduce": [Tiles(*c) for c in itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (3, 4))],
    "both": [Tiles(*c) for c in itertools.product((32, 64, 128), (64, 128, 256), (4, 8), (3, 4))],
    "forward": [Tiles(*c) for c in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))],
    "backward": [Tiles(*c) for c in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--wide", type=int, default=14336)
    parser.add_argument("--narrow", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--kernels", default="project,add_,reduce,both,forward,backward")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--compile", help="I/N: only run each candidate once, those numbered I modulo N")
    options = parser.parse_args()
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    speed = 2 * source.nbytes / milliseconds(lambda: source.clone()) / 1e3  # bytes a microsecond
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, copy {speed / 1e6:.2f} TB/s")
    wanted = options.kernels.split(",")
    share, count = map(int, (options.compile or "0/1").split("/"))
    for kernel, size, moved, ours, theirs in cases(
        options.rows, options.hidden, options.wide, options.narrow, options.rank, options.dropout
    ):
        if kernel not in wanted:
            continue
        table = gated.TILES if kernel in gated.TILES else low_rank.TILES
        if options.search or options.compile:
            results = []
            for number, tiles in enumerate(CANDIDATES[kernel]):
                if number % count != share:
                    continue
                table[kernel] = tiles
                try:
                    ours()
                    torch.cuda.synchronize()
                    if not options.compile:
                        results.append((milliseconds(ours) * 1e3, tuple(tiles)))
                except Exception as error:  # a candidate that does not fit the device
                    if "out of resource" not in str(error):
                        print(kernel, tiles, repr(error)[:200])
            for us, tiles in sorted(results)[:4]:
                print(f"  {kernel} {size} {us:.1f} {tiles}")
            if results:
                table[kernel] = Tiles(*min(results)[1])
        if not options.compile:
            other = milliseconds(theirs) * 1e3 if theirs else float("nan")
            print(
                f"{kernel:9} {size:28} ours {milliseconds(ours) * 1e3:7.1f} us, torch {other:7.1f}, floor {moved / speed:7.1f}", flush=True
            )


if __name__ == "__main__":
    main()
    os._exit(0)
