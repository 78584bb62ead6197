"""``lora_fsdp2`` through ``Trainer.fit`` on several GPUs, against one GPU through ``fit``: the part *fit* of ``multi_gpu.py``.

`CausalLMTask` under `LoRACallback`, as the command line trains it: `bf16-true`, progress bar, loader processes, fused AdamW, clipped
gradients, the loss in chunks. Rows of one length and no padding. *auto* is ``lora_fsdp2`` with nothing set, *fsdp2* has
``pull_frozen=False``, *pulled* has True; *kept* keeps a block's weights between the passes, *all logits* takes the loss of all logits at
once. Times are a GPU's own, between two batches' starts; *waits* are the calls in a step that wait for the GPU, *collectives* those of a
step (on CPUs).
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from fit_ways import Rows, task_of
from floor import elapsed, mark
from multi_gpu_meters import Traffic, gaps, spent
from multi_gpu_models import LINEARS, SHAPES, empty_model
from multi_gpu_runs import device_here, shared_gib
from torch.utils.data import DataLoader, Subset

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data.batching import collate_answers
from lightning_lora.strategies import LoRAFSDP2Strategy

# Way → what the strategy is given (None: one device), and whether the loss takes all logits at once.
WAYS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "one": (None, False),
    "one, all logits": (None, True),
    "auto": ({}, False),
    "auto, kept": ({"reshard_after_forward": False}, False),
    "fsdp2": ({"pull_frozen": False}, False),
    "fsdp2, all logits": ({"pull_frozen": False}, True),
    "pulled": ({"pull_frozen": True}, False),
}
WARMUP = 4


class Meter(L.Callback):
    """Takes the time of each step after the warm-up, then what a step waits for and sends, then its kernels."""

    def __init__(self, steps: int, cuda: bool) -> None:
        self.first, self.last, self.cuda = WARMUP, WARMUP + steps, cuda
        self.marks: list[Any] = []
        self.waits: list[str] = []
        self.loss = torch.zeros(())
        self.traffic, self._caught, self.profiler = Traffic(), warnings.catch_warnings(record=True), torch.profiler.profile()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.first <= batch_idx <= self.last:
            self.marks.append(mark())
        if batch_idx == self.first and self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if batch_idx == self.last:
            self._begin()
        if batch_idx == self.last + 1:
            self._end()
            self.profiler.start()
        if batch_idx == self.last + 2:
            if self.cuda:
                torch.cuda.synchronize()
            self.profiler.stop()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.loss = outputs["loss"]

    def _begin(self) -> None:
        if not self.cuda:
            self.traffic.__enter__()
            return
        self.found = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def _end(self) -> None:
        if not self.cuda:
            self.traffic.__exit__(None, None, None)
            return
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)
        self.waits = [
            f"{one.filename.rsplit('/', 1)[-1]}:{one.lineno}" for one in self.found or () if "called a synchronizing" in str(one.message)
        ]


def measure_fit(way: str, base: str, options: argparse.Namespace) -> dict[str, Any]:
    """Median step time, peak memory, waits and traffic on this rank."""
    keywords, whole = WAYS[way]
    device, world = device_here(options), dist.get_world_size()
    cuda = device.type == "cuda"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = empty_model(options)
    torch.set_default_dtype(default)
    task = task_of(model)
    task._needs_logits = "it is measured so" if whole else None
    meter = Meter(options.steps, cuda)
    rows = Rows((meter.last + 3) * options.rows * world, options.length, SHAPES[options.shape][-1])
    mine = Subset(rows, range(dist.get_rank(), len(rows), world))
    loader = DataLoader(
        mine, options.rows, collate_fn=partial(collate_answers, pad=0), num_workers=2 if cuda else 0, pin_memory=cuda,
        multiprocessing_context="fork" if cuda else None,
    )  # fmt: skip
    lora = LoRACallback(
        LoRAConfig(rank=16, alpha=32, target_modules=LINEARS), module="model", merge_on_fit_end=False,
        compile="layer" if options.compile else None, quantize=None if base == "bf16" else base,
    )  # fmt: skip
    backend = "gloo" if options.cpu else "nccl"
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="gpu" if cuda else "cpu", devices=world, precision="bf16-true", max_steps=meter.last + 3, max_epochs=-1,
            strategy="auto" if keywords is None else LoRAFSDP2Strategy(process_group_backend=backend, **keywords),
            gradient_clip_val=1.0, callbacks=[meter, lora], enable_checkpointing=False, enable_model_summary=False, logger=False,
            enable_progress_bar=cuda, use_distributed_sampler=False, default_root_dir=folder,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peaks = _peak_at_end(trainer, task)
            trainer.fit(task, loader)
    times = [elapsed(a, b) for a, b in pairwise(meter.marks)]
    shares, kernels = spent(meter.profiler) if options.profile else ({}, [])
    return {
        "ms": statistics.median(times), "tokens": options.rows * options.length * world, "peak_gib": peaks[0], "loss": meter.loss.item(),
        "waits": meter.waits, "traffic": meter.traffic.found, "pulls": getattr(task, "_lora_sharded", (True, False))[1],
        "profile": shares, "kernels": kernels, "gaps": gaps(meter.profiler) if options.profile and cuda else {},
    }  # fmt: skip


def _peak_at_end(trainer: L.Trainer, task: L.LightningModule) -> list[float]:
    """A list that gets the peak of allocated and shared memory in GiB when the training ends, before the module moves."""
    found: list[float] = []

    class Peak(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            allocated = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
            found.append(allocated + shared_gib(pl_module))

    trainer.callbacks.append(Peak())  # type: ignore[attr-defined]
    return found


def fit_rows(workers: Any, options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """The table of fits: one device first, in a process of its own, then all."""
    print("\n| through fit | base | ms | tokens/s | scaling | GiB a GPU | loss | pulls | waits | collectives |\n" + "|---" * 10 + "|")
    alone: dict[str, float] = {}  # base → tokens/s of one device
    single = type(workers)(1, options.cpu)
    try:
        alone_ways = ("one", "one, all logits")
        for members, ways in ((single, alone_ways), (workers, [way for way in WAYS if way not in alone_ways])):
            for base in options.bases:
                for way in [way for way in ways if way in options.ways]:
                    row: dict[str, Any] = {"part": "fit", "way": way, "base": base}
                    try:
                        ranks = members.run(measure_fit, way, base, options)
                    except RuntimeError as error:
                        print(f"| {way} | {base} | failed: {error} |" + " |" * 7, flush=True)
                        say(row | {"failed": str(error)})
                        continue
                    row |= {**ranks[0], **{key: max(rank[key] for rank in ranks) for key in ("ms", "peak_gib")}}
                    row["tokens_per_s"] = speed = row["tokens"] / row["ms"] * 1e3
                    alone.setdefault(base, speed) if way == "one" else None
                    row["scaling"] = speed / len(ranks) / alone[base] if base in alone else None
                    scaling = f"{row['scaling']:.3f}" if row["scaling"] else ""
                    counts = ", ".join(f"{count} {name}" for name, (count, _) in row["traffic"].items()) or "not counted"
                    waits = ", ".join(row["waits"]) or "none"
                    print(
                        f"| {way} | {base} | {row['ms']:.1f} | {speed:,.0f} | {scaling} | {row['peak_gib']:.1f} | {row['loss']:.4f} |"
                        f" {row['pulls']} | {waits} | {counts} |",
                        flush=True,
                    )
                    if row["profile"]:
                        print("  " + ", ".join(f"{kind} {ms:.1f}" for kind, ms in row["profile"].items()), flush=True)
                    if row["gaps"]:
                        print("  idle: " + ", ".join(f"{kind} {row['gaps'][kind]:.1f}" for kind in ("short", "long", "late")), flush=True)
                        for pair, (count, ms, late) in row["gaps"]["pairs"]:
                            print(f"    {ms:.2f} ms in {count:.0f}, {late:.2f} late: {pair}", flush=True)
                    say(row)
            members.close()
    finally:
        single.close()
