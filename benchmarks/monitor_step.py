"""What ``LoRAMonitor`` costs: the time of one measurement beside a training step, both in one run of ``Trainer.fit`` that measures in every
step, and the floating-point operations of both, counted.

Then all layers get half of their rank, and the whole again, as ``apply_ranks_at`` gives them other ranks once in a run.

The share is that at the default interval: one measurement in 100 steps. The clock is the process's CPU time on a CPU, the wall's with the
device waited for on a GPU.

    python benchmarks/monitor_step.py
    python benchmarks/monitor_step.py --hidden 4096 --layers 32 --rank 16 --batch 4 --length 2048 --dtype bfloat16 --accelerator cuda
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_lora import LoRACallback, LoRAConfig, LoRAMonitor, get_lora_parameters, resize_ranks
from lightning_lora.model.layer_statistics import gradient_norms, low_rank_layers, spectra

VOCAB, WARM_UP = 512, 3
INTERVAL = inspect.signature(LoRAMonitor).parameters["every_n_steps"].default


class Module(L.LightningModule):
    """A small Llama on random ids."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args, self.model = args, llama(args)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(get_lora_parameters(self), lr=1e-3)

    def train_dataloader(self) -> Any:
        ids = torch.randint(VOCAB, ((WARM_UP + self.args.steps) * self.args.batch, self.args.length))
        return DataLoader(ids, batch_size=self.args.batch)  # type: ignore[arg-type]


class Timed(LoRAMonitor):
    """Notes when measuring and batches begin and end."""

    def __init__(self, now: Any) -> None:
        super().__init__(every_n_steps=1, report=False)
        self.now, self.measured, self.batches, self.began = now, [], [], 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self.began = self.now()

    def on_before_optimizer_step(self, *args: Any) -> None:
        start = self.now()
        super().on_before_optimizer_step(*args)
        self.measured.append(self.now() - start)

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches.append(self.now() - self.began)


def llama(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    heads = max(args.hidden // 128, 4)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": args.layers}
    config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=heads, num_key_value_heads=heads // 4, **sizes)
    with torch.device(args.accelerator):  # a CPU takes minutes to draw billions of numbers
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))


def clock(accelerator: str) -> Any:
    if accelerator == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def counted(module: Module, args: argparse.Namespace) -> tuple[int, int]:
    """Floating-point operations of a step's products and of a measurement's; those of r × r are not products and not counted."""
    ids = torch.randint(VOCAB, (args.batch, args.length), device=module.device)
    # torch 2.11 counts no attention kernel whose keys have fewer heads.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as step:
        module.training_step(ids, 0).backward()
    layers = low_rank_layers(module)
    with FlopCounterMode(display=False) as measurement:
        spectra(layers)
        gradient_norms(layers)
    return step.get_total_flops(), measurement.get_total_flops()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("hidden", 256), ("layers", 4), ("rank", 16), ("batch", 4), ("length", 128), ("steps", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    if args.accelerator == "cpu":
        torch.set_num_threads(1)  # process time counts every thread's
    module, monitor = Module(args), Timed(clock(args.accelerator))
    with tempfile.TemporaryDirectory() as folder:
        lora = LoRACallback(LoRAConfig(rank=args.rank, target_modules="all-linear"), merge_on_fit_end=False)
        trainer = L.Trainer(
            accelerator=args.accelerator,
            devices=1,
            max_epochs=1,
            callbacks=[lora, monitor],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module)
    pairs = list(zip(monitor.measured, monitor.batches, strict=True))[WARM_UP:]
    measure = statistics.median(m for m, _ in pairs)
    step = statistics.median(b - m for m, b in pairs)
    flops = counted(module.to("cuda" if args.accelerator == "cuda" else "cpu"), args)
    print(f"step {1e3 * step:.1f} ms, measurement {1e3 * measure:.1f} ms: {measure / step / INTERVAL:.2%} of the time")
    print(f"step {flops[0]:.3e} flops, measurement {flops[1]:.3e}: {flops[1] / flops[0] / INTERVAL:.4%} of the flops")
    print(f"one measurement in {INTERVAL} steps")
    for rank in (max(args.rank // 2, 1), args.rank):
        start = monitor.now()
        changed = resize_ranks(module, {".*": rank}, trainer.optimizers)
        print(f"{len(changed)} layers to rank {rank}, with AdamW's state: {monitor.now() - start:.2f} s, once in a run")


if __name__ == "__main__":
    main()
