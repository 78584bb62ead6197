"""What ``Trainer.fit`` adds to a training step: the same model, adapters and loss in a bare loop and through Lightning, in one run.

    PYTHONPATH=. python benchmarks/fit.py                                                         # one GPU: 1B shape, 4 x 2048 tokens
    PYTHONPATH=. python benchmarks/fit.py --shape tiny --seq 32 --steps 20                        # a CPU, eager
    PYTHONPATH=. python benchmarks/fit.py --shape tiny --seq 32 --steps 50 --ways fit --calls 30  # functions by the time they take a step

*bare* is the loop of ``floor.py``: batches on the device, chunked loss, fused AdamW. The other ways are fits of `CausalLMTask` with
`LoRACallback`, as the command line makes them (CSV logger, progress bar), over padded rows without padding from two loader processes:

    fit           nothing changed
    untuned       ``LoRACallback(tune_loop=False)``
    no bar        no progress bar
    no logs       no progress bar, no logger
    all logged    ``log_every_n_steps=1``
    no workers    batches made in the training process
    unpinned      batches in pageable memory
    no gc         Python's garbage collector off
    no callback   the same adapters and compiled blocks, without `LoRACallback` (not recorded: its hooks begin a step)

Steps are eager, compiled (each block) or recorded (CUDA graphs of compiled blocks). A model is made once for all ways. *bare* comes first
and last, because a GPU's clock moves: the ratio is to the mean of its two medians. *median* and *mean* of the steps after the warm-up, on
the device's clock: what some steps do, such as writing logs, is in the mean alone. *waits* are the calls in a step that wait for the GPU,
as torch reports them, the mean of the steps after those.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fit_ways import GPU, LAST, WAYS, Watch, bare, fit, task_of
from floor import elapsed
from floor_modes import DEVICE, SHAPES, Setting, build, ours
from transformers import __version__

from lightning_lora import compile_layers, get_lora_parameters
from lightning_lora.model.compile import uncompile_layers

HOW = ("eager", "compiled", "recorded")


@dataclass
class Result:
    """Of one way; times in ms."""

    median: float
    mean: float
    loss: float
    waits: float
    places: dict[str, int] = field(default_factory=dict)


def result_of(watch: Watch) -> Result:
    spent = [elapsed(a, b) for a, b in pairwise(watch.marks)]
    waits = watch.waits.total() / LAST
    return Result(statistics.median(spent), statistics.fmean(spent), watch.loss.item(), waits, dict(watch.waits.most_common()))


def table(how: str, ways: Sequence[str], setting: Setting, calls: int) -> dict[str, Result]:
    """Run each way on one model, from the same adapters."""
    print(f"\n| {how} | median ms | mean ms | x bare | x bare, mean | waits | loss |\n|---|---|---|---|---|---|---|", flush=True)
    task = task_of(ours(build(setting), setting, 0.0, set()))
    start = [(p, p.detach().clone()) for p in get_lora_parameters(task.model)]
    results: dict[str, Result] = {}
    for name in ways:
        task.to(DEVICE)  # a fit leaves it on the CPU
        with torch.no_grad():
            for parameter, value in start:
                parameter.copy_(value)
        profile = cProfile.Profile() if calls else None
        watch = Watch(setting, profile)
        way = WAYS.get(name)
        by_hand = how != "eager" and (way is None or not way.callback)
        if by_hand:
            compile_layers(task.model, cuda_graphs=how == "recorded")
        if way is None:
            bare(task, how, setting, watch)
        else:
            fit(task, how, way, setting, watch)
        if by_hand:
            uncompile_layers(task.model)
        results[name] = result = result_of(watch)
        reference = [results[one] for one in ("bare", "bare again") if one in results]
        row(name, result, reference)
        if result.places:
            print("  waits:", ", ".join(f"{place} {count}x" for place, count in result.places.items()), flush=True)
        if profile is not None:
            show(profile, calls, setting.steps)
    torch._dynamo.reset()
    gc.collect()
    return results


def row(name: str, result: Result, reference: list[Result]) -> None:
    ratios = [f"{spent / statistics.fmean(others):.3f}" if others else "–" for spent, others in (
        (result.median, [one.median for one in reference]), (result.mean, [one.mean for one in reference])
    )]  # fmt: skip
    print(
        f"| {name} | {result.median:.2f} | {result.mean:.2f} | {' | '.join(ratios)} | {result.waits:.1f} | {result.loss:.4f} |", flush=True
    )


def show(profile: cProfile.Profile, calls: int, steps: int) -> None:
    """Print the functions that take most, per step."""
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    print(
        f"  {sum(row[1] for row in stats.values()) / steps:.0f} calls a step, {sum(row[2] for row in stats.values()) / steps * 1e3:.2f} ms"
    )
    for (file, line, name), (_, count, own, whole, _) in sorted(stats.items(), key=lambda item: -item[1][3])[:calls]:
        place = "/".join(Path(file).parts[-2:])
        print(f"  {whole / steps * 1e3:8.3f} ms, alone {own / steps * 1e3:7.3f}, {count / steps:7.1f} calls  {place}:{line} {name}")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Result]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--seq", type=int, default=2048, help="tokens per row")
    parser.add_argument("--steps", type=int, default=40, help="that are timed")
    parser.add_argument("--warmup", type=int, default=8, help="steps before those")
    parser.add_argument("--how", nargs="*", choices=HOW, default=["recorded", "compiled"] if GPU else ["eager"])
    parser.add_argument("--ways", nargs="*", choices=["bare", *WAYS, "bare again"], default=["bare", *WAYS, "bare again"])
    parser.add_argument("--calls", type=int, default=0, help="profile the CPU, and print this many functions of each way")
    options = parser.parse_args(argv)
    setting = Setting(options.shape, options.batch, options.seq, layers=options.layers, steps=options.steps, warmup=options.warmup)
    print(
        f"torch {torch.__version__}, lightning {pl.__version__}, transformers {__version__}", torch.cuda.get_device_name() if GPU else "CPU"
    )
    results = {}
    for how in options.how:
        ways = [way for way in options.ways if how != "recorded" or way != "no callback"]
        results[how] = table(how, ways, setting, options.calls)
    return results


if __name__ == "__main__":
    main()
