"""Batches of encoded rows: padding, and batches of similar length so that little is padded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler

IGNORE = -100  # the label that cross entropy skips
WINDOW = 32  # batches sorted together: enough to make lengths alike, few enough to keep the order random


@dataclass
class Example:
    """One encoded row.

    ``rivals`` holds, for every other choice, where it first departs from the answer: (index into ``answer``, its token there).
    Greedy decoding that may write nothing but the choices gives the answer if and only if the answer's token beats the rival's at
    each of those places, so one forward over prompt and answer tells the accuracy, whatever the number of choices.
    """

    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    rivals: list[tuple[int, int]] = field(default_factory=list)
    text: str = ""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def collate_answers(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """Right-padded batch: ``input_ids``, ``attention_mask``, ``labels`` (B, T), and ``rivals`` (M, 3) if a row has choices.

    A row of ``rivals`` is (row of the batch, index among the batch's answer tokens counted row by row, rival token).
    """
    length = max(len(e) for e in examples)
    rows = [e.prompt + e.answer for e in examples]
    labels = [[IGNORE] * len(e.prompt) + e.answer for e in examples]
    batch = {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows]),
        "labels": torch.tensor([ids + [IGNORE] * (length - len(ids)) for ids in labels]),
    }
    rivals, start = [], 0
    for row, example in enumerate(examples):
        rivals += [(row, start + index, token) for index, token in example.rivals]
        start += len(example.answer)
    if rivals:
        batch["rivals"] = torch.tensor(rivals)
    return batch


def collate_prompts(examples: Sequence[Example], pad: int) -> dict[str, Any]:
    """Left-padded batch for generation: ``input_ids``, ``attention_mask`` (B, T), and the ``prompts`` as text."""
    length = max(len(e.prompt) for e in examples)
    return {
        "input_ids": torch.tensor([[pad] * (length - len(e.prompt)) + e.prompt for e in examples]),
        "attention_mask": torch.tensor([[0] * (length - len(e.prompt)) + [1] * len(e.prompt) for e in examples]),
        "prompts": [e.text for e in examples],
    }


class LengthGroupedBatches(BatchSampler):
    """Batches of rows of similar length.

    Shuffled, the order depends on ``seed`` and the epoch alone (Lightning calls `set_epoch`), so a resumed run sees the same batches.
    Lightning may put a ``DistributedSampler`` in ``sampler``'s place; each rank then groups its own share.

    Args:
        sampler: Yields row indices.
        batch_size: Rows a batch.
        drop_last: Drop an incomplete last batch.
        lengths: Length of every row of the data set.
        shuffle: Random order of rows and batches; otherwise sorted by length.
        seed: Of the shuffling.
    """

    def __init__(
        self, sampler: Iterable[int], batch_size: int, drop_last: bool, lengths: Sequence[int], shuffle: bool = False, seed: int = 0
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.lengths, self.shuffle, self.seed, self.epoch = lengths, shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Give this epoch its own order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = list(self.sampler)
        if self.shuffle:
            rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        window = WINDOW * self.batch_size if self.shuffle else max(len(rows), 1)
        rows = [row for i in range(0, len(rows), window) for row in sorted(rows[i : i + window], key=self.lengths.__getitem__)]
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        if self.drop_last and batches and len(batches[-1]) < self.batch_size:
            batches.pop()
        order = torch.randperm(len(batches), generator=generator).tolist() if self.shuffle else range(len(batches))
        yield from (batches[i] for i in order)
