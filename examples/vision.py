"""A tiny vision transformer meets another camera: LoRA on its linears and on the convolution that cuts the image into patches.

    python examples/vision.py

The model first learns squares, crosses and rings, light on dark. Then the pictures are inverted, dim and noisy, and it fails. Adapters
on frozen weights mend that, the head included; merged, the model has its old size and speed. The images are made here. Seconds on a CPU.
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAConfig, lora_layers

SIDE, PATCH, SHAPES = 16, 4, ["square", "cross", "ring"]


def images(count: int, seed: int, inverted: bool) -> TensorDataset:
    """Images of shape (count, 1, 16, 16) and their labels: a shape of 7 × 7 at one of 25 places, on noise."""
    draw = torch.Generator().manual_seed(seed)
    line = torch.arange(7)
    square = torch.ones(7, 7)
    cross = ((line[:, None] == 3) | (line == 3)).float()
    ring = 1 - nn.functional.pad(torch.ones(5, 5), (1, 1, 1, 1))
    labels = torch.randint(3, (count,), generator=draw)
    places = 2 * torch.randint(5, (count, 2), generator=draw)
    pictures = 0.05 * torch.randn(count, 1, SIDE, SIDE, generator=draw)
    for picture, label, (y, x) in zip(pictures, labels.tolist(), places.tolist(), strict=True):
        picture[0, y : y + 7, x : x + 7] += (square, cross, ring)[label]
    if inverted:
        pictures = 0.6 * (1 - pictures) + 0.05 * torch.randn(pictures.shape, generator=draw)
    return TensorDataset(pictures, labels)


class Block(nn.Module):
    """Attention, then an MLP, each on normalized input and added to it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.fc1, self.fc2 = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:  # (batch, patches, size)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # each (batch, 4 heads, patches, size / 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class ViT(L.LightningModule):
    """Patches by a convolution, two blocks, the mean, a head."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, size, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, size) / 5)
        self.blocks = nn.Sequential(Block(size), Block(size))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, len(SHAPES))

    def forward(self, pictures: Tensor) -> Tensor:  # (batch, 1, 16, 16) -> (batch, 3)
        x = self.patches(pictures).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3, eps=1e-6)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train in full, then adapt to other images; return what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="to train on (%(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="of each training (%(default)s)")
    options = parser.parse_args(argv)
    quiet = {"logger": False, "accelerator": "cpu", "enable_checkpointing": False, "enable_model_summary": False}

    L.seed_everything(0)
    model, test = ViT(), DataLoader(images(256, seed=1, inverted=True), batch_size=64)
    L.Trainer(max_epochs=options.epochs, **quiet).fit(model, DataLoader(images(options.images, 0, inverted=False), batch_size=32))

    model.requires_grad_(False)  # norms and positions have no adapter and stay as they are
    config = LoRAConfig(rank=4, target_modules=["patches", "qkv", "proj", "fc1", "fc2", "head"], rank_pattern={"head": 2})
    trainer = L.Trainer(max_epochs=options.epochs, callbacks=[LoRACallback(config)], **quiet)
    before = trainer.test(model, test, verbose=False)[0]["test_accuracy"]
    trainer.fit(model, DataLoader(images(options.images, seed=2, inverted=True), batch_size=32))
    after = trainer.test(model, test, verbose=False)[0]["test_accuracy"]
    merged = all(layer.merged for _, layer in lora_layers(model))
    print(f"inverted images: {before:.0%} -> {after:.0%} of 256 test images; merged: {merged}")
    return {"before": before, "after": after, "merged": merged}


if __name__ == "__main__":
    main()
