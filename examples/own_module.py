"""A text classifier of your own, with its own ``training_step``: it knows nothing of LoRA, `LoRACallback` does it all.

    python examples/own_module.py

The module first learns which of two topics a sentence is about. Then it gets a new head and learns whether the sentence is friendly, "not"
included: adapters on the encoder and the new head train, the rest is frozen. The sentences are made here. Seconds on a CPU.
"""

from __future__ import annotations

import argparse
import random
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig

TOPICS = {"food": ["soup", "bread", "rice", "cake"], "weather": ["rain", "wind", "sun", "snow"]}
TONES = {"friendly": ["good", "fine", "great", "lovely"], "unfriendly": ["bad", "poor", "awful", "dull"]}
WORDS = ["the", "was", "is", "not", "very", *(word for words in (TOPICS | TONES).values() for word in words)]


def sentences(count: int, seed: int) -> list[tuple[list[int], int, int]]:
    """``count`` sentences as ids of words, each with its topic and its tone: "the soup was not good" is food and unfriendly."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        topic, tone, negated = draw.randrange(2), draw.randrange(2), draw.randrange(2)
        noun, word = draw.choice(list(TOPICS.values())[topic]), draw.choice(list(TONES.values())[tone])
        text = ["the", noun, draw.choice(["was", "is"]), "not" if negated else "very", word]
        found.append(([WORDS.index(each) for each in text], topic, tone ^ negated))
    return found


class Classifier(L.LightningModule):
    """An encoder and a head. Nothing here is for LoRA."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(WORDS), size)
        self.position = nn.Parameter(torch.randn(5, size) / 5)
        layer = nn.TransformerEncoderLayer(size, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(size, 2)

    def forward(self, ids: Tensor) -> Tensor:  # (batch, words) -> (batch, 2)
        return self.head(self.encoder(self.embed(ids) + self.position).mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, label = batch
        loss = nn.functional.cross_entropy(self(ids), label)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        ids, label = batch
        self.log("test_accuracy", (self(ids).argmax(-1) == label).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, eps=1e-6)


def loader(count: int, label: int, seed: int) -> DataLoader:
    """Batches of sentences with one of their two labels: 1 the topic, 2 the tone."""
    return DataLoader([(torch.tensor(row[0]), row[label]) for row in sentences(count, seed)], batch_size=32)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train the topic in full, then the tone with LoRA; return what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="sentences to train on (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="with LoRA (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/own_module"), help="folder of the checkpoints (%(default)s)")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the rows are in memory
    plain = {"logger": False, "accelerator": "cpu", "enable_model_summary": False, "default_root_dir": options.out}

    L.seed_everything(0)
    module = Classifier()
    L.Trainer(max_epochs=2, enable_checkpointing=False, **plain).fit(module, loader(options.rows, 1, seed=0))

    module.requires_grad_(False)  # it is pretrained now; embedding and positions have no adapter and stay as they are
    module.head = nn.Linear(32, 2)  # new, so it trains in full
    tone = loader(256, 2, seed=1)
    lora = LoRACallback(LoRAConfig(rank=4, target_modules="all-linear", modules_to_save=["head"]))
    trainer = L.Trainer(max_epochs=options.epochs, callbacks=[lora], **plain)
    before = trainer.test(module, tone, verbose=False)[0]["test_accuracy"]
    trainer.fit(module, loader(options.rows, 2, seed=0))  # adapters are merged when it ends
    after = trainer.test(module, tone, verbose=False)[0]["test_accuracy"]
    size = Path(trainer.checkpoint_callback.best_model_path).stat().st_size
    print(f"tone: {before:.0%} -> {after:.0%} of 256 test sentences; the checkpoint (adapters, head, optimizer) has {size:,} bytes")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
