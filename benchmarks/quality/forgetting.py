"""What a model forgets while it learns a task: its perplexity on other text, before and after, LoRA at several ranks against all weights.

Every method is trained at three learning rates and three seeds, so that forgetting can be read at the rate chosen on the validation rows,
and at equal quality. The model before training:

    python -m benchmarks.quality.forgetting --out FILE          # 200 CPU seconds
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.quality.bases import load_base
from benchmarks.quality.choice import SEEDS, Records
from benchmarks.quality.prose import load_prose, perplexity
from benchmarks.quality.tasks import quality_cache
from benchmarks.quality.trial import Trial, surroundings

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
    """Return the trials. All can be named at once."""
    ways: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [("lora", {"lora": lora}, LORA_RATES) for lora in ADAPTED]
    ways.append(("full", {}, FULL_RATES))
    return [
        Trial(STUDY, TASK, BASE, method, seed, rate, STEPS, {**config, "batch_size": BATCH}, measures=MEASURE)
        for method, config, rates in ways
        for rate in rates
        for seed in SEEDS
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    from lightning_lora.tasks import CausalLMTask

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a file that one line of JSON is added to")
    options = parser.parse_args(argv)
    before = Trial(STUDY, "none", BASE, "none", 0, 0.0, 0, split="val")
    task = CausalLMTask(str(load_base(BASE).folder), dtype="float32")
    record = {**asdict(before), "key": before.key, **surroundings(), "val": None, "test": None, "error": None, "trainable": 0}
    record["measures"] = forgotten(task)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))
    return record


if __name__ == "__main__":
    main()
