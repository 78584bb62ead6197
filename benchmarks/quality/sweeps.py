"""Study (c): α, dropout, learning rate and batch size, and the advised learning rate beside a sweep."""

from __future__ import annotations

from benchmarks.quality.choice import Cell, Records, all_trials
from benchmarks.quality.trial import Trial


def cells() -> list[Cell]:
    return []


def trials(records: Records) -> list[Trial]:
    return all_trials(cells(), records)
