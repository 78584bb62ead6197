"""Study (b): rank against the set of adapted layers, each cell at its own learning rate."""

from __future__ import annotations

from benchmarks.quality.choice import Cell, Records, all_trials
from benchmarks.quality.trial import Trial

TARGETS = ("qv", "attention", "mlp", "all")
#: Task, base, steps, the middle of the first rates, ranks, targets.
GRIDS = [
    ("questions", "encoder", 200, 2e-3, (1, 2, 4, 8, 16, 64), TARGETS),
    ("translation", "decoder", 100, 3e-3, (1, 8, 64), ("qv", "all")),
]
BATCH, ALPHA = 32, 16.0


def cells() -> list[Cell]:
    """Return what is compared. α is the same for all ranks, as in "LoRA Without Regret"."""
    return [
        Cell(
            "ablation",
            task,
            base,
            "lora",
            steps,
            start,
            {"lora": {"rank": rank, "alpha": ALPHA, "target_modules": targets}, "batch_size": BATCH},
        )
        for task, base, steps, start, ranks, sets in GRIDS
        for rank in ranks
        for targets in sets
    ]


def trials(records: Records) -> list[Trial]:
    return all_trials(cells(), records)
