"""Base weights that a file brings: told from another base's by their rows, noted, and forgotten when another file brings others."""

import pytest
import torch
from torch import nn

from lightning_lora.adapter_io.extras import brought_tensors, equal_values, note_brought, why_not_brought
from tests.conftest import TinyModel

W = torch.arange(12.0).reshape(6, 2)


def test_equal_up_to_the_narrower_dtype():
    exact = torch.tensor([1.0, 1 / 3])
    assert equal_values(exact, exact.bfloat16()) and equal_values(exact.half(), exact)
    assert not equal_values(exact, exact + torch.tensor([0.0, 0.1]))
    assert not equal_values(exact, exact[:1])
    assert equal_values(torch.tensor(3), torch.tensor(3))


@pytest.mark.parametrize(("changed", "reason"), [(0, None), (3, None), (4, "in 67% of its rows"), (6, "in 100% of its rows")])
def test_half_of_the_rows_tell_a_base(changed, reason):
    other = W.clone()
    other[:changed] += 1
    found = why_not_brought(nn.Linear(1, 1), W, other, check=True)
    assert found is None if reason is None else reason in found and "check_base=False" in found
    assert why_not_brought(nn.Linear(1, 1), W, other, check=False) is None


def test_another_shape_is_never_brought():
    assert why_not_brought(nn.Linear(1, 1), W, W[:4], check=False) == "has shape (4, 2), this model's has (6, 2)"


def test_a_scalar():
    assert "100%" in why_not_brought(nn.Linear(1, 1), torch.tensor(1.0), torch.tensor(2.0), check=True)


def test_notes(make):
    model = make(TinyModel)
    note_brought(model, ["embed.weight", "lm_head.weight"])
    assert {name: tensor is not None for name, tensor in brought_tensors(model).items()} == {"embed.weight": True, "lm_head.weight": True}
    assert brought_tensors(model)["embed.weight"] is model.embed.weight
    note_brought(model, ["embed.weight"])
    assert list(brought_tensors(model)) == ["embed.weight"]
    note_brought(model, [])
    assert brought_tensors(model) == {}
