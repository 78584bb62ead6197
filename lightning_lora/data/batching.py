"""Pad encoded rows to batches, and group rows of similar length, so that there is little padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lightning_lora.ops.cross_entropy import IGNORE, POSITIONS, WHOLE, answer_positions

WINDOW = 32  # batches sorted together: enough for similar lengths within a batch, few enough to keep the order random


@dataclass
class Example:
    """One encoded row.

    ``rivals`` has one entry for every other choice, at its first token that differs from the answer: (index into the row's answer tokens,
    the choice's token). Greedy decoding limited to the choices gives the answer if and only if the answer's token beats the rival's at each
    of those positions. So one forward pass over the row gives the accuracy, for any number of choices.

    Attributes:
        ids: The row's tokens.
        labels: As long as ``ids`` and not shifted: the same token where it is learnt, otherwise ``IGNORE``.
        rivals: See above.
        text: The prompt as text, in prediction.
    """

    ids: list[int]
    labels: list[int] = field(default_factory=list)
    rivals: list[tuple[int, int]] = field(default_factory=list)
    text: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __post_init__(self) -> None:
        self.rivals = [(index, token) for index, token in self.rivals]  # files have lists

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first one that is learnt."""
        return self.ids[: next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.ids))]

    @property
    def answer(self) -> list[int]:
        """The tokens that are learnt. The first token of a row is not, because nothing predicts it."""
        return [label for label in self.labels[1:] if label != IGNORE]


def collate_answers(examples: Sequence[Example], pad: int, multiple: int = 1, choices: bool = False) -> dict[str, Any]:
    """Return a right-padded batch: ``input_ids``, ``attention_mask``, ``labels`` (B, T), and ``rivals`` (M, 3) if a row has choices.

    ``answer_positions`` (N,) are those of the batch's answer tokens, see :func:`~lightning_lora.ops.cross_entropy.answer_positions`.
    ``whole`` is True in a batch that has no padding, and only there.

    T is the longest row's length, rounded up to a multiple of ``multiple``. A row of ``rivals`` is (row of the batch, index among the
    batch's answer tokens counted row by row, rival token). With ``choices`` they are there in any case, because some row of the split has
    choices: every process has to log the same metrics.
    """
    length = -(-max(len(e) for e in examples) // multiple) * multiple
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([e.ids + [pad] * (length - len(e)) for e in examples]),
        "attention_mask": torch.tensor([[1] * len(e) + [0] * (length - len(e)) for e in examples]),
        "labels": torch.tensor([e.labels + [IGNORE] * (length - len(e)) for e in examples]),
    }
    batch[POSITIONS] = answer_positions(batch["labels"])
    if all(len(e) == length for e in examples):
        batch[WHOLE] = True
    rivals, start = [], 0
    for row, example in enumerate(examples):
        rivals += [(row, start + index, token) for index, token in example.rivals]
        start += len(example.answer)
    if rivals or choices:
        batch["rivals"] = torch.tensor(rivals, dtype=torch.long).view(-1, 3)
    return batch


def collate_prompts(examples: Sequence[Example], pad: int) -> dict[str, Any]:
    """Return a left-padded batch for generation: ``input_ids``, ``attention_mask`` (B, T), and the ``prompts`` as text."""
    length = max(len(e) for e in examples)
    return {
        "input_ids": torch.tensor([[pad] * (length - len(e)) + e.ids for e in examples]),
        "attention_mask": torch.tensor([[0] * (length - len(e)) + [1] * len(e) for e in examples]),
        "prompts": [e.text for e in examples],
    }


def pad_right(rows: Sequence[list[int]], pad: int, multiple: int = 1) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` (B, T); T is the longest row's length, rounded up to a multiple of ``multiple``."""
    length = -(-max(map(len, rows)) // multiple) * multiple
    return {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows]),
    }


def cut_ids(ids: list[int], length: int, tokenizer: Any) -> list[int]:
    """Return the first tokens of a row that is too long, with the special tokens that end it."""
    special, end = set(tokenizer.all_special_ids), len(ids)
    while end and ids[end - 1] in special:
        end -= 1
    tail = ids[end:]
    return ids if len(ids) <= length else ids[: max(0, length - len(tail))] + tail[:length]


class LengthGroupedSampler(Sampler[int]):
    """Order rows such that consecutive batches have rows of similar length.

    A shuffled order depends only on ``seed`` and the epoch, so a resumed run sees the same batches. The epoch comes from a function, not
    from ``set_epoch``: Lightning calls that on the outermost sampler only, which is its own wrapper if several processes share the rows.

    Args:
        lengths: Length of every row of the data set, in tokens.
        batch_size: Rows per batch.
        epoch: Returns the current epoch. If None, nothing is shuffled: the rows are sorted by length.
        seed: Seed of the shuffling.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, epoch: Callable[[], int] | None = None, seed: int = 0) -> None:
        self.lengths, self.batch_size, self.epoch, self.seed = lengths, batch_size, epoch, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        size = self.batch_size
        if self.epoch is None:
            yield from sorted(range(len(self)), key=self.lengths.__getitem__)
            return
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        rows = torch.randperm(len(self), generator=generator).tolist()
        window = size * max(1, min(WINDOW, len(rows) // (4 * size)))  # a quarter of a small data set, or batches never mix
        rows = [row for i in range(0, len(rows), window) for row in sorted(rows[i : i + window], key=self.lengths.__getitem__)]
        full = len(rows) // size
        for batch in torch.randperm(full, generator=generator).tolist():
            yield from rows[batch * size : (batch + 1) * size]
        yield from rows[full * size :]
