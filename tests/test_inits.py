"""How A and B start: one random, one zero, so that an adapted model is the base."""

import math

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.registry import INITS

KINDS = {
    "linear": (lambda: nn.Linear(400, 30), "lora_A", 400),
    "embedding": (lambda: nn.Embedding(300, 64), "lora_B", 8),
    "conv": (lambda: nn.Conv2d(32, 32, 3, groups=2), "lora_A", 16 * 9),
}


def layer(kind, **fields):
    model = nn.Module()
    model.layer = KINDS[kind][0]()
    return apply_lora(model, config=LoRAConfig(target_modules=["layer"], **fields)).layer


@pytest.mark.parametrize("init", sorted(INITS))
@pytest.mark.parametrize("kind", KINDS)
def test_one_factor_is_random_the_other_zero(kind, init):
    adapted = layer(kind, init=init)
    random = KINDS[kind][1]
    assert adapted.lora_parameters()[random].count_nonzero() == adapted.lora_parameters()[random].numel()
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}[random]
    assert adapted.lora_parameters()[other].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_kaiming_is_uniform_within_one_over_root_fan_in(kind):
    _, random, fan_in = KINDS[kind]
    values = layer(kind, init="kaiming").lora_parameters()[random].detach()
    bound = 1 / math.sqrt(fan_in)
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.97 * bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)  # of a uniform distribution
    assert abs(values.mean().item()) < 0.1 * bound


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_gaussian_has_standard_deviation_one_over_rank(kind, rank):
    values = layer(kind, init="gaussian", rank=rank).lora_parameters()[KINDS[kind][1]].detach()
    assert values.std().item() == pytest.approx(1 / rank, rel=0.2)
    assert values.abs().max() > 2 / rank  # no uniform distribution reaches there


def test_the_seed_decides():
    torch.manual_seed(1)
    first = layer("linear").lora_A
    torch.manual_seed(1)
    assert torch.equal(layer("linear").lora_A, first)
    assert not torch.equal(layer("linear").lora_A, first)
