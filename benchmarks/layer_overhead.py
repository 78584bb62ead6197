"""What an adapter adds to one linear layer: Python and kernels, in microseconds a call, beside the frozen base and PEFT.

    python benchmarks/layer_overhead.py                      # 64² to 2048², one row in evaluation, a training step of 1 and 128 rows
    python benchmarks/layer_overhead.py --sizes 64 --rounds 40
    python benchmarks/layer_overhead.py --cases dora qkv nf4

One thread. Rounds go through the base, PEFT and ours in turn, so that a busy neighbour hits all alike; a row has the smallest and the
median round. Times are of the process, not of the clock on the wall: on a quiet machine they are the same. ``eval`` is a call under
``no_grad`` in evaluation mode; ``train`` is a forward and a backward pass, with a gradient for the input.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, quantize_base


class Attention(nn.Module):
    """Three linears that read one input, as in a transformer block."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, size, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


def linear(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, size, bias=False))


# Name → what is adapted, how it is quantized before that, and what differs from plain LoRA: the config's fields here and in PEFT.
Case = tuple[Callable[[int], nn.Module], str | None, dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "linear": (linear, None, {}, {}),
    "dropout": (linear, None, {"dropout": 0.1}, {"lora_dropout": 0.1}),
    "dora": (linear, None, {"variant": "dora"}, {"use_dora": True}),
    "qkv": (Attention, None, {}, {}),
    "nf4": (linear, "nf4", {}, {}),
    "qkv-nf4": (Attention, "nf4", {}, {}),
}


def built(case: str, size: int) -> dict[str, nn.Module]:
    """The base, PEFT's and ours, over equal weights."""
    make, quantize, fields, peft_fields = CASES[case]

    def base() -> nn.Module:
        torch.manual_seed(0)
        model = make(size)
        return (model if quantize is None else quantize_base(model, quantize)).requires_grad_(False)

    targets = [name for name, module in base().named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(target_modules=targets, r=8, lora_alpha=16, **peft_fields)
    ours = apply_lora(base(), config=LoRAConfig(target_modules=targets, rank=8, alpha=16, **fields))
    return {"base": base(), "PEFT": peft.get_peft_model(base(), config).base_model.model, "ours": ours}


def evaluation(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    model.eval()
    return torch.no_grad()(lambda: model(x))


def training(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    model.train()
    inputs = x.clone().requires_grad_()
    return lambda: model(inputs).sum().backward()


def measured(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Microseconds a call, a number for each round; a round of each call takes about ``seconds``."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.process_time()
        for _ in range(5):
            call()
        repeats[name] = max(3, int(seconds / max(1e-7, (time.process_time() - start) / 5)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.process_time() - start) / repeats[name] * 1e6)
    return times


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, list[float]]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["linear"], choices=CASES)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 576, 2048])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 128], help="of a training step")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.01, help="of one round of one model")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    print(f"{cpu.rpartition(':')[2].strip()}, torch {torch.__version__}, PEFT {peft.__version__}, Python {platform.python_version()}")
    print(f"{'µs a call: smallest (median)':32}" + "".join(f"{name:>18}" for name in ("base", "PEFT", "ours")))
    results = {}
    for case in options.cases:
        for size in options.sizes:
            models = built(case, size)
            for mode, rows in (("eval", 1), *(("train", rows) for rows in options.rows)):
                x = torch.randn(rows, size)
                calls = {name: (evaluation if mode == "eval" else training)(model, x) for name, model in models.items()}
                times = measured(calls, options.rounds, options.seconds)
                results[f"{case} {size}² {mode} {rows}"] = times
                cells = "".join(f"{f'{min(each):.1f} ({statistics.median(each):.1f})':>18}" for each in times.values())
                print(f"{f'{case} {size}², {mode}, {rows} rows':32}" + cells, flush=True)
    return results


if __name__ == "__main__":
    main()
