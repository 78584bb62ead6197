"""A test of ``lightning-lora estimate`` on settings that none of its rules was chosen by: written down first, measured afterwards.

    PYTHONPATH=. python benchmarks/held_out.py --write              # no GPU: estimates to benchmarks/records/2026-11-held-out.json
    PYTHONPATH=. python benchmarks/held_out.py --measure            # one GPU: the rows with one device
    PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/held_out.py --measure    # two GPUs: the rows with two
    PYTHONPATH=. python benchmarks/held_out.py --beside LOG...      # a table of both, from what --measure printed
    PYTHONPATH=. python benchmarks/held_out.py --measure --tiny     # the same in seconds, on a CPU

Each row is ``Trainer.fit`` of `CausalLMTask` under `LoRACallback`, as the command line trains it, over random rows without padding. The
peak is ``torch.cuda.max_memory_allocated`` from the third step on, and what GPUs share, which it does not count; seconds are the median
of three steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import floor_modes
import moe_step
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.estimate import Setting, estimate_memory, estimate_seconds
from lightning_lora.estimate.memory import GIB

RECORD = Path(__file__).parent / "records" / "2026-11-held-out.json"
WARMUP, STEPS = 2, 3
LINEARS, EXPERTS = floor_modes.LINEARS, [*moe_step.ATTENTION, "experts"]
QWEN = (2560, 9728, 36, 32, 8, 128, 151936)  # Qwen3-4B's


@dataclass(frozen=True)
class Row:
    """What is trained and how.

    Attributes:
        shape: a name, and how many layers if fewer than it has.
        setting: of the run, as estimate is told.
        config: of the adapters; None trains every weight.
        strategy: more options of ``lora_fsdp2``.
    """

    shape: str
    setting: Setting
    config: LoRAConfig | None
    strategy: dict[str, Any] = field(default_factory=dict)


def lora(rank: int, targets: list[str] = LINEARS, **options: Any) -> LoRAConfig:
    return LoRAConfig(rank=rank, alpha=2.0 * rank, target_modules=targets, **options)


TWO = {"strategy": "lora_fsdp2", "devices": 2}
ROWS = {
    "8b fp8": Row("8b", Setting(8, 512, quantize="fp8"), lora(8, dropout=0.05)),
    "8b r128 checkpoints": Row("8b", Setting(3, 3072, checkpointing="full"), lora(128)),
    "mixture": Row("30b-a3b/8", Setting(3, 1536, checkpointing="full"), lora(8, EXPERTS)),
    "mixture dropout": Row("30b-a3b/6", Setting(5, 1024), lora(8, EXPERTS, dropout=0.1)),
    "1b checkpoints": Row("1b", Setting(12, 1024, checkpointing="full"), lora(32, dropout=0.1)),
    "1b q, v, all logits": Row("1b", Setting(2, 6144, chunked_loss=False), lora(8, ["q_proj", "v_proj"])),
    "another architecture": Row("qwen3-4b", Setting(2, 3072), lora(16)),
    "1b mixed precision": Row("1b", Setting(4, 1024, precision="bf16-mixed"), lora(16)),
    "1b dora": Row("1b", Setting(4, 1536), lora(16, variant="dora", dropout=0.1)),
    "1b full": Row("1b", Setting(2, 2048), None),
    "8b compiled selective": Row("8b", Setting(1, 12288, compiled=True, checkpointing="selective"), lora(64)),
    "1b ddp": Row("1b", Setting(6, 1024, strategy="ddp", devices=2), lora(64)),
    "8b fsdp2": Row("8b", Setting(2, 3072, checkpointing="full", **TWO), lora(32), {"pull_frozen": False}),
    "8b fsdp2 pulled": Row("8b", Setting(2, 3072, checkpointing="full", **TWO), lora(32)),
    "8b fsdp2 fp8": Row("8b", Setting(4, 1024, quantize="fp8", **TWO), lora(8)),
}


def build(row: Row, device: str) -> Any:
    """The model of a row, filled, in bf16; in fp32 for mixed precision."""
    name, _, layers = row.shape.partition("/")
    made = floor_modes.Setting(shape=name.split()[0], layers=int(layers) if layers else None, seq=row.setting.length)
    if name in ("30b-a3b", "tiny mixture"):
        model = moe_step.build(made, set(), device)
    elif name == "qwen3-4b":
        config = Qwen3Config(**dict(zip(floor_modes.NAMES, QWEN, strict=True)), tie_word_embeddings=True, use_cache=False)
        with torch.device(device):
            model = Qwen3ForCausalLM(config).bfloat16().train()
    else:
        model = floor_modes.build(made, device)
    return model.float() if row.setting.precision.endswith("mixed") else model


def estimated(row: Row) -> dict[str, Any]:
    """What estimate says of a row: bytes of its parts, and seconds."""
    model = build(row, "meta")
    found = estimate_memory(model, row.config, row.setting)
    return {"gib": found.peak / GIB, "parts": found.parts(), "seconds": estimate_seconds(model, row.config, row.setting, "h200")}


def measured(row: Row) -> dict[str, Any]:
    """Peak and time of a row's steps on this device."""
    import lightning as L
    from fit_ways import Rows, task_of
    from floor import elapsed, mark
    from multi_gpu_runs import shared_gib
    from torch.utils.data import DataLoader

    from lightning_lora.data.batching import collate_answers
    from lightning_lora.strategies import LoRAFSDP2Strategy

    cuda, marks, peak = torch.cuda.is_available(), list[Any](), [0.0]

    class Meter(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == WARMUP and cuda:
                torch.cuda.reset_peak_memory_stats()
            if batch_idx >= WARMUP:
                marks.append(mark())

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            peak[0] = torch.cuda.max_memory_allocated() + shared_gib(pl_module) * GIB if cuda else 0.0

    setting = row.setting
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    began = time.perf_counter()
    if cuda:
        torch.cuda.set_device(device)
    task = task_of(build(row, device))
    task._needs_logits = None if setting.chunked_loss else "it is measured so"
    rows = Rows((WARMUP + STEPS + 1) * setting.batch * setting.devices, setting.length, task.model.config.vocab_size)
    loader = DataLoader(rows, setting.batch, collate_fn=partial(collate_answers, pad=0), num_workers=0, pin_memory=cuda)
    callbacks: list[Any] = [Meter()]
    if row.config is not None:
        callbacks.append(LoRACallback(
            row.config, module="model", merge_on_fit_end=False, compile="layer" if setting.compiled else None, quantize=setting.quantize,
            checkpointing=setting.checkpointing, offload=list(setting.offload) or None,
        ))  # fmt: skip
    strategy: Any = {"single": "auto", "ddp": "ddp"}.get(setting.strategy)
    strategy = strategy or LoRAFSDP2Strategy(process_group_backend="nccl" if cuda else "gloo", **row.strategy)
    trainer = L.Trainer(
        accelerator="gpu" if cuda else "cpu", devices=setting.devices, precision=setting.precision, max_steps=WARMUP + STEPS + 1,
        max_epochs=-1, strategy=strategy, gradient_clip_val=1.0, callbacks=callbacks, enable_checkpointing=False,
        enable_model_summary=False, logger=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(task, loader)
    times = [elapsed(a, b) / 1e3 for a, b in pairwise(marks)]
    return {"gib": peak[0] / GIB, "seconds": statistics.median(times), "took": time.perf_counter() - began}


def tiny(row: Row) -> Row:
    """A row small enough for a CPU, with the shape of its kind."""
    shape = "tiny mixture" if row.shape.startswith("30b") else "tiny"
    return replace(row, shape=shape, setting=replace(row.setting, length=32, batch=2, compiled=False))


def measure(names: list[str], small: bool) -> None:
    """Print a line of JSON for each row of as many devices as there are processes."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if rank == 0:
        print(f"# {world} x {gpu}, torch {torch.__version__}", flush=True)
    for name in names:
        row = tiny(ROWS[name]) if small else ROWS[name]
        if row.setting.devices != world:
            continue
        try:
            found = measured(row)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        if rank == 0:
            print(json.dumps({"row": name, **found}), flush=True)
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def beside(logs: list[Path]) -> None:
    """Print the estimates beside what was measured."""
    record = json.loads(RECORD.read_text())["rows"]
    lines = [line for log in logs for line in log.read_text().splitlines() if line.startswith('{"row"')]
    print("| setting | estimated, GiB | measured | error | seconds, estimated | measured |\n|---|---|---|---|---|---|")
    for line in lines:
        found = json.loads(line)
        said = record[found["row"]]
        if "failed" in found:
            print(f"| {said['what']} | {said['gib']:.2f} | {found['failed']} | | | |")
            continue
        error = f"{said['gib'] / found['gib'] - 1:+.1%}" if found["gib"] else ""
        low, high = said["seconds"]
        print(f"| {said['what']} | {said['gib']:.2f} | {found['gib']:.2f} | {error} | {low:.3f}–{high:.3f} | {found['seconds']:.3f} |")


def words(name: str, row: Row) -> str:
    """What a row is, for a table."""
    plain, config = asdict(Setting()), row.config
    turned = {key: value for key, value in asdict(row.setting).items() if key not in ("batch", "length") and value != plain[key]}
    adapters = "all weights" if config is None else f"r={config.rank}" + (f", dropout {config.dropout}" if config.dropout else "")
    more = [f"{key}={value}" if value is not True else key for key, value in (turned | row.strategy).items()]
    return ", ".join([f"{name}: {row.shape}, {row.setting.batch} × {row.setting.length}", adapters, *more])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the estimates down")
    parser.add_argument("--measure", action="store_true", help="train each row")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--tiny", action="store_true", help="shrink every row")
    parser.add_argument("--beside", nargs="*", type=Path, default=[], help="what --measure printed")
    options = parser.parse_args(argv)
    if options.measure:
        measure(options.rows, options.tiny)
    elif options.beside:
        beside(options.beside)
    else:
        found = {name: {"what": words(name, ROWS[name]), **estimated(ROWS[name])} for name in options.rows}
        for each in found.values():
            print(f"{each['what']}: {each['gib']:.2f} GiB, {each['seconds'][0]:.3f} to {each['seconds'][1]:.3f} s", flush=True)
        if options.write:
            RECORD.write_text(json.dumps({"torch": torch.__version__, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
