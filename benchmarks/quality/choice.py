"""Choose learning rates, then report: what every study does with the things it compares.

A cell is one thing that is compared. Its learning rate is chosen by the loss on the validation rows, with a seed of its own, over a grid
of factors of three. As long as the best rate is the grid's lowest or highest, the grid grows, so that every cell gets a rate with worse
ones on both sides. Then the cell trains with the seeds that are reported, and only these read test rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.quality.trial import Trial

CHOOSES = 100  # seed of the trials that choose
SEEDS = (0, 1, 2)
STEP = 3.0  # from one learning rate to the next
GROWS = 4  # rates beyond the first three, at most
Records = Mapping[str, dict[str, Any]]  # key of a trial → its record


@dataclass(frozen=True)
class Cell:
    """One thing that is compared: a task, a base, a method and its config.

    Attributes:
        start: The middle of the first three learning rates.
        chosen_with: The config that the learning rate is chosen with, where several cells share it; by default the cell's own.
    """

    study: str
    task: str
    base: str
    method: str
    steps: int
    start: float
    config: dict[str, Any] = field(default_factory=dict)
    measures: tuple[str, ...] = ()
    chosen_with: dict[str, Any] | None = None

    def trial(self, **changes: Any) -> Trial:
        """Return one of its trials."""
        own = {"study": self.study, "task": self.task, "base": self.base, "method": self.method, "steps": self.steps}
        return Trial(**{**own, "config": self.config, "measures": self.measures, **changes})


def trials_of(cell: Cell, records: Records, seeds: Sequence[int] = SEEDS) -> list[Trial]:
    """Return the trials of a cell that can be named so far: those that choose; once they are done, those that report."""
    tried = [0, -1, 1]
    while True:
        choosing = {exponent: _chooser(cell, exponent) for exponent in tried}
        if any(trial.key not in records for trial in choosing.values()):
            return list(choosing.values())
        best = min(tried, key=lambda exponent: loss_of(records[choosing[exponent].key]))
        if math.isinf(loss_of(records[choosing[best].key])):
            return list(choosing.values())  # all failed
        if min(tried) < best < max(tried) or len(tried) >= 3 + GROWS:
            break
        tried.append(best - 1 if best == min(tried) else best + 1)
    rate = choosing[best].lr
    return [*choosing.values(), *(cell.trial(seed=seed, lr=rate, split="test") for seed in seeds)]


def _chooser(cell: Cell, exponent: int) -> Trial:
    config = cell.config if cell.chosen_with is None else cell.chosen_with
    return replace(cell.trial(config=config, seed=CHOOSES, lr=float(f"{cell.start * STEP**exponent:.2g}"), split="val"), measures=())


def loss_of(record: dict[str, Any]) -> float:
    """Return the loss on the validation rows; infinite for a trial that failed or diverged."""
    found = (record.get("val") or {}).get("loss")
    return math.inf if found is None else found


def all_trials(cells: Iterable[Cell], records: Records, seeds: Sequence[int] = SEEDS) -> list[Trial]:
    """Return the trials of all cells that can be named so far."""
    return list({trial.key: trial for cell in cells for trial in trials_of(cell, records, seeds)}.values())
