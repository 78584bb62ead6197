import pytest
import torch

from lightning_lora.data.batching import Example, LengthGroupedSampler, collate_answers, collate_prompts


def example(prompt, answer, **more):
    return Example(prompt + answer, [-100] * len(prompt) + answer, **more)


def test_answers_are_padded_right_and_the_loss_is_on_them_only():
    batch = collate_answers([example([5, 6], [7, 3], rivals=[(0, 9)]), example([5, 6, 7, 8], [9, 3], rivals=[(0, 7), (1, 4)])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 3, 0, 0], [5, 6, 7, 8, 9, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["labels"].tolist() == [[-100, -100, 7, 3, -100, -100], [-100] * 4 + [9, 3]]
    assert batch["rivals"].tolist() == [[0, 0, 9], [1, 2, 7], [1, 3, 4]]


@pytest.mark.parametrize(("multiple", "length"), [(1, 6), (4, 8), (6, 6), (64, 64)])
def test_lengths_are_multiples(multiple, length):
    examples = [example([5, 6], [7, 3], rivals=[(0, 9)]), example([5, 6, 7, 8], [9, 3])]
    batch, plain = collate_answers(examples, pad=0, multiple=multiple), collate_answers(examples, pad=0)
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        assert batch[name].shape == (2, length)
        assert torch.equal(batch[name][:, :6], plain[name]) and (batch[name][:, 6:] == filler).all()
    assert torch.equal(batch["rivals"], plain["rivals"])


def test_prompts_are_padded_left():
    batch = collate_prompts([Example([5], text="a"), Example([5, 6, 7], text="b")], pad=0)
    assert batch["input_ids"].tolist() == [[0, 0, 5], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch["prompts"] == ["a", "b"]


def test_what_is_learnt_and_what_comes_before():
    row = Example([5, 6, 7, 8], [-100, 6, -100, 8])
    assert (row.prompt, row.answer, len(row)) == ([5], [6, 8], 4)
    whole = Example([5, 6], [5, 6])
    assert (whole.prompt, whole.answer) == ([], [6])  # nothing predicts the first token


def batches_of(sampler, size):
    rows = list(sampler)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def test_batches_are_of_similar_length_and_random_by_seed_and_epoch():
    lengths = torch.randint(5, 100, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    epoch = [0]
    sampler = LengthGroupedSampler(lengths, 8, lambda: epoch[0], seed=3)
    first = batches_of(sampler, 8)
    assert sorted(i for b in first for i in b) == list(range(1003)) and len(sampler) == 1003
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first) / len(first)
    assert spread < 10  # random batches of eight: over 70
    means = [sum(lengths[i] for i in b) for b in first]
    assert means != sorted(means)
    assert batches_of(sampler, 8) == first
    epoch[0] = 1
    assert {frozenset(b) for b in batches_of(sampler, 8)} != {frozenset(b) for b in first}
    assert batches_of(LengthGroupedSampler(lengths, 8, lambda: 0, seed=4), 8) != first


def test_without_an_epoch_rows_come_by_length():
    assert list(LengthGroupedSampler([5, 3, 9, 4], 2)) == [1, 3, 0, 2]
