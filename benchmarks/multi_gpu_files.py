"""What the processes of ``multi_gpu.py`` do with files: save under FSDP2, and a Lightning run that is killed and resumed."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from multi_gpu_models import LINEARS, SHAPES, empty_model
from multi_gpu_runs import built, device_here
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, save_adapter
from lightning_lora.optim.state import state_by_name
from lightning_lora.storage.atomic_files import write_atomic
from lightning_lora.strategies import LoRAFSDP2Strategy
from lightning_lora.strategies.checkpoint_io import write_folder
from lightning_lora.utils.names import clean_name
from lightning_lora.utils.sharding import full_tensor

LAYERS = 4  # of a run that is killed: it shows names and files, not speed


def save(what: str, folder: str, options: argparse.Namespace) -> tuple[float, int]:
    """Seconds to save a model under FSDP2 after one step, and the bytes written."""
    model, optimizer = built("fsdp2", "ours", options)
    assert optimizer is not None
    ids = torch.zeros(1, 8, dtype=torch.long, device=device_here(options))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    target = Path(folder, what.replace(" ", "-"))
    dist.barrier()
    started = time.perf_counter()
    if what == "adapter folder":
        save_adapter(model, target)
    else:
        kept: Callable[[Tensor], Tensor] = full_tensor if "file" in what else lambda tensor: tensor
        content: dict[str, Any] = {"state_dict": {name: kept(p.detach()) for name, p in model.named_parameters() if p.requires_grad}}
        content["optimizer_states"] = [state_by_name(optimizer, model, kept)]
        if "DCP" in what:
            write_folder(content, target)
        elif dist.get_rank() == 0:
            write_atomic(target, lambda file: torch.save(content, file))
    dist.barrier()
    seconds = time.perf_counter() - started
    return seconds, sum(path.stat().st_size for path in ([target] if target.is_file() else target.rglob("*")))


class Task(L.LightningModule):
    """The same global batch in a step whatever the number of processes, so that runs on different ones can be compared."""

    def __init__(self, options: argparse.Namespace, rows: int, ckpt: str | None, kill_at: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        with device_here(options):
            self.net = empty_model(options, LAYERS)
        self.options, self.rows, self.ckpt, self.kill_at = options, rows, ckpt, kill_at
        self.losses: list[float] = []
        self.tensors = self.different = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(10**6), batch_size=None)  # the step says what is in it

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def on_train_start(self) -> None:
        """Hold what was restored against the file, by name and to the bit."""
        if self.ckpt is None:
            return
        saved = torch.load(self.ckpt, map_location="cpu", weights_only=True)
        mine = self.content()
        wanted = dict(saved["state_dict"]) | moments(saved["optimizer_states"][0])
        self.tensors = len(mine)
        self.different = sum(name not in mine or not torch.equal(mine[name], tensor) for name, tensor in wanted.items())
        self.different += len(mine.keys() - wanted.keys())

    def content(self) -> dict[str, Tensor]:
        optimizer = self.trainer.optimizers[0]
        trained = {clean_name(name): full_tensor(p.detach()).cpu() for name, p in self.named_parameters() if p.requires_grad}
        return trained | moments(state_by_name(optimizer, self))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step, world = self.trainer.global_step, dist.get_world_size()
        if step == self.kill_at and dist.get_rank() == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, SHAPES[self.options.shape][-1], (self.rows, self.options.length), generator=generator)
        ids = ids.chunk(world)[dist.get_rank()].to(self.device)
        loss: Tensor = self.net(input_ids=ids, labels=ids).loss
        shared = loss.detach().clone()
        dist.all_reduce(shared)
        self.losses.append(shared.item() / world)
        return loss


def moments(state: dict[str, Any]) -> dict[str, Tensor]:
    """An optimizer state by name as one flat dictionary, on the CPU."""
    return {f"{name}/{slot}": value.cpu() for name, slots in state["state"].items() for slot, value in slots.items()}


def die_in_save(step: int) -> None:
    """Let the first rank write half of that step's checkpoint, and kill itself."""
    save = torch.save

    def half(content: Any, file: Any, **options: Any) -> None:
        if isinstance(content, dict) and content.get("global_step") == step:
            buffer = io.BytesIO()
            save(content, buffer)
            file.write(buffer.getbuffer()[: buffer.tell() // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file, **options)

    if dist.get_rank() == 0:
        torch.save = half  # the process does not come back


def fit(
    folder: str, stop: int, ckpt: str | None, kill_at: int | None, rows: int, options: argparse.Namespace, die_at: int | None = None
) -> dict[str, Any]:
    """Train to a step with a checkpoint after each, under ``lora_fsdp2``.

    Args:
        folder: of the checkpoints.
        stop: global step to end at.
        ckpt: to resume from.
        kill_at: global step in which the last rank gets SIGKILL.
        rows: sequences of a global batch.
        options: the command line's.
        die_at: global step whose checkpoint the first rank dies in.
    """
    if die_at is not None:
        die_in_save(die_at)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    task = Task(options, rows, ckpt, kill_at)
    torch.manual_seed(1)  # the adapters' start
    trainer = L.Trainer(
        accelerator="cpu" if options.cpu else "gpu",
        devices=dist.get_world_size(),
        strategy=LoRAFSDP2Strategy(process_group_backend="gloo" if options.cpu else "nccl", pull_frozen=options.pull_frozen),
        precision="bf16-true",
        max_steps=stop,
        callbacks=[
            LoRACallback(LoRAConfig(rank=16, alpha=32, target_modules=LINEARS), merge_on_fit_end=False),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(task, ckpt_path=ckpt)
    adapters = {clean_name(name): full_tensor(p.detach()).cpu() for name, p in task.named_parameters() if p.requires_grad}
    found = {"losses": task.losses, "tensors": task.tensors, "different": task.different}
    return {**found, "adapters": adapters if dist.get_rank() == 0 else {}}
