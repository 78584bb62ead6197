"""Unsloth on the mixture of ``moe_step.py``, in a process of its own: importing it changes transformers' classes.

    PYTHONPATH=. python benchmarks/moe_step.py --layers 16 --modes frozen,ours,peft,frozen-layer,ours-layer
    PYTHONPATH=. python benchmarks/moe_unsloth.py --layers 16

``unsloth``, ``unsloth_zoo`` and what they import must be there. Given the names of the linears, Unsloth adapts attention and all experts by
itself. Its step is its own forward with labels, under the autocast that its trainer has with ``bf16=True``; fused AdamW, no gradient
checkpointing, no dropout. Shape, weights, batches and rank are those of ``moe_step.py``. What it adapts and which of its ways through the
experts it takes is printed. The columns are those of ``moe_step.py``, less those that need its frozen model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import packing_unsloth  # first: it imports Unsloth, which changes what comes after
import peft
import torch
import transformers
from floor import measure
from floor_modes import DEVICE
from moe_step import SHAPES, Setting, arithmetic, build
from torch import Tensor
from unsloth_zoo.temporary_patches import moe_utils


def adapted(setting: Setting) -> Any:
    """The mixture, as Unsloth makes it."""
    with tempfile.TemporaryDirectory() as folder:
        model = packing_unsloth.adapted(folder, build(setting, set()), setting.seq, setting.rank)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    experts = sum(p.numel() for name, p in trained.items() if ".experts." in name)
    dtypes = dict(Counter(str(p.dtype) for p in trained.values()))
    print(f"trains {sum(p.numel() for p in trained.values()):,} parameters, of experts {experts:,}; tensors by dtype: {dtypes}", flush=True)
    return model


def training_step(model: Any, mode: str, setting: Setting) -> Callable[[int], Tensor]:
    """Unsloth's step, over four batches in turn."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=DEVICE == "cuda")
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, model.config.vocab_size, (setting.batch, setting.seq), generator=generator).to(DEVICE) for _ in range(4)]

    def step(k: int) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss: Tensor = model(input_ids=ids[k % 4], labels=ids[k % 4]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30b-a3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="rows; several are measured in turn")
    parser.add_argument("--seq", type=int, help="tokens a row (2048; tiny: 32)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="that count, after three")
    parser.add_argument("--profile", action="store_true", help="then the 25 kernels that take longest, of the last batch")
    options = parser.parse_args(argv)
    seq = options.seq or (32 if options.shape == "tiny" else 2048)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"unsloth {packing_unsloth.unsloth.__version__}, {versions}", flush=True)
    setting = Setting(options.shape, options.batch[0], seq, options.rank, layers=options.layers, steps=options.steps, warmup=3)
    model, needs = adapted(setting), arithmetic(setting)
    for batch in options.batch:
        setting = replace(setting, batch=batch)
        result = measure("unsloth", setting, options.profile, partial(training_step, model))
        speed = batch * seq / result.ms * 1e3 if result.ms else 0.0
        numbers = f"{result.ms:.1f} | | {speed:,.0f} | {speed * needs / 1e12:.3g} | {result.gib:.1f} | | {result.setup:.0f}"
        print(f"| unsloth, {batch} x {seq} | {result.error or numbers} | {result.loss:.4f} |", flush=True)
    print(f"way through the experts: {moe_utils.select_moe_backend()}")
    if options.profile:
        print(f"busy {sum(spent for spent, _ in result.kernels.values()):.1f} ms\n| kernel | ms a step | calls a step |\n|---|---|---|")
    for name, (spent, count) in list(result.kernels.items())[:25]:
        print(f"| {name[:150].replace('|', '/')} | {spent:.3f} | {count:.0f} |", flush=True)


if __name__ == "__main__":
    main()
