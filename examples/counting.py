"""A tiny language model that can count, and rows to teach it to count otherwise: what the other examples train. No download.

A row is a sequence of numbers below 32 in which each is the one before plus a step. `pretrained` learns step 1, in about a second.
An adapter then learns another step, so what it changed is easy to see: ``[3, 4, 5]`` becomes ``[3, 5, 7]``.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

NUMBERS = 32


def pretrained(steps: int = 80) -> LlamaForCausalLM:
    """A two-layer Llama that counts by 1. The same weights at each call; the random numbers of the caller stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS, max_position_embeddings=64, **sizes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _, ids in zip(range(steps), batches(step=1, count=16 * steps), strict=True):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def rows(step: int, count: int, length: int = 8, seed: int = 0) -> torch.Tensor:
    """``count`` rows that count by ``step`` from random starts, shape (count, length)."""
    starts = torch.randint(NUMBERS, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + step * torch.arange(length)) % NUMBERS


def batches(step: int, count: int, batch_size: int = 16) -> DataLoader:
    """The rows in batches, always in the same order."""
    return DataLoader(list(rows(step, count)), batch_size=batch_size, generator=torch.Generator())


@torch.no_grad()
def accuracy(model: torch.nn.Module, step: int) -> float:
    """Share of next numbers that the model gets right on rows it has not seen in this order."""
    model.eval()
    ids = rows(step, count=64, seed=1)
    guessed = model(input_ids=ids).logits[:, 1:-1].argmax(-1)  # the step shows from the second number on
    return float((guessed == ids[:, 2:]).float().mean())
