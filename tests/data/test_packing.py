"""Packed rows: what goes into which row, what a batch holds, and runs that train on them."""

from __future__ import annotations

import statistics
from itertools import chain, pairwise

import pytest
import torch

from lightning_lora.data.packing import PackedRows, best_fit_decreasing
from lightning_lora.ops.cross_entropy import IGNORE
from tests.tasks.packing_models import documents, packed_batch


def chat_lengths(count: int, longest: int = 2048) -> list[int]:
    logs = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.8
    return (350 * logs.exp()).clamp(16, longest).int().tolist()


def fullest(lengths: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing by its definition: every row is looked at."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fits = [row for row in rows if sum(row) + length <= room]
        if fits:
            max(fits, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@pytest.mark.parametrize(("lengths", "room"), [(chat_lengths(300), 2048), ([3, 3, 3, 5, 7, 10, 1, 1], 10), ([4], 4), ([1] * 9, 4)])
def test_each_example_goes_into_the_fullest_row_with_room(lengths: list[int], room: int) -> None:
    rows = best_fit_decreasing(lengths, room)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(map(sum, fullest(lengths, room)))  # equally full ones are alike


def test_rows_are_full_and_quickly_made() -> None:
    """Of chat lengths; and equal lengths are spread by the seed."""
    lengths = chat_lengths(20_000)
    rows = best_fit_decreasing(lengths, 2048)
    assert sum(lengths) > 0.998 * 2048 * len(rows)
    assert best_fit_decreasing(lengths, 2048) == rows != best_fit_decreasing(lengths, 2048, seed=1)


def test_no_row_is_crowded() -> None:
    """Four times the mean at the most. It costs little room."""
    examples = documents(chat_lengths(3000))
    packed = PackedRows(examples, 2048, 4)
    mean = 2048 * 3000 / sum(examples.lengths)
    assert max(map(len, best_fit_decreasing(examples.lengths, 2048))) > 4 * mean + 1 > max(map(len, packed.packs))
    assert packed.documents <= 4 * mean + 2 and sum(examples.lengths) > 0.99 * 2048 * len(packed)
    assert sorted(chain.from_iterable(packed.packs)) == list(range(3000))


def test_a_batch_says_where_documents_begin() -> None:
    """Eight tokens per row: 5 + 3, 4 + 2 + 2 of padding; then a row of padding in the place of a missing one."""
    examples = documents([5, 4, 3, 2])
    packed = PackedRows(examples, 8, 3)
    batch = packed.collate([packed[0], packed[1]], pad=9)
    five, four, three, two = (example.ids for example in examples)
    assert batch["input_ids"].tolist() == [five + three, [*four, *two, 9, 9], [9] * 8]
    expected = [[IGNORE, *ids[1:]] for ids in (five, three, four, two)]
    assert batch["labels"].tolist() == [expected[0] + expected[1], expected[2] + expected[3] + [IGNORE] * 2, [IGNORE] * 8]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8, 12, 14, 16, 21, 24, 24, 24] and batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["cu_seq_lens_k"] is batch["cu_seq_lens_q"] and batch["max_length_q"] == batch["max_length_k"] == 5


def test_every_batch_has_one_shape() -> None:
    examples = documents(chat_lengths(60, 200))
    packed = PackedRows(examples, 256, 4)
    batches = [packed.collate([packed[i] for i in rows], pad=0) for rows in torch.arange(len(packed)).split(4)]
    assert len({tuple((name, getattr(value, "shape", value)) for name, value in batch.items()) for batch in batches}) == 1
    for batch in batches:
        lengths = [end - begin for begin, end in pairwise(batch["cu_seq_lens_q"].tolist())]
        assert sum(lengths) == 4 * 256 and max(lengths) <= packed.longest == batch["max_length_q"]
        assert batch["position_ids"].flatten().tolist() == [i for length in lengths for i in range(length)]
    ids = torch.cat([batch["input_ids"][batch["labels"] != IGNORE] for batch in batches])
    assert sorted(ids.tolist()) == sorted(chain.from_iterable(example.ids[1:] for example in examples))  # each once


def test_the_fullest_rows_decide_how_many_bounds_there_are() -> None:
    packed = PackedRows(documents([8, 1, 1, 1, 1, 1, 1, 1]), 8, 2)
    assert packed.documents == 8 and len(packed.collate([packed[0]], pad=0)["cu_seq_lens_q"]) == 17
    assert str(packed) == "8 examples packed into 2 rows of 8 tokens, 93.8% full"
    assert statistics.mean(map(len, packed.packs)) == 4


def test_an_examples_own_labels_stay() -> None:
    """A prompt that is not learnt, and a first token that is: no document predicts it."""
    examples = documents([4, 3])
    examples[0].labels[:2] = [IGNORE] * 2
    batch = packed_batch(examples, 7, 1)
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, *examples[0].ids[2:], IGNORE, *examples[1].ids[1:]]]
