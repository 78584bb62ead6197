"""What is frozen and equal is one parameter; what trains or differs is not."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.trials.shared_base import SharedBase


def model(seed=0):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False), nn.Linear(4, 2))
    made[2].weight = made[0].weight  # tied
    return apply_lora(made, config=LoRAConfig(rank=2, target_modules=["1"], modules_to_save=["3"]))


def test_equal_frozen_parameters_are_shared():
    base, one, two = SharedBase(), model(), model()
    assert base.share(one) == base.share(two) == []
    assert two[1].weight is one[1].weight and two[1].bias is one[1].bias
    assert two[0].weight is two[2].weight is one[0].weight
    assert two[1].lora_A is not one[1].lora_A and two[3].weight is not one[3].weight and two[3].weight.requires_grad
    assert base.trains() is None


def test_what_differs_is_named_and_stays():
    base, one, two = SharedBase(), model(), model(1)
    base.share(one)
    before = two[1].weight
    assert set(base.share(two)) == {"0.weight", "1.weight", "1.bias", "2.weight"} and two[1].weight is before


@pytest.mark.parametrize(("precision", "shared"), [("64-true", True), ("32-true", False)])
def test_a_cast_counts_for_runs_of_the_same_precision(precision, shared):
    base, one, two = SharedBase(), model(), model()
    base.share(one, "64-true")
    one.double()
    assert base.share(two, precision) == []
    assert (two[1].weight is one[1].weight) is shared and two[1].weight.dtype == (torch.float64 if shared else torch.float32)


def test_unfreezing_is_seen():
    base, one = SharedBase(), model()
    base.share(one)
    one[1].weight.requires_grad_(True)
    assert base.trains() == "1.weight"
