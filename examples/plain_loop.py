"""LoRA in a training loop of your own, without Lightning: dropout, LoRA+, accumulation, clipping, a schedule, files, merging.

    python examples/plain_loop.py --out /tmp/plain

The model counts by 1 and learns to count by 2 (`counting.py`). Seconds on a CPU. ``tests/examples/test_plain_loop.py`` gives the same
batches to a Trainer with `LoRACallback` and gets the same losses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import counting
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    apply_lora_plus,
    find_targets,
    get_lora_parameters,
    load_adapter,
    lora_param_groups,
    merge_lora,
    merge_report,
    save_adapter,
    unmerge_lora,
)

CONFIG = LoRAConfig(rank=4, alpha=8, dropout=0.05, target_modules="all-linear")
RATE, RATIO, ACCUMULATE, CLIP = 5e-3, 4.0, 2, 1.0  # RATIO: the learning rate of B by that of A (LoRA+)


def optimizer_of(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over what trains, with a warm-up of ten steps."""
    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=RATE), eps=1e-6)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))


def train(model: nn.Module, batches: Iterable[Tensor]) -> list[float]:
    """Train the adapters of a model on batches of ids. Return the loss of each batch."""
    optimizer, schedule = optimizer_of(model)
    apply_lora_plus(optimizer, model, RATIO, schedule)  # after the schedule: it goes on to set one rate
    losses = []
    model.train()
    for index, ids in enumerate(batches, start=1):
        loss = model(input_ids=ids, labels=ids).loss
        (loss / ACCUMULATE).backward()
        losses.append(loss.item())
        if index % ACCUMULATE == 0:
            nn.utils.clip_grad_norm_(get_lora_parameters(model), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return losses


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, save, merge, unmerge, load; return what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=240, help="of 16 rows (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/plain_loop"), help="folder of the adapter (%(default)s)")
    options = parser.parse_args(argv)

    model = counting.pretrained()
    before = counting.accuracy(model, step=2)
    torch.manual_seed(0)  # A is random, and so is dropout
    print(find_targets(model, CONFIG))
    apply_lora(model, CONFIG)
    losses = train(model, counting.batches(step=2, count=16 * options.batches))
    after = counting.accuracy(model, step=2)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; counts by 2: {before:.0%} -> {after:.0%}")

    folder = save_adapter(model, options.out / "adapter", overwrite=True)  # PEFT's format
    merge_lora(model)  # as fast as the base now
    merged = counting.accuracy(model, step=2)
    print(f"merged: {merged:.0%}; rounding lost at most {max(merge_report(model).values()):.1e} of a layer's update")
    unmerge_lora(model)  # the base's weights are back, bit for bit
    loaded = counting.accuracy(load_adapter(counting.pretrained(), folder), step=2)
    print(f"the base with the adapter of {folder}: {loaded:.0%}")
    return {"before": before, "after": after, "merged": merged, "loaded": loaded, "first": losses[0], "last": losses[-1]}


if __name__ == "__main__":
    main()
