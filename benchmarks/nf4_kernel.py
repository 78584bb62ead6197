"""Dequantizing an NF4 weight, by bitsandbytes and by our kernel, at Llama-3.1-8B's sizes: µs on the GPU, µs of Python to launch it.

python benchmarks/nf4_kernel.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
import triton
from bitsandbytes import functional
from torch import nn
from triton.testing import do_bench

from lightning_lora import LoRALinear, quantize_base

SIZES = [(1024, 4096), (4096, 4096), (14336, 4096)]  # out, in: k and v, q and o, the MLP


def on_the_gpu(call: Callable[[], Any]) -> float:
    return do_bench(call, warmup=5, rep=25, return_mode="median") * 1e3


def on_the_host(call: Callable[[], Any], calls: int = 300) -> float:
    """The least of five rounds. For a weight so small that the GPU keeps up."""
    rounds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    return min(rounds)


def both(out: int, width: int) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Return bitsandbytes' dequantization of a new weight, and ours."""
    linear = quantize_base(nn.Sequential(nn.Linear(width, out, bias=False, device="cuda", dtype=torch.bfloat16)), "nf4")[0]
    layer = LoRALinear.from_linear(linear)
    weight = layer.frozen_weight(torch.empty(1, width, device="cuda", dtype=torch.bfloat16))
    assert weight is not None
    return lambda: functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state), lambda: weight.dense(torch.bfloat16)


def main() -> None:
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, bitsandbytes {bitsandbytes.__version__}"
    print(f"{versions}, {torch.cuda.get_device_name()}")
    print("| weight | bitsandbytes, µs | ours, µs | same bits |\n|---|---|---|---|")
    for size in SIZES:
        theirs, ours = both(*size)
        same = torch.equal(theirs(), ours())
        print(f"| {size[0]} x {size[1]} | {on_the_gpu(theirs):.1f} | {on_the_gpu(ours):.1f} | {same} |", flush=True)
    theirs, ours = both(256, 256)
    print(f"| launching either | {on_the_host(theirs):.1f} | {on_the_host(ours):.1f} | |")


if __name__ == "__main__":
    main()
