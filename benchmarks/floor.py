"""How close to the frozen model LoRA comes: time and memory of a training step in every mode, in one run on one device.

    python benchmarks/floor.py                                # Llama-3.2-1B's shape, 4 x 2048 tokens, all-linear r=16
    python benchmarks/floor.py --shape 8b --batch 2 --modes floor,peft,ours-layer-chunk,ours-layer-chunk-drop
    python benchmarks/floor.py --profile ours-layer-chunk,floor   # their kernels by time, side by side
    python benchmarks/floor.py --growth                       # over rank, length and depth; --shape small --batch 1 --seq 1024 on a CPU
    python benchmarks/floor.py --costs --shape 8b             # injection, saving, merging
    python benchmarks/floor.py --shape tiny --backend eager   # the same in seconds, on a CPU too

The floor is what no LoRA can avoid: forward and backward of the frozen base to its input's embedding, no adapter, each decoder layer
compiled, cross entropy through the frozen head in blocks of 2048 rows. A mode is a method and what is done to it, joined by dashes:

    frozen, full, peft, ours    no adapter; every weight trains; PEFT; this package
    peftdora, dora              DoRA in place of LoRA
    products                    no adapter, but the six rank-r products of each linear after the step: what the products alone take
    layer                       each decoder layer compiled (`compile="layer"`)
    chunk                       the chunked loss without autocast (`bf16-true`; PEFT's adapters are bf16 then, its fastest). Other modes
                                have Hugging Face's loss under bf16 autocast, and fp32 adapters: what a user gets who sets nothing
    graph                       with layer: each compiled layer's passes recorded as CUDA graphs and replayed. Its memory is what is
                                reserved, gaps included, for replays allocate nothing; of other modes it is what is allocated
    ckpt                        gradient checkpointing
    selective                   checkpoints that keep attention's results (`checkpointing="selective"`)
    offload                     with ckpt or selective: what they save waits in host memory
    offloadfrozen               the blocks' frozen weights wait in host memory
    drop                        dropout (--dropout)
    r64                         this rank in place of --rank's
    half                        of ours, adapters in bf16, as PEFT's are with chunk; else they are fp32, and so are their moments
    unfused                     of ours, each adapted linear by itself
    fp8                         the blocks' linears quantized to FP8 first; the floor stays the bf16 one. A CPU emulates the products

Random weights and tokens, bf16 base, fused AdamW, median of the steps. *x alike* is to the frozen model with the same loss, compiled
or not alike. *Products* is what the rank's products alone need of the floor's time, by their operations: 1 plus 6·r·Σ(in + out) FLOPs a
token over the floor's, 4 a parameter. TFLOP/s count those 4 alone, in every row. A mode that fails says why in its row.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from floor_modes import DEVICE, SHAPES, Setting, alike, arithmetic, build, ours, parse, training_step, with_rank
from kernel_times import compared, kernels
from torch import Tensor, nn
from transformers import __version__

from lightning_lora import get_lora_parameters, merge_lora, save_adapter, unmerge_lora

MODES = (
    "floor,frozen,frozen-layer,full,full-layer,peft,peft-drop,peft-layer-chunk,peft-layer-chunk-drop,ours,ours-drop,ours-layer,"
    "ours-layer-drop,ours-layer-chunk,ours-layer-chunk-drop"
)
GIB = 2**30


@dataclass
class Result:
    """Of one mode; times in ms, memory in GiB."""

    ms: float = 0.0
    gib: float = 0.0
    setup: float = 0.0
    loss: float = 0.0
    error: str = ""
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)  # name → ms and calls a step


def measure(
    mode: str, setting: Setting, profile: bool = False, make: Callable[[str, Setting], Callable[[int], Tensor]] = training_step
) -> Result:
    """Run one mode in a fresh model, by the step that ``make`` returns; what goes wrong becomes the result's error."""
    result, began = Result(), time.perf_counter()
    reset()
    try:
        step = make(mode, setting)
        for k in range(setting.warmup):
            step(k)
        synchronize()
        result.setup = time.perf_counter() - began
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        marks = [mark()]
        for k in range(setting.steps):
            loss = step(k)
            marks.append(mark())
        synchronize()
        result.ms = statistics.median(elapsed(a, b) for a, b in pairwise(marks))
        if DEVICE == "cuda":
            result.gib = (torch.cuda.max_memory_reserved if "graph" in mode.split("-") else torch.cuda.max_memory_allocated)() / GIB
        result.loss = loss.item()
        if profile:
            result.kernels = kernels(step, 3)
    except Exception as error:  # out of memory, or anything that a method fails by: its row of the table says so
        result.error = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return result


def reset() -> None:
    """Forget the mode before: its memory, and its compiled code."""
    torch._dynamo.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def mark() -> Any:
    if DEVICE == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(a: Any, b: Any) -> float:
    """Milliseconds between two marks."""
    return (b - a) * 1e3 if DEVICE == "cpu" else a.elapsed_time(b)


def row(name: str, result: Result, setting: Setting, floor: Result | None, same: Result | None) -> None:
    def times(value: float, other: Result | None, what: str) -> str:
        reference = getattr(other, what) if other is not None else 0.0
        return f"{value / reference:.2f}" if reference else "–"

    if result.error:
        print(f"| {name} | {result.error} | | | | | | | | |", flush=True)
        return
    needs, more = arithmetic(setting)
    products = "–" if parse(name.rpartition(", ")[2])[0] in ("frozen", "full") else f"{1 + more / needs:.3f}"
    speed = setting.batch * setting.seq / result.ms * 1e3
    print(
        f"| {name} | {result.ms:.1f} | {times(result.ms, floor, 'ms')} | {products} | {times(result.ms, same, 'ms')} |"
        f" {speed:,.0f} | {speed * needs / 1e12:.3g} | {result.gib:.1f} | {times(result.gib, floor, 'gib')} | {result.setup:.0f} |",
        flush=True,
    )


def head(first: str) -> None:
    print(f"\n| {first} | ms | x floor | products | x alike | tokens/s | TFLOP/s | GiB | x floor | set-up s |\n|{'---|' * 10}", flush=True)


def table(modes: list[str], setting: Setting) -> dict[str, Result]:
    """Each mode in turn."""
    head(f"{setting.shape}, {setting.batch} x {setting.seq}, r={setting.rank}")
    results: dict[str, Result] = {}
    for mode in modes:
        results[mode] = measure(mode, setting)
        row(mode, results[mode], with_rank(setting, mode), results.get("floor"), results.get(alike(mode)))
    return results


def profiles(modes: list[str], setting: Setting) -> dict[str, Result]:
    """The kernels of each mode, those first that take longest in the first mode."""
    results = {mode: measure(mode, setting, profile=True) for mode in modes}
    for mode, result in results.items():
        busy, calls = (sum(values) for values in zip((0.0, 0.0), *result.kernels.values(), strict=True))
        print(f"{mode}: {result.error or f'{result.ms:.1f} ms a step, busy {busy:.1f} ms in {calls:.0f} kernels'}")
    print(compared({mode: result.kernels for mode, result in results.items()}), flush=True)
    return results


def growth(modes: list[str], setting: Setting) -> dict[str, Result]:
    """How the modes' cost grows over rank, length (as many tokens each time, as far as that goes) and depth."""
    tiny, tokens = setting.shape == "tiny", setting.batch * setting.seq
    ranks, lengths, depths = ((8, 32), (16,), (1,)) if tiny else ((8, 16, 64, 256), (512, 2048, 8192, 32768), (4, 8, 16))
    points = [(f"rank {rank}", replace(setting, rank=rank)) for rank in ranks]
    points += [(f"length {seq}", replace(setting, seq=seq, batch=max(1, tokens // seq))) for seq in lengths]
    points += [(f"{layers} layers", replace(setting, layers=layers)) for layers in depths]
    head(f"{setting.shape}")
    results: dict[str, Result] = {}
    floor: Result | None = None
    for name, point in points:
        if floor is None or not name.startswith("rank"):  # the floor has no rank
            floor = measure("floor", point)
            row(f"{name}, floor" if not name.startswith("rank") else "floor", floor, point, None, None)
        for mode in modes:
            result = results[f"{name}, {mode}"] = measure(mode, point)
            row(f"{name}, {mode}", result, point, floor, None)
    return results


def costs(setting: Setting) -> dict[str, tuple[float, float, float]]:
    """Seconds, GiB at the peak and GiB kept of what is done once: injecting, saving, merging, unmerging."""
    reset()
    model = build(setting)
    torch.mm(*(torch.ones(2, 256, 256, device=DEVICE)))  # the library of matrix products loads once
    print(f"\n| {setting.shape}, r={setting.rank} | s | target | GiB at the peak | GiB kept |\n|---|---|---|---|---|", flush=True)
    done: dict[str, tuple[float, float, float]] = {}

    def timed(what: str, target: str, call: Callable[[], Any]) -> None:
        synchronize()
        before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        call()
        synchronize()
        seconds = time.perf_counter() - began
        peak, kept = (
            ((torch.cuda.max_memory_allocated() - before) / GIB, (torch.cuda.memory_allocated() - before) / GIB) if before else (0, 0)
        )
        done[what] = seconds, peak, kept
        print(f"| {what} | {seconds:.2f} | {target} | {peak:.2f} | {kept:.2f} |", flush=True)

    timed("inject", "0.5", lambda: ours(model, setting, 0.0, set()))
    for parameter in get_lora_parameters(model):
        nn.init.normal_(parameter, std=0.005)
    with tempfile.TemporaryDirectory() as folder:
        timed("save", "1", lambda: save_adapter(model, Path(folder) / "adapter"))
    timed("merge", "2", lambda: merge_lora(model))
    timed("unmerge", "", lambda: unmerge_lora(model))
    return done


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, help="rows (4)")
    parser.add_argument("--seq", type=int, help="tokens a row (2048; tiny: 32)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the modes with drop")
    parser.add_argument("--modes", help="comma-separated; default: all the table needs")
    parser.add_argument("--steps", type=int, default=12, help="that count")
    parser.add_argument("--warmup", type=int, default=5, help="steps before those")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--profile", metavar="MODES", help="the kernels of these modes that take longest, side by side")
    parser.add_argument("--growth", action="store_true", help="rank 8 to 256, length 512 to 32k, depth")
    parser.add_argument("--costs", action="store_true", help="injection, saving, merging")
    options = parser.parse_args(argv)
    setting = Setting(
        options.shape, options.batch or 4, options.seq or (32 if options.shape == "tiny" else 2048), options.rank, options.dropout, None,
        options.steps, options.warmup, options.backend,
    )  # fmt: skip
    modes = (options.modes or ("ours-layer-chunk" if options.growth else MODES)).split(",")
    for mode in [*modes, *(options.profile.split(",") if options.profile else [])]:
        parse(mode)
    warnings.simplefilter("ignore")
    print(
        f"torch {torch.__version__}, transformers {__version__}, {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}", flush=True
    )
    if options.profile:
        return profiles(options.profile.split(","), setting)
    if options.costs:
        return dict(costs(setting))
    return dict(growth(modes, setting) if options.growth else table(modes, setting))


if __name__ == "__main__":
    main()
