"""An error at any operation of a merge, such as a lack of memory, leaves the model merged wholly or not at all."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, apply_lora, merge_lora, unmerge_lora
from tests.conftest import fill, snapshot


class FailsAt(TorchDispatchMode):
    """Raise at the n-th operation, counted from 1."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["plain", "dora", "lora_bias"])
@pytest.mark.parametrize("do", [merge_lora, unmerge_lora])
def test_nothing_is_half_done(do, variant):
    model = fill(apply_lora(nn.Sequential(nn.Linear(4, 3)), LoRAConfig(rank=2, target_modules=["0"], variant=variant)))
    if do is unmerge_lora:
        merge_lora(model)
    x = torch.ones(2, 4)
    y, number, failed = model(x), 1, True
    while failed:
        again = copy.deepcopy(model)
        before = snapshot(again)
        try:
            with FailsAt(number) as mode:
                do(again)
            failed = mode.left <= 0
        except torch.OutOfMemoryError:
            assert snapshot(again) == before and torch.equal(again(x), y), number
        number += 1
    assert number > 20 and again[0].merged is (do is merge_lora)
