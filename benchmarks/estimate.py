"""Estimated memory beside what was measured on GPUs (benchmarks/README.md and its records): the error of each row.

python benchmarks/estimate.py            # no GPU, a minute
"""

from __future__ import annotations

import sys

import floor_modes
import moe_step

from lightning_lora import LoRAConfig
from lightning_lora.estimate import Setting, estimate_memory
from lightning_lora.estimate.memory import GIB

# (shape, rank or None for all weights, setting and what else the adapters have, GiB as measured, where)
DENSE, LONG = {"batch": 4, "length": 2048, "compiled": True}, {"batch": 1, "length": 32768, "compiled": True}
SELECTIVE, SHARDED = {"checkpointing": "selective"}, {"strategy": "lora_fsdp2", "devices": 2}
LOGITS = {"batch": 4, "length": 2048, "chunked_loss": False}
MEASURED = [
    ("1b", 16, {**DENSE}, 9.9, "README, on one H100"),
    ("1b", 16, {**DENSE, "recorded": True}, 10.7, "2026-11-fp8.log"),
    ("1b", 64, {**DENSE, "recorded": True}, 11.2, "2026-11-ranks.log"),
    ("1b", 16, {**DENSE, "chunked_loss": False}, 20.6, "README, on one H100"),
    ("1b", 16, {**DENSE, "chunked_loss": False, "compiled": False}, 22.5, "README, on one H200"),
    ("1b", 16, {**DENSE, "quantize": "fp8"}, 9.0, "2026-11-fp8.log"),
    ("1b", 16, LONG, 29.3, "README, how cost grows"),
    ("8b", 16, {**DENSE}, 39.9, "2026-11-ranks.log"),
    ("8b", 64, {**DENSE}, 41.7, "2026-11-ranks.log"),
    ("8b", 256, {**DENSE}, 47.7, "2026-11-ranks.log"),
    ("8b", 16, {**DENSE, "recorded": True}, 41.4, "README, on one H100"),
    ("8b", 16, {**DENSE, "quantize": "fp8"}, 33.4, "2026-11-fp8.log"),
    ("8b", 64, {**DENSE, "quantize": "fp8"}, 35.2, "2026-11-ranks.log"),
    ("8b", 16, {**DENSE, "batch": 2, "quantize": "nf4"}, 18.3, "README, QLoRA on one H100"),
    ("8b", 16, {**LONG, "checkpointing": "full"}, 28.9, "2026-11-offload.log"),
    ("8b", 16, {**LONG, "checkpointing": "full", "offload": ("activations",)}, 21.9, "2026-11-offload.log"),
    ("8b", 16, {**LONG, **SELECTIVE}, 36.4, "2026-11-selective.log"),
    ("8b", 16, {**LONG, **SELECTIVE, "offload": ("activations",)}, 21.5, "2026-11-long-rows.log"),
    ("8b", 16, {**LONG, **SELECTIVE, "offload": ("activations", "frozen")}, 9.3, "2026-11-long-rows.log"),
    ("8b", 16, {**LONG, **SELECTIVE, "length": 131072}, 99.1, "2026-11-long-rows.log"),
    ("30b-a3b", 16, {**DENSE, "compiled": False}, 131.9, "2026-11-moe.log"),
    ("30b-a3b", 16, {**DENSE, "compiled": False, "batch": 2}, 100.1, "2026-11-moe.log"),
    ("30b-a3b/16", 16, {**DENSE, "compiled": False}, 46.8, "2026-11-moe.log"),
    ("30b-a3b/16", 16, {**DENSE}, 37.7, "2026-11-moe.log"),
    ("30b-a3b", 16, {**DENSE, "compiled": False, "batch": 2, "dropout": 0.1}, 104.2, "2026-11-moe.log"),
    ("1b", 16, {**DENSE, "variant": "dora"}, 11.7, "README, DoRA"),
    ("8b", 16, {**DENSE, "variant": "dora"}, 46.9, "README, DoRA"),
    ("1b", None, {**DENSE, "chunked_loss": False}, 25.1, "README, on one H200"),
    ("1b", None, {**DENSE, "chunked_loss": False, "compiled": False}, 32.1, "README, on one H200"),
    ("8b", 16, {**LOGITS, "strategy": "ddp", "devices": 2}, 58.6, "README, several H200"),
    ("8b", 16, {**LOGITS, **SHARDED}, 53.1, "README, several H200; pulled 53.3"),
    ("8b", 16, {**LOGITS, **SHARDED, "devices": 4}, 49.2, "README, several H200; pulled 49.5"),
    ("8b", 16, {**LOGITS, **SHARDED, "compiled": True}, 45.2, "README, several H200; pulled 45.4"),
    ("8b", 16, {**DENSE, **SHARDED}, 34.7, "2026-11-two-gpus.log, gathered and pulled"),
    ("8b", 16, {**SHARDED, "batch": 2, "length": 4096, "checkpointing": "full"}, 15.0, "2026-11-two-gpus.log"),
    ("8b", 16, {**SHARDED, "batch": 2, "length": 4096, "checkpointing": "full", "chunked_loss": False}, 23.6, "2026-11-two-gpus.log"),
]


def estimated(shape: str, rank: int | None, options: dict) -> float:
    """GiB of a row."""
    name, _, layers = shape.partition("/")
    build = floor_modes.Setting(shape=name, layers=int(layers) if layers else None, seq=options["length"])
    experts = name in moe_step.SHAPES and name not in floor_modes.SHAPES
    model = moe_step.build(build, set(), "meta") if experts else floor_modes.build(build, "meta")
    targets = [*moe_step.ATTENTION, "experts"] if experts else floor_modes.LINEARS
    adapters = {name: value for name, value in options.items() if name in ("variant", "dropout")}
    setting = Setting(**{name: value for name, value in options.items() if name not in adapters})
    config = LoRAConfig(rank=rank, alpha=2.0 * rank, target_modules=targets, **adapters) if rank else None
    return estimate_memory(model, config, setting).peak / GIB


def main() -> None:
    print("| shape | r | setting | measured, GiB | estimated | error | source |\n|---|---|---|---|---|---|---|")
    for shape, rank, options, measured, source in MEASURED:
        found = estimated(shape, rank, options)
        words = f"{options['batch']} × {options['length']}" + "".join(
            f", {name}={value}" if value is not True else f", {name}" for name, value in options.items() if name not in ("batch", "length")
        )
        print(
            f"| {shape} | {rank or 'all weights'} | {words} | {measured} | {found:.1f} | {found / measured - 1:+.1%} | {source} |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
