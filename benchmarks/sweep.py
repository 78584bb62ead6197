"""What training several adapters side by side over one base costs, against training them one after another, through ``Trainer.fit``.

    PYTHONPATH=. python benchmarks/sweep.py --recorded                     # one GPU: 1B shape, three sizes of batches, 1 to 8 trials
    PYTHONPATH=. python benchmarks/sweep.py --shape small --sizes 1x16,4x64 --steps 6 --warmup 2        # a CPU
    PYTHONPATH=. python benchmarks/sweep.py --cpu --shape tiny --sizes 1x8 --steps 2 --rounds 1         # the same in seconds

A trial is a fit of `CausalLMTask` with `LoRACallback` (all-linear, --rank, --dropout, AdamW) over random rows of one length. *ms a
trial's step* is the median over the steps after the warm-up, and over rounds in which the ways alternate: for k trials the time from one
joint step to the next, divided by k. *gain* is that of one trial over it: what k separate runs take, over what k trials take. On a CPU it
is the process's own time. *passes* are the passes through the model for each step of a trial. Memory is what a GPU had allocated at most.
Trials side by side are eager. *recorded* is one trial with `compile="layer"` and CUDA graphs, which leaves less of a GPU idle: trials that
are compiled run one after another, so its gain is what a sweep of those has.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import statistics
import time
import warnings
from functools import partial
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from fit_ways import GPU, LAST, Rows, Watch, task_of
from floor import elapsed
from floor_modes import LINEARS, SHAPES, Setting, build
from torch.utils.data import DataLoader
from transformers import __version__

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data.batching import collate_answers
from lightning_lora.trials import SideBySide, Trial


class Clock(Watch):
    """On a CPU, the process's own time: others may use the machine."""

    def begin(self, step: int) -> None:
        if GPU:
            super().begin(step)
        elif self.first <= step <= self.last:
            self.marks.append(time.process_time())


def light_copy(model: Any) -> Any:
    """A model of its own over the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def trial_of(number: int, model: Any, setting: Setting, watch: Watch | None, recorded: bool) -> Trial:
    """A fit that is not made yet."""
    compiled: dict[str, Any] = {"compile": "layer", "cuda_graphs": True} if recorded else {}

    def make() -> Any:
        torch.manual_seed(number)
        steps = setting.warmup + setting.steps + LAST
        rows = Rows(steps * setting.batch, setting.seq, SHAPES[setting.shape][-1])
        loader: Any = DataLoader(rows, setting.batch, collate_fn=partial(collate_answers, pad=0))
        config = LoRAConfig(rank=setting.rank, dropout=setting.dropout, target_modules=LINEARS)
        trainer = pl.Trainer(
            accelerator="gpu" if GPU else "cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, precision="bf16-true" if GPU else "32-true",
            callbacks=[LoRACallback(config, module="model", merge_on_fit_end=False, **compiled), *([watch] if watch else [])],
        )  # fmt: skip
        task = task_of(light_copy(model))
        task.load()
        return trainer, task, lambda: trainer.fit(task, loader)

    return Trial(f"trial {number}", {}, make)


def measure(trials: int, model: Any, setting: Setting, recorded: bool = False) -> tuple[list[float], float, float]:
    """ms of each step of a trial, passes a step, GiB."""
    watch = Clock(setting)
    runner = SideBySide(trials, trials > 1)
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    fits = [trial_of(number, model, setting, None if number else watch, recorded) for number in range(trials)]
    runner.run(fits)
    for fit in fits:
        assert fit.outcome.status == "complete", fit.outcome
    times = [(elapsed(*pair) if GPU else (pair[1] - pair[0]) * 1000) / trials for pair in pairwise(watch.marks)]
    passes = runner.joint.forwards / runner.joint.steps if trials > 1 else 1.0
    return times, passes, torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--sizes", default="1x64,1x512,4x2048", help="rows x tokens of a trial's batch")
    parser.add_argument("--trials", default="1,2,4,8")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recorded", action="store_true", help="one trial compiled and recorded too (a GPU)")
    parser.add_argument("--cpu", action="store_true", help="a dry run: refuse a GPU")
    options = parser.parse_args()
    assert not (options.cpu and GPU)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print(f"{torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}, transformers {__version__}", flush=True)
    print("| batch | trials | ms a trial's step | gain | passes a step | GiB |\n|---|---|---|---|---|---|")
    for size in options.sizes.split(","):
        batch, seq = map(int, size.split("x"))
        setting = Setting(options.shape, batch, seq, options.rank, options.dropout, None, options.steps, options.warmup)
        model = build(setting)
        model = model if GPU else model.float()
        ways = [int(k) for k in options.trials.split(",")]
        times: dict[int, list[float]] = {k: [] for k in ways}
        others: dict[int, tuple[float, float]] = {}
        for _ in range(options.rounds):
            for k in ways:
                mine, passes, gib = measure(k, model, setting)
                times[k] += mine
                others[k] = passes, gib
        alone = statistics.median(times[ways[0]])
        for k in ways:
            ms, (passes, gib) = statistics.median(times[k]), others[k]
            print(f"| {size} | {k} | {ms:.1f} | {alone / ms:.2f} | {passes:.2f} | {gib:.1f} |", flush=True)
        if options.recorded:
            mine, passes, gib = measure(1, model, setting, recorded=True)
            ms = statistics.median(mine)
            print(f"| {size} | 1, recorded | {ms:.1f} | {alone / ms:.2f} | {passes:.2f} | {gib:.1f} |", flush=True)
        del model


if __name__ == "__main__":
    main()
