"""FP8 products, and what they need beside them, at Llama-3.1-8B's sizes: times on a GPU with FP8 tensor cores.

    python benchmarks/float8_kernels.py             # 8192 tokens
    python benchmarks/float8_kernels.py --search    # over the kernels' tiles too

*Floor* is the bytes that have to be read and written once, over the device's copy speed; of a product, its operations over the bf16
product's measured rate. The error is that of the product against bf16 operands multiplied in fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from triton.testing import do_bench

from lightning_lora.ops import float8, triton_float8

SIZES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]  # out, in: q and o, k and v, gate and up, down


def milliseconds(function: Callable[[], Any]) -> float:
    return do_bench(function, warmup=5, rep=25, return_mode="median")


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def products(rows: int) -> None:
    print("| product | bf16 ms | fp8 ms | quantize x | transpose W | relative error |\n|---|---|---|---|---|---|", flush=True)
    for out, width in SIZES:
        x, w = tensor(rows, width), tensor(out, width)
        a, b = triton_float8.quantize_rows([x], [None]), triton_float8.quantize_rows([w], [None])
        product = partial(triton_float8.product, *a, *b, torch.bfloat16)
        exact = x.float() @ w.float().t()
        error = ((product().float() - exact).norm() / exact.norm()).item()
        times = [partial(torch.mm, x, w.t()), product, partial(triton_float8.quantize_rows, [x], [None])]
        times.append(partial(triton_float8.transposed, [b[0]]))
        cells = " | ".join(f"{milliseconds(function):.3f}" for function in times)
        print(f"| {rows}x{width} by {out} | {cells} | {error:.4f} |", flush=True)


def passes(rows: int, search: bool) -> None:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    speed = 2 * source.nbytes / milliseconds(partial(torch.empty_like(source).copy_, source))  # bytes a ms
    compiled = torch.compile(float8.quantize_rows)
    print("\n| pass | floor ms | ours | compiled definition | best tiles |\n|---|---|---|---|---|", flush=True)
    for widths in ((4096,), (14336,), (4096, 1024, 1024), (14336, 14336)):
        parts = [tensor(rows, width) for width in widths]
        scales = [torch.ones(width, device="cuda") for width in widths] if len(widths) > 1 else [None]
        mine, theirs = (partial(function, parts, scales) for function in (triton_float8.quantize_rows, compiled))
        found = {}
        for chunk in (1024, 2048, 4096, 8192, 16384) if search else ():
            for warps in (4, 8, 16):
                triton_float8.CHUNKS = dict.fromkeys(CHUNKS, (chunk, warps))
                found[chunk, warps] = milliseconds(mine)
        row(f"quantize {widths}", 3 * rows * sum(widths) / speed, mine, theirs, found)
    for widths in ((4096, 1024, 1024), (14336, 14336)):
        codes = [torch.randint(0, 255, (width, 4096), dtype=torch.uint8, device="cuda") for width in widths]
        found = {}
        for tile in (32, 64, 128) if search else ():
            for warps in (4, 8, 16):
                triton_float8.TILE, triton_float8.TILE_WARPS = tile, warps
                found[tile, warps] = milliseconds(partial(triton_float8.transposed, codes))
        row(f"transpose {widths}", 2 * 4096 * sum(widths) / speed, *(partial(m.transposed, codes) for m in (triton_float8, float8)), found)


CHUNKS, TILES = triton_float8.CHUNKS, (triton_float8.TILE, triton_float8.TILE_WARPS)  # in use


def row(name: str, floor: float, mine: Callable[[], Any], theirs: Callable[[], Any], found: dict[tuple[int, int], float]) -> None:
    triton_float8.CHUNKS, (triton_float8.TILE, triton_float8.TILE_WARPS) = CHUNKS, TILES
    best = "; ".join(f"{tiles} {ms:.3f}" for tiles, ms in sorted(found.items(), key=lambda item: item[1])[:3])
    print(f"| {name} | {floor:.3f} | {milliseconds(mine):.3f} | {milliseconds(theirs):.3f} | {best} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192, help="tokens")
    parser.add_argument("--search", action="store_true", help="time other tiles too")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    products(options.rows)
    passes(options.rows, options.search)


if __name__ == "__main__":
    main()
