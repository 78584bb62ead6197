"""What a model forgets while it learns a task: its perplexity on other text, before and after, LoRA at several ranks against all weights.

Every method is trained at three learning rates and three seeds, so that forgetting can be read at the rate chosen on the validation rows,
and at equal quality: the least forgetting among rates whose validation accuracy reaches the same level.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from benchmarks.quality.choice import SEEDS, Records
from benchmarks.quality.prose import load_prose, perplexity
from benchmarks.quality.tasks import quality_cache
from benchmarks.quality.trial import Trial

STUDY, TASK, BASE = "forgetting", "questions", "decoder"
STEPS, BATCH = 100, 32
ARTICLES = 200  # about 45,000 tokens
MEASURE = ("benchmarks.quality.forgetting:forgotten",)
LORA_RATES, FULL_RATES = (4e-4, 1.2e-3, 3.6e-3), (4e-5, 1.2e-4, 3.6e-4)
# α is the same for all ranks, as in "LoRA Without Regret", so one grid of rates serves them.
ADAPTED: tuple[dict[str, Any], ...] = (
    {"rank": 8, "alpha": 32, "target_modules": "all"},
    {"rank": 64, "alpha": 32, "target_modules": "all"},
)


def forgotten(module: Any) -> dict[str, float]:
    """Return the perplexity of a trained task module on the prose."""
    return {"perplexity": perplexity(module.model, module.tokenizer, _prose())}


@lru_cache(maxsize=1)
def _prose() -> list[str]:
    return load_prose(quality_cache())[:ARTICLES]


def trials(records: Records) -> list[Trial]:
    """Return the trials; the first is the model before training. All can be named at once."""
    before = Trial(STUDY, TASK, BASE, "full", 0, 0.0, 0, {"batch_size": BATCH}, measures=MEASURE)
    ways: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [("lora", {"lora": lora}, LORA_RATES) for lora in ADAPTED]
    ways.append(("full", {}, FULL_RATES))
    return [before] + [
        Trial(STUDY, TASK, BASE, method, seed, rate, STEPS, {**config, "batch_size": BATCH}, measures=MEASURE)
        for method, config, rates in ways
        for rate in rates
        for seed in SEEDS
    ]
