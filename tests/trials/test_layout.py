"""Where trials' rows are in a joint batch: a part is what the trial computes alone."""

import pytest
import torch

from lightning_lora.ops.cross_entropy import POSITIONS, answer_positions
from lightning_lora.tasks.joining import join_batches, owned_means
from lightning_lora.tasks.padding import ROWS, end_to_end
from lightning_lora.trials.layout import Layout


def batch(lengths, width, padding_free=False):
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 50, mask.shape) * mask
    found = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}
    found[POSITIONS] = answer_positions(found["labels"])
    return found | ({ROWS: end_to_end(mask)} if padding_free else {})


@pytest.mark.parametrize("free", [(False, False, False), (True, True, True), (True, False, True)], ids=str)
def test_every_trial_has_its_own_positions(free):
    torch.manual_seed(0)
    batches = [batch([3, 5], 5, free[0]), batch([2], 4, free[1]), batch([7, 1, 4], 7, free[2])]
    joint, layout, owner = join_batches(batches)
    assert owner.tolist() == [0, 0, 1, 2, 2, 2] and joint["input_ids"].shape == (6, 7)
    assert torch.equal(joint[POSITIONS], answer_positions(joint["labels"]))
    ids = joint["input_ids"]
    if any(free):
        ids = ids.flatten()[joint[ROWS]["index"]][None]
        lengths = [
            row
            for one, mine in zip(batches, free, strict=True)
            for row in (one["attention_mask"].sum(1) if mine else [4] * len(one["labels"]))
        ]
        assert joint[ROWS]["cu_seq_lens_q"].tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
        assert joint[ROWS]["position_ids"].shape == ids.shape and joint[ROWS]["max_length_q"] == 7
    for one, mine, part in zip(batches, free, layout.split(ids), strict=True):
        alone = one["input_ids"].flatten()[one[ROWS]["index"]][None] if mine else one["input_ids"]
        assert torch.equal(part.flatten(), alone.flatten())
    hidden = torch.randn(*ids.shape, 3)
    again = layout.join(layout.split(hidden), hidden)
    for one, other in zip(layout.split(again), layout.split(hidden), strict=True):
        assert torch.equal(one, other)


def test_a_tensor_of_other_rows_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 2\), and the batch has 5 rows"):
        Layout([2, 3]).split(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="5 tokens"):
        Layout([2, 3], end_to_end=True).split(torch.zeros(2, 5, 1))
    with pytest.raises(ValueError, match="several lengths"):
        Layout([2, 3], [4, 6]).split(torch.zeros(5, 2, 6, 6))


@pytest.mark.parametrize("other", [{"position_ids": torch.zeros(1, 4)}, {"texts": ["a"]}], ids=lambda other: next(iter(other)))
def test_what_has_no_known_place_is_refused(other):
    with pytest.raises(ValueError, match=next(iter(other))):
        join_batches([batch([2], 4) | other, batch([2], 4) | other])


def test_means_are_each_owners():
    losses, owner = torch.tensor([1.0, 0.0, 5.0, 7.0]), torch.tensor([0, 0, 1, 1])
    assert owned_means(losses, owner, losses != 0, 2).tolist() == [1.0, 6.0]
