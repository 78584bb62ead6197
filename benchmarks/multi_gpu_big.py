"""Models that do not fit one GPU, through ``Trainer.fit``: the part *big* of ``multi_gpu.py``, meant for Llama-3-70B's shape.

The model is built on the meta device, quantized, adapted and sharded there. Then each weight is drawn in full on every GPU, from its name's
seed, and this GPU's piece of it is kept: building takes seconds, no GPU or host ever has the model, and it is the same model on any number
of GPUs. Blocks are compiled and checkpointed, the loss is taken in chunks, `bf16-true`, fused AdamW, all-linear r=16, rows of one length.

*frozen* is the same strategy with no adapter: forward and backward to the embedding's output. *PEFT* is its model under ``fully_shard``
block by block, as ``lora_fsdp2`` with ``pull_frozen=False`` has it. TFLOP/s count 4 operations a parameter and token (forward, and the
backward pass to the inputs), as published tables do; what a checkpoint computes again is not counted. Times are a GPU's own, from a batch's
start to the next one's.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from fit_ways import Rows, task_of
from floor import elapsed, mark
from lightning.pytorch.strategies import DDPStrategy
from multi_gpu_meters import spent
from multi_gpu_models import LINEARS, SHAPES, empty_model, frozen, peft
from multi_gpu_runs import device_here, shared_gib
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_lora import LoRACallback, LoRAConfig, checkpoint_layers, compile_layers, load_base, quantize_base
from lightning_lora.callbacks.block_modes import KEPT
from lightning_lora.data.batching import collate_answers
from lightning_lora.strategies import LoRAFSDP2Strategy


class Way(NamedTuple):
    """How a model is spread: what ``lora_fsdp2`` is given (None: DDP), and how many GPUs share a layer."""

    options: dict[str, Any] | None
    tensor: int = 1


WAYS = {
    "fsdp2": Way({}),  # nothing set: it pulls where that was tested
    "fsdp2 gathered": Way({"pull_frozen": False}),
    "ddp": Way(None),
    "tp": Way({"tensor_parallel_size": 2}, 2),  # with FSDP2 over the rest, where there are more than two GPUs
}
# In the order of what is lost least if time runs out.
ROWS = [
    ("fsdp2", "bf16", "ours"),
    ("fsdp2", "bf16", "frozen"),
    ("fsdp2", "fp8", "ours"),
    ("fsdp2", "fp8", "frozen"),
    ("fsdp2 gathered", "bf16", "PEFT"),
    ("fsdp2", "nf4", "ours"),
    ("ddp", "nf4", "ours"),
    ("tp", "bf16", "ours"),
    ("fsdp2 gathered", "bf16", "ours"),
    ("fsdp2", "nf4", "frozen"),
    ("fsdp2 gathered", "fp8", "ours"),
    ("ddp", "nf4", "frozen"),
    ("tp", "bf16", "frozen"),
    ("fsdp2 gathered", "nf4", "ours"),
    ("fsdp2 gathered", "bf16", "frozen"),
]


class Meter(L.Callback):
    """Times of the steps after the warm-up, and the peak of memory in them; then, if asked for, one step's kernels."""

    def __init__(self, options: argparse.Namespace, cuda: bool, profile: bool) -> None:
        self.first, self.after, self.cuda, self.profile = options.warmup, options.warmup + options.steps, cuda, profile
        self.marks: list[Any] = []
        self.losses: list[Tensor] = []
        self.peak = 0.0
        self.begun = time.perf_counter()
        self.built = self.compiled = 0.0
        self.profiler = torch.profiler.profile()

    @property
    def batches(self) -> int:
        return self.after + self.profile

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._wait()
        self.built = time.perf_counter() - self.begun

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self._wait()
            self.compiled = time.perf_counter() - self.begun - self.built
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
        if self.first <= batch_idx < self.after:
            self.marks.append(mark())
        if batch_idx == self.after:
            self.profiler.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].detach())
        if batch_idx == self.after - 1:
            self.marks.append(mark())
            self._wait()
            self.peak = (torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0) + shared_gib(pl_module)
        if batch_idx == self.after:
            self._wait()
            self.profiler.stop()

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Drawn:
    """Random weights by name, drawn in full on a device: the same on every GPU, and for PEFT's names too."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        self.device, self.scale = device, (2 * model.config.num_hidden_layers) ** -0.5

    def __call__(self, name: str) -> Tensor:
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        shape, dtype = self.shapes[name]
        if "norm" in name:
            return torch.ones(shape, dtype=dtype, device=self.device)
        std = 0.02 * (self.scale if "o_proj" in name or "down_proj" in name else 1.0)  # the residual stream stays of one size
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(std=std, generator=generator)


def measure_big(way: str, base: str, model: str, options: argparse.Namespace, profile: bool) -> dict[str, Any]:
    """Median step time, peak memory, what building and the first steps took, on this rank."""
    how, device, world = WAYS[way], device_here(options), dist.get_world_size()
    cuda = device.type == "cuda"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch._dynamo.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    with torch.device("meta"):
        net = empty_model(options, options.layers)
    drawn, parameters = Drawn(net, device), sum(p.numel() for p in net.parameters())
    meter, ours = Meter(options, cuda, profile), model == "ours"
    quantize = None if base == "bf16" else base
    callbacks: list[L.Callback] = [meter]
    if ours:
        lora = LoRAConfig(rank=16, alpha=32, target_modules=LINEARS)
        callbacks.append(
            LoRACallback(
                lora, module="model", merge_on_fit_end=False, compile="layer" if options.compile else None, quantize=quantize,
                checkpointing=options.recompute, weights=drawn,
            )
        )  # fmt: skip
    else:
        net = other(net, model, quantize, options)
    task = task_of(net)
    task.cpu = lambda: task  # Lightning would move it to host memory at the end
    alone = how.options is None and not ours  # DDP refuses a model that trains nothing: each GPU by itself
    if alone:
        load_base(net, drawn, device=device)
    elif not ours:
        task.on_fit_start = partial(load_other, net, drawn)
    if model == "frozen":
        task.configure_optimizers = lambda: None
    rows = Rows(meter.batches * options.rows * world, options.length, SHAPES[options.shape][-1])
    mine = Subset(rows, range(dist.get_rank() // how.tensor, len(rows), world // how.tensor))  # who shares layers shares the batch
    loader = DataLoader(mine, options.rows * how.tensor, collate_fn=partial(collate_answers, pad=0))
    backend = {"process_group_backend": "gloo" if options.cpu else "nccl"}
    spread: Any = DDPStrategy(**backend) if how.options is None else LoRAFSDP2Strategy(**backend, **how.options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="gpu" if cuda else "cpu", devices=([device.index] if cuda else 1) if alone else world, precision="bf16-true",
            strategy="auto" if alone else spread, max_steps=meter.batches, max_epochs=-1, callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, use_distributed_sampler=False,
            default_root_dir=folder,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(task, loader)
        saved = save(trainer, folder, cuda) if options.save and ours else {}
    times = [elapsed(a, b) for a, b in pairwise(meter.marks)]
    shares, kernels = spent(meter.profiler) if profile else ({}, [])
    return {
        "ms": statistics.median(times), "times": times, "tokens": options.rows * options.length * world, "peak_gib": meter.peak,
        "losses": [loss.item() for loss in meter.losses], "parameters": parameters, "build_s": meter.built, "warmup_s": meter.compiled,
        "pulls": getattr(task, "_lora_sharded", (True, False))[1], "profile": shares, "kernels": kernels, **saved,
    }  # fmt: skip


def save(trainer: L.Trainer, folder: str, cuda: bool) -> dict[str, float]:
    """Seconds and bytes of a checkpoint in one file, and by how much it raises the memory of this GPU."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, begun = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    seconds, more = time.perf_counter() - begun, (torch.cuda.max_memory_allocated() if cuda else 0) - before
    size = Path(folder, "last.ckpt").stat().st_size if dist.get_rank() == 0 else 0
    return {"save_s": seconds, "save_bytes": size, "save_gib": more / 2**30}


def other(net: nn.Module, model: str, quantize: str | None, options: argparse.Namespace) -> nn.Module:
    """The frozen model or PEFT's, with what the callback does for ours."""
    if quantize is not None:
        quantize_base(net, quantize)
    net = frozen(net) if model == "frozen" else peft(net)
    if options.compile:
        compile_layers(net)
    if options.recompute is not None:
        checkpoint_layers(net, keep=KEPT[options.recompute])
    return net


def load_other(net: nn.Module, drawn: Drawn) -> None:
    """Load the weights of a model without our adapters; PEFT's begin as in its constructor."""
    parameters = {name: parameter.shape for name, parameter in net.named_parameters()}

    def weights(name: str) -> Tensor:
        if ".lora_" not in name:
            return drawn(name)
        value = torch.zeros(parameters[name], device=drawn.device)
        generator = torch.Generator(drawn.device).manual_seed(zlib.crc32(name.encode()))
        return value if "lora_B" in name else nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)

    load_base(net, weights, device=drawn.device)


def big_rows(workers: Any, options: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """The table of rows for each number of GPUs, then the speed of a GPU against that among the fewest."""
    begun = time.monotonic()
    chosen = [row for row in ROWS if options.big is None or "/".join(row) in options.big]
    speeds: dict[tuple[str, str, str], dict[int, float]] = {}
    for world in options.worlds or [n for n in (1, 2, 4, 8) if n <= workers.world][-3:]:
        members = workers if world == workers.world else type(workers)(world, options.cpu)
        print(f"\n{world} devices, recompute: {options.recompute}, {options.layers or 'all'} blocks")
        print("| strategy | base | model | ms | tokens/s a GPU | TFLOP/s, 4N | GiB a GPU | loss | pulls | build, s | first steps, s |")
        print("|---" * 11 + "|", flush=True)
        for row in [row for row in chosen if world % WAYS[row[0]].tensor == 0]:
            way, base, model = row
            found: dict[str, Any] = {"part": "big", "world": world, "way": way, "base": base, "model": model}
            left = options.budget - (time.monotonic() - begun)
            try:
                if left <= 0:
                    raise RuntimeError("not run: the time was up")
                profile = options.profile and model == "ours" and way == "fsdp2" and base != "nf4"
                ranks = members.run(measure_big, way, base, model, options, profile, timeout=min(options.row_timeout, max(left, 30.0)))
            except RuntimeError as error:
                print(f"| {way} | {base} | {model} | {error} |" + " |" * 7, flush=True)
                say(found | {"failed": str(error)})
                continue
            found |= {**ranks[0], **{key: max(rank[key] for rank in ranks) for key in ("ms", "peak_gib", "build_s")}}
            found["tokens_per_s"] = speed = found["tokens"] / world / found["ms"] * 1e3
            found["tflops"] = 4 * found["parameters"] * speed / 1e12
            speeds.setdefault(row, {})[world] = speed
            say(found)
            show(found)
        for way, base, model in chosen:
            mine, floor = (speeds.get((way, base, each), {}).get(world) for each in (model, "frozen"))
            if mine and floor and model != "frozen":
                print(f"{way}, {base}, {model}: {floor / mine:.3f} of the frozen model's time", flush=True)
        if members is not workers:
            members.close()
    for row, of_worlds in speeds.items():
        fewest = min(of_worlds)
        if len(of_worlds) > 1:
            scaling = ", ".join(f"{world}: {speed / of_worlds[fewest]:.3f}" for world, speed in of_worlds.items())
            print(f"weak scaling from {fewest}, {' '.join(row)}: {scaling}")


def show(found: dict[str, Any]) -> None:
    """Print a row, and under it what else was measured."""
    print(
        f"| {found['way']} | {found['base']} | {found['model']} | {found['ms']:.0f} | {found['tokens_per_s']:,.0f} |"
        f" {found['tflops']:.0f} | {found['peak_gib']:.1f} | {found['losses'][-1]:.4f} | {found['pulls']} |"
        f" {found['build_s']:.1f} | {found['warmup_s']:.1f} |",
        flush=True,
    )
    if "save_s" in found:
        size = f"{found['save_bytes'] / 1e6:,.1f} MB in {found['save_s']:.1f} s"
        print(f"  saved {size}, {found['save_gib']:.2f} GiB more on the GPU", flush=True)
    if found["profile"]:
        print("  " + ", ".join(f"{kind} {ms:.0f}" for kind, ms in found["profile"].items()), flush=True)
        for name, count, ms in found["kernels"][:12]:
            print(f"    {ms:8.1f} ms {count:6.0f} {name}", flush=True)
