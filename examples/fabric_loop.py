"""LoRA with Lightning Fabric, on one process or several: Fabric moves and averages, the loop is yours.

    python examples/fabric_loop.py
    python examples/fabric_loop.py --devices 2        # two processes; on a CPU too
    torchrun --nproc-per-node 2 examples/fabric_loop.py --devices 2

The model counts by 1 and learns to count by 2 (`counting.py`). Any number of processes gives the same adapter, because each batch is
split among them. Seconds on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import counting
import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, apply_lora, lora_param_groups, save_adapter

BATCH = 16  # rows of an optimizer step, over all processes


def train(fabric: Fabric, count: int) -> tuple[torch.nn.Module, list[float]]:
    """Adapt and train on ``count`` batches. Return the model as Fabric wrapped it, and the mean loss of each batch."""
    fabric.seed_everything(0)  # each process makes the same A
    model = apply_lora(counting.pretrained(), LoRAConfig(rank=4, target_modules="all-linear"))  # before `setup`
    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=1e-2), eps=1e-6)  # of the adapters only
    wrapped, optimizer = fabric.setup(model, optimizer)
    rows = list(counting.rows(step=2, count=BATCH * count))
    loader = fabric.setup_dataloaders(DataLoader(rows, batch_size=BATCH // fabric.world_size))  # a share for each process

    losses = []
    wrapped.train()
    for ids in loader:
        loss = wrapped(input_ids=ids, labels=ids).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(fabric.all_reduce(loss.detach(), reduce_op="mean").item())
    return wrapped, losses


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train and save; return what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="auto", help="cpu, gpu (%(default)s)")
    parser.add_argument("--devices", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument("--batches", type=int, default=120, help=f"of {BATCH} rows (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/fabric_loop"), help="folder of the adapter (%(default)s)")
    options = parser.parse_args(argv)

    fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy="ddp" if options.devices > 1 else "auto")
    fabric.launch()
    model, losses = train(fabric, options.batches)
    folder = save_adapter(model, options.out / "adapter", overwrite=True)  # every process calls it, the first writes
    after = counting.accuracy(model.module.cpu(), step=2)
    fabric.print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; counts by 2: {after:.0%}; {folder}")
    return {"first": losses[0], "last": losses[-1], "after": after}


if __name__ == "__main__":
    main()
