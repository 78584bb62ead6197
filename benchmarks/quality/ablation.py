"""Study (b): rank against the set of adapted layers.

α is the same for all ranks, as in "LoRA Without Regret", and so is the learning rate within a set of layers, chosen at rank 8: in the sweep
of rates (`sweeps.py`) ranks 1, 8 and 64 are best at the same ones.
"""

from __future__ import annotations

from typing import Any

from benchmarks.quality.choice import Cell, Records, all_trials
from benchmarks.quality.trial import Trial

RANKS = (1, 2, 4, 8, 16, 64)
TARGETS = ("qv", "attention", "mlp", "all")
CHOSEN, ALPHA, START, STEPS, BATCH = 8, 16.0, 2e-3, 200, 32


def config(rank: int, targets: str) -> dict[str, Any]:
    """Return a trial's config."""
    return {"lora": {"rank": rank, "alpha": ALPHA, "target_modules": targets}, "batch_size": BATCH}


def cells() -> list[Cell]:
    """Return what is compared."""
    return [
        Cell("ablation", "questions", "encoder", "lora", STEPS, START, config(rank, targets), chosen_with=config(CHOSEN, targets))
        for targets in TARGETS
        for rank in RANKS
    ]


def trials(records: Records) -> list[Trial]:
    """Return the trials that can be named so far."""
    return all_trials(cells(), records)
