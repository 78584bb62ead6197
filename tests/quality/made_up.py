"""Records of trials that never ran, in the form of :mod:`benchmarks.quality.trial`."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from benchmarks.quality.forgetting import trials as forgetting_trials
from benchmarks.quality.run import STUDIES, plan_of
from benchmarks.quality.trial import Trial


def record(trial: Trial, accuracy: float, **more: Any) -> dict[str, Any]:
    """A record whose test accuracy is a little above its validation accuracy, and whose loss is what is missing to 1."""
    found = {"accuracy": accuracy, "loss": 1 - accuracy}
    made = {name: getattr(trial, name) for name in ("study", "task", "base", "method", "config", "seed", "lr", "steps", "split")}
    test = {"accuracy": accuracy + 0.01, "loss": 0.99 - accuracy} if trial.split == "test" else None
    about = {"device": "a device", "versions": {"torch": "9"}, "commit": "abc", "error": None, "trainable": 1234, "seconds": 1.0}
    return {**made, "key": trial.key, "val": found, "test": test, "loss": 0.5, "rate": 1e-3, "measures": {}, **about, **more}


def chosen(study: str, method: str, config: dict[str, Any], best: float, *, task: str = "questions") -> list[dict[str, Any]]:
    """Three rates with a seed of their own, and three seeds at the best one: 1e-3."""
    rates = [
        record(Trial(study, task, "encoder", method, 100, lr, 5, config, "val"), best - off)
        for lr, off in ((1e-4, 0.2), (1e-3, 0), (1e-2, 0.1))
    ]
    return rates + [record(Trial(study, task, "encoder", method, seed, 1e-3, 5, config), best + 0.01 * (seed - 1)) for seed in range(3)]


@cache
def everything() -> list[dict[str, Any]]:
    """Records of every trial that the studies name, round after round, until they name no new one."""
    records: dict[str, dict[str, Any]] = {}
    plan = plan_of(list(STUDIES))
    while new := [trial for trial in plan(records) if trial.key not in records]:
        for trial in new:
            rate = 1e-3 if isinstance(trial.lr, str) else trial.lr
            accuracy = 0.8 - 0.1 * abs(math.log10(max(rate, 1e-6)) + 3) / 6 + 0.01 * (trial.seed % 100)
            records[trial.key] = record(trial, accuracy, measures={"perplexity": 20 + 100 * rate} if trial.measures else {})
    return [before(), *records.values()]


def before() -> dict[str, Any]:
    """What the model is before training."""
    untrained = record(Trial("forgetting", "none", "decoder", "none", 0, 0.0, 0, split="val"), 0.0, measures={"perplexity": 20.0})
    return untrained | {"val": None}


def forgetting() -> list[dict[str, Any]]:
    """More is learned and forgotten at higher rates, all weights forget more."""
    records = [before()]
    for trial in forgetting_trials({}):
        times, forgets = (1, 1) if trial.method == "lora" else (0.1, 20)
        learned = 0.9 - 0.0001 / trial.lr * times + 0.01 * trial.seed
        records.append(record(trial, learned, measures={"perplexity": 20 + 1000 * trial.lr * forgets + trial.seed}))
    return records
