"""Study (c): learning rate, α, dropout and batch size, and the advised learning rate beside the best of a sweep.

What is held against them: the seed document's section on tricks (α = r or 2r, dropout of 0.05 to 0.1 for small data, a higher learning rate
than full fine-tuning's), and "LoRA Without Regret" (ten times full fine-tuning's rate whatever the rank; large batches cost LoRA more).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.quality.choice import SEEDS, Cell, Records, all_trials
from benchmarks.quality.trial import Trial

STEPS, BATCH = {"encoder": 200, "decoder": 100}, 32
START = {"encoder": 2e-3, "decoder": 1e-3}  # LoRA's middle rate at α = 16
RATES = {
    "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "full": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
}
RANKS = (1, 8, 64)
ALPHAS = (4, 8, 16, 32, 64, 128)
DROPOUTS = (0.0, 0.05, 0.1, 0.3)
FEW = 160  # training rows of a small data set
BATCHES = (8, 32, 128, 400)
#: Ways whose learning rate is advised: method, config, and the middle of the sweep's first rates.
ADVISED: dict[str, tuple[str, dict[str, Any], float]] = {
    "lora": ("lora", {"lora": {"rank": 8, "alpha": 16.0}}, 2e-3),
    "lora-qv": ("lora", {"lora": {"rank": 8, "alpha": 16.0, "target_modules": "qv"}}, 2e-3),
    "lora-r64": ("lora", {"lora": {"rank": 64, "alpha": 32.0}}, 1e-3),
    "rslora-r64": ("lora", {"lora": {"rank": 64, "alpha": 16.0, "scaling": "rslora"}}, 5e-4),
    "lora+": ("lora", {"lora": {"rank": 8, "alpha": 16.0}, "callback": {"lora_plus_ratio": 16.0}}, 1e-4),
    "dora": ("lora", {"lora": {"rank": 8, "alpha": 16.0, "variant": "dora"}}, 2e-3),
    "vera": ("lora", {"lora": {"rank": 64, "variant": "vera", "target_modules": "attention"}}, 2e-2),
    "full": ("full", {}, 2e-4),
}


def lora(rank: int = 8, alpha: float = 16.0, **more: Any) -> dict[str, Any]:
    """Return the config of plain LoRA on all linears."""
    return {"lora": {"rank": rank, "alpha": alpha, "target_modules": "all", **more}}


def rate_sweep(task: str, base: str) -> list[Trial]:
    """Return every rate with every rank and with full fine-tuning, on validation rows alone."""
    ways = [("lora", lora(rank)) for rank in RANKS] + [("full", {})]
    return [
        Trial("rates", task, base, method, seed, rate, STEPS[base], {**config, "batch_size": BATCH}, split="val")
        for seed in SEEDS
        for method, config in ways
        for rate in RATES[method]
    ]


def cell(
    study: str, task: str, base: str, config: dict[str, Any], start: float | None = None, method: str = "lora", batch: int = BATCH
) -> Cell:
    steps = max(1, STEPS[base] * BATCH // batch)
    return Cell(study, task, base, method, steps, START[base] if start is None else start, {**config, "batch_size": batch})


def alphas(task: str, base: str, records: Records) -> list[Trial]:
    """Return each α at one rate, which suits α = 16, and at its own."""
    cells = [cell("alpha", task, base, lora(alpha=alpha), START[base] * 16 / alpha) for alpha in ALPHAS]
    fixed = [one.trial(study="alpha-fixed", seed=seed, lr=START[base], split="val") for one in cells for seed in SEEDS]
    return [*all_trials(cells, records), *fixed]


def dropouts(task: str, base: str) -> Iterable[Cell]:
    """Return dropouts on all rows and on few."""
    for rows in (None, FEW):
        for dropout in DROPOUTS:
            yield cell("dropout", task, base, {**lora(dropout=dropout), **({} if rows is None else {"rows": rows})})


def batches(task: str, base: str) -> Iterable[Cell]:
    """Return batch sizes of LoRA and full fine-tuning that see the same number of rows."""
    for batch in BATCHES:
        grown = (batch / BATCH) ** 0.5  # Adam's rate grows about so
        yield cell("batch", task, base, lora(), START[base] * grown, batch=batch)
        yield cell("batch", task, base, {}, START[base] / 10 * grown, "full", batch)


def advised(task: str, base: str, records: Records) -> list[Trial]:
    """Return each way at its best rate of a sweep, and at the advised one."""
    cells = [cell("advised", task, base, config, start, method) for method, config, start in ADVISED.values()]
    return [*all_trials(cells, records), *(one.trial(seed=seed, lr="auto") for one in cells for seed in SEEDS)]


def trials(records: Records) -> list[Trial]:
    """Return the trials of all sweeps that can be named so far."""
    task = ("questions", "encoder")
    return [
        *rate_sweep(*task),
        *advised(*task, records),
        *alphas(*task, records),
        *all_trials(batches(*task), records),
        *all_trials(dropouts(*task), records),
    ]
