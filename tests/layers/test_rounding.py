"""What rounding loses, of one weight."""

import math

import pytest
import torch

from lightning_lora.layers.rounding import Rounding, check_limit, check_lost, measure


def test_it_is_the_definition():
    base, update = torch.randn(30, 40).bfloat16().float(), torch.randn(30, 40) * 0.01
    merged = (base + update).bfloat16()
    found = measure(base, update, merged)
    exact = (merged.double() - base.double() - update.double()).norm() / update.double().norm()
    assert found.lost == pytest.approx(exact.item(), rel=1e-3) and found.survives == 1 - found.lost
    assert found.entries == 1200 and found.dtype == "bfloat16" and found.unchanged == int((merged.float() == base).sum()) > 0


def test_no_update_loses_nothing_and_changes_nothing():
    found = measure(torch.ones(3, 4), torch.zeros(3, 4), torch.ones(3, 4))
    assert (found.lost, found.survives, found.unchanged) == (0.0, 1.0, 12)


def test_an_error_larger_than_the_update_leaves_none_of_it():
    found = measure(torch.zeros(4), torch.full((4,), 0.1), torch.ones(4))
    assert found.lost == pytest.approx(9.0) and found.survives == 0.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_sum_outside_the_dtype_loses_everything(value):
    found = measure(torch.zeros(4), torch.full((4,), 1e5), torch.tensor([1e5, 1e5, 1e5, value]))
    assert found.lost == math.inf and found.survives == 0.0


def test_the_worst_layer_is_named():
    good, bad, worst = (Rounding(missing, 1.0, 0, 4, "float16") for missing in (0.0001, 0.04, 0.25))
    check_lost({"a": good, "b": bad, "c": worst}, None)
    check_lost({"a": good, "b": bad, "c": worst}, 0.5)
    with pytest.raises(ValueError, match=r"'c' loses 50.00% of its update by rounding, more than max_lost=0.1 \(2 of 3 weights do\)"):
        check_lost({"a": good, "c": worst, "b": bad}, 0.1)
    with pytest.raises(ValueError, match=r"'b' was merged by other code"):
        check_lost({"a": good, "b": None}, 0.1)


@pytest.mark.parametrize("limit", [0, 0.5, 2, None, math.inf])
def test_limits(limit):
    check_limit(limit)
    with pytest.raises(ValueError, match="name=-1 must be a share"):
        check_limit(-1, "name")
