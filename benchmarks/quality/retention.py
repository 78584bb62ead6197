"""Study (a): how much of full fine-tuning's quality the cheaper methods keep, over three tasks, an encoder and a decoder."""

from __future__ import annotations

from benchmarks.quality.choice import Cell, Records, all_trials
from benchmarks.quality.trial import Trial

STEPS = {"encoder": 200, "decoder": 100}
BATCH = 32
LORA = {"lora": {"rank": 8, "alpha": 16.0, "target_modules": "all"}}
#: Method → the middle of its first three learning rates, for the encoder and the decoder, and its config.
METHODS: dict[str, tuple[float, float, dict]] = {
    "lora": (2e-3, 1e-3, LORA),
    "full": (2e-4, 1e-4, {}),
    "probe": (2e-2, 1e-2, {}),
    "prefix": (2e-2, 2e-2, {"peft": {"num_virtual_tokens": 20}}),
    "prompt": (5e-2, 5e-2, {"peft": {"num_virtual_tokens": 20}}),
}
POOLED = {("encoder", "probe"): {"pooling": "mean"}}
PAIRS = [("translation", "decoder"), ("questions", "decoder"), ("reviews", "decoder"), ("questions", "encoder"), ("reviews", "encoder")]
FORGOTTEN = ("benchmarks.quality.forgetting:forgotten",)  # perplexity on other text, beside the test rows


def cells() -> list[Cell]:
    """Return what is compared. A linear probe writes no text, so translation has none. What changes the decoder may also forget."""
    return [
        Cell(
            "retention",
            task,
            base,
            method,
            STEPS[base],
            start[base == "decoder"],
            {**config, **POOLED.get((base, method), {}), "batch_size": BATCH},
            measures=FORGOTTEN if base == "decoder" and method in ("lora", "full") else (),
        )
        for task, base in PAIRS
        for method, (*start, config) in METHODS.items()
        if (task, method) != ("translation", "probe")
    ]


def trials(records: Records) -> list[Trial]:
    return all_trials(cells(), records)
