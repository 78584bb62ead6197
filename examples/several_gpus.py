"""Shard a model and its adapters over several GPUs with ``strategy="lora_fsdp2"``: a model larger than one GPU trains.

    python examples/several_gpus.py --devices 2                           # Lightning starts the other process
    torchrun --nproc-per-node 2 examples/several_gpus.py --devices 2      # or torchrun does
    python examples/several_gpus.py --devices 2 --accelerator cpu         # a dry run: two processes over gloo

Without a GPU it is the dry run. The module is as it would be for one GPU: the strategy shards each block. Take your own model in
`Counter.__init__`. The checkpoint is one portable file with the adapter only; it resumes on any number of GPUs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import counting
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, load_adapter, save_adapter


class Counter(L.LightningModule):
    """Any model. Each process loads it in full into host memory, then keeps its shard on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.model = counting.pretrained().train()

    def training_step(self, ids: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        self.log("train_loss", loss, sync_dist=True, batch_size=len(ids))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-6)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train under the strategy, save, and try the adapter on the whole base; return what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--accelerator", default="gpu" if gpus else "cpu", help="(%(default)s)")
    parser.add_argument("--devices", type=int, default=gpus or 2, help="processes (%(default)s)")
    parser.add_argument("--batches", type=int, default=120, help="of 16 rows, over all processes (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/several_gpus"), help="folder of the results (%(default)s)")
    options = parser.parse_args(argv)

    L.seed_everything(0)
    # The trained shards are not put together for a merge: merge the saved adapter on one process.
    lora = LoRACallback(LoRAConfig(rank=4, target_modules="all-linear"), merge_on_fit_end=False)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy="lora_fsdp2",
        max_epochs=1,
        logger=False,
        callbacks=[lora, ModelCheckpoint(options.out / "checkpoints", save_last=True)],
    )
    module = Counter()
    rows = list(counting.rows(step=2, count=16 * options.batches))
    trainer.fit(module, DataLoader(rows, batch_size=16 // options.devices))
    folder = save_adapter(module, options.out / "adapter", overwrite=True)  # gathered; the first process writes
    trainer.strategy.barrier()
    after = counting.accuracy(load_adapter(counting.pretrained(), folder), step=2)
    found = {"loss": trainer.callback_metrics["train_loss"].item(), "after": after}
    rank_zero_only(print)(f"{options.devices} processes: loss {found['loss']:.2f}; counts by 2: {after:.0%}; {folder}")
    return found


if __name__ == "__main__":
    main()
