"""Pack several examples into each row, so that every batch has one shape and nearly no padding.

The rows are put together once, by best-fit decreasing as TRL's ``bfd``: the longest example first, each into the fullest row that has room.
Every epoch shuffles the rows. The number of rows and the shape of a batch never change, so schedules know the end, and one compiled graph
or one recorded CUDA graph serves every step.

A batch says where documents begin by the names that transformers' models take: ``position_ids`` restart in every document, and
``cu_seq_lens_q`` has the documents' bounds in the rows laid end to end, always as many as the fullest rows need. Padding is documents
without labels.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_lora.data.batching import Example
from lightning_lora.ops.cross_entropy import IGNORE, POSITIONS, answer_positions
from lightning_lora.utils.messages import counted

_SHAPED = ("input_ids", "labels", "position_ids")
CROWD = 4  # a row is closed at this many times the mean number of examples: a batch has bounds for its fullest rows, which kernels look at


def best_fit_decreasing(lengths: Sequence[int], room: int, seed: int = 0, most: int | None = None) -> list[list[int]]:
    """Return rows of indices whose lengths add up to at most ``room``.

    Args:
        lengths: At most ``room`` each.
        room: Tokens per row.
        seed: Of the order among equal lengths.
        most: Indices per row; any number by default.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    left: list[int] = []  # the room that rows have left, sorted, each number once
    rows_with: dict[int, list[list[int]]] = {}
    rows: list[list[int]] = []
    for index in sorted(order, key=lambda i: -lengths[i]):
        place = bisect_left(left, lengths[index])
        if place == len(left):
            space, row = room, list[int]()
            rows.append(row)
        else:
            space = left[place]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space], left[place]
        row.append(index)
        space -= lengths[index]
        if space and len(row) != most:
            if space not in rows_with:
                insort(left, space)
                rows_with[space] = []
            rows_with[space].append(row)
    return rows


class PackedRows(Dataset[list[Example]]):
    """Examples, several per row.

    Args:
        examples: A sequence with ``lengths``, in tokens.
        length: Tokens per row.
        rows: Rows per batch.
        seed: Seed of the packing.

    Attributes:
        longest: Tokens of the longest example.
        documents: Number of documents, padding included, of the row that has most.
    """

    def __init__(self, examples: Any, length: int, rows: int, seed: int = 0) -> None:
        self.examples, self.length, self.rows = examples, length, rows
        lengths = list(examples.lengths)
        self.longest, self.tokens = max(lengths), sum(lengths)
        mean = length * len(lengths) / self.tokens
        self.packs = best_fit_decreasing(lengths, length, seed, most=math.ceil(CROWD * mean))
        documents = [len(pack) + len(self._padding(sum(lengths[i] for i in pack))) for pack in self.packs]
        self.documents = max(*documents, -(-length // self.longest))  # at least those of a row of padding only

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Example]:
        return [self.examples[i] for i in self.packs[index]]

    def __str__(self) -> str:
        share = self.tokens / (len(self) * self.length)
        return f"{counted(len(self.examples), 'example')} packed into {counted(len(self), 'row')} of {self.length} tokens, {share:.1%} full"

    def _padding(self, used: int) -> list[int]:
        """Return the lengths of the documents that fill a row up. None is longer than an example: models may have no further positions."""
        whole, rest = divmod(self.length - used, self.longest)
        return [self.longest] * whole + [rest] * (rest > 0)

    def collate(self, packs: Sequence[Sequence[Example]], pad: int) -> dict[str, Any]:
        """Return a batch of B rows of T tokens. If fewer than B packs are left, rows of padding take their place.

        Args:
            packs: At most B.
            pad: The token of padding.

        Returns:
            ``input_ids``, ``labels``, ``position_ids`` (B, T); ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (N + 1,), the same bounds of the
            documents, the last one repeated; ``max_length_q`` and ``max_length_k``, the longest document of any batch; and the
            ``answer_positions`` (M,) of :func:`~lightning_lora.ops.cross_entropy.answer_positions`.
        """
        filled = [*packs, *([[]] * (self.rows - len(packs)))]
        padding = [self._padding(sum(map(len, pack))) for pack in filled]
        return _batch(filled, padding, pad, self.length, self.longest, self.rows * self.documents)


def _batch(
    packs: Sequence[Sequence[Example]], padding: Sequence[list[int]], pad: int, length: int, longest: int, documents: int
) -> dict[str, Any]:
    """Lay out one row per pack, each with its examples and the documents of padding that fill it up."""
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for pack, rest in zip(packs, padding, strict=True):
        for example in pack:
            ids += example.ids
            labels += [IGNORE, *example.labels[1:]]  # nothing in its document predicts a first token
            lengths.append(len(example))
        ids += [pad] * sum(rest)
        labels += [IGNORE] * sum(rest)
        lengths += rest
    bounds = torch.zeros(documents + 1, dtype=torch.int32)
    bounds[1 : len(lengths) + 1] = torch.tensor(lengths).cumsum(0)
    bounds[len(lengths) + 1 :] = len(packs) * length
    places = torch.cat([torch.arange(count) for count in lengths])
    shaped = {name: torch.as_tensor(values).view(len(packs), length) for name, values in zip(_SHAPED, (ids, labels, places), strict=True)}
    return {
        **shaped,
        POSITIONS: answer_positions(shaped["labels"]),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
    }
