"""Linears that read one input: computed together, and alone as soon as something does not fit."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, merge_lora, unload_lora, unmerge_lora
from lightning_lora.fuse import unfuse
from lightning_lora.layers import siblings
from tests.conftest import fill


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 6), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return self.q_proj(x).sum(-1) + (self.k_proj(memory) * self.v_proj(memory)).sum(-1)


def attention(targets=("q_proj", "k_proj", "v_proj"), **options):
    torch.manual_seed(0)
    return fill(apply_lora(Attention(), config=LoRAConfig(rank=2, target_modules=targets, **options)))


def plain(model):
    """The same layers, computed one by one."""
    twin = copy.deepcopy(model)
    unfuse(twin)
    assert all(layer.lora_siblings is None for layer in twin.children() if hasattr(layer, "lora_siblings"))
    return twin


def run(model, *inputs):
    model.zero_grad()
    y = model(*inputs)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in get_lora_parameters(model))]


@pytest.fixture
def calls(monkeypatch):
    """How many layers each product was for."""
    seen, compute = [], siblings.compute
    monkeypatch.setattr(siblings, "compute", lambda layers, x: seen.append(len(layers)) or compute(layers, x))
    return seen


def waiting(model):
    return model.q_proj.lora_siblings.waiting


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")])
def test_one_product_and_the_same_numbers(targets, calls):
    model, x = attention(targets), torch.randn(3, 8)
    expected = run(plain(model), x)
    calls.clear()
    assert_close(run(model, x), expected)
    assert calls == [len(targets)]
    assert waiting(model) == {} and model.q_proj.lora_siblings.input is None  # nothing is kept
    assert_close(run(model, x), expected)


def test_other_layers_of_the_parent_stay_as_they_are(calls):
    attention(("q_proj",))(torch.randn(3, 8))
    assert calls == []  # one alone is no group


def test_different_inputs_end_it(calls):
    model, x, memory = attention(), torch.randn(3, 8), torch.randn(3, 8)
    expected = run(plain(model), x, memory)
    calls.clear()
    assert_close(run(model, x, memory), expected)
    assert model.q_proj.lora_siblings is model.v_proj.lora_siblings is None
    assert calls == [3]
    assert_close(run(model, x, memory), expected)


def test_an_input_changed_in_between_is_another():
    model, x = attention(), torch.randn(3, 8)
    with torch.no_grad():
        model.q_proj(x)
        x.add_(1)
        assert_close(model.k_proj(x), plain(model).k_proj(x))


def test_a_sibling_that_is_not_called_leaves_nothing_wrong():
    model = attention()
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(3, 8)
            assert_close(model.q_proj(x), plain(model).q_proj(x))
        assert len(waiting(model)) == 2
        assert_close(model.v_proj(x), plain(model).v_proj(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = attention(dropout=0.5).train()
    x = torch.randn(3, 8, requires_grad=True)

    def gradients(forward):
        torch.manual_seed(1)
        return torch.autograd.grad(forward().sum(), [*get_lora_parameters(model)])

    def checkpointed():
        model.zero_grad()
        torch.manual_seed(1)
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        return [p.grad for p in get_lora_parameters(model)]

    assert_close(list(gradients(lambda: model(x))), checkpointed())


def test_recomputation_that_stops_early():
    """Non-reentrant checkpointing stops as soon as it has what it saved: here inside the first sibling."""
    model, x = attention(), torch.randn(3, 8, requires_grad=True)
    for _ in range(3):
        y = checkpoint(lambda x: (model.q_proj(x), model.k_proj(x), model.v_proj(x)), x, use_reentrant=False)
        sum(part.sum() for part in y).backward()
    twin = plain(model)
    assert_close(run(model, x.detach()), run(twin, x.detach()))
    assert model.q_proj.lora_siblings is not None


def test_merged_layers_are_plain_and_come_back():
    model, x = attention(), torch.randn(3, 8)
    expected = run(model, x)
    merge_lora(model)
    assert_close(model(x).detach(), expected[0])
    unmerge_lora(model)
    assert_close(run(model, x), expected)
    merge_lora(model)
    unload_lora(model)
    assert type(model.q_proj) is nn.Linear and not hasattr(model.q_proj, "lora_siblings")
    assert_close(model(x).detach(), expected[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_have_their_own_group(copied):
    model, x = attention(), torch.randn(3, 8)
    model.q_proj(x)  # outputs wait
    twin = copied(model)
    assert twin.q_proj.lora_siblings is twin.k_proj.lora_siblings is not model.q_proj.lora_siblings
    assert all(a is b for a, b in zip(twin.q_proj.lora_siblings.layers, twin.children(), strict=True))
    assert_close(run(twin, x), run(plain(model), x))


def test_a_replica_is_computed_alone():
    model, x = attention(), torch.randn(3, 8)
    replica = model.q_proj._replicate_for_data_parallel()
    replica._parameters = dict(model.q_proj._parameters)
    assert_close(replica(x), plain(model).q_proj(x))
    assert waiting(model) == {}


def test_dropout_that_differs_is_no_group(calls):
    model, x = attention(dropout=0.5).train(), torch.randn(3, 8)
    model.k_proj.lora_dropout.p = 0.0
    model(x)
    assert calls == []


def test_variants_and_frozen_weights_that_train_stay_out(calls):
    attention(variant="dora")(torch.randn(3, 8))
    model = attention()
    model.k_proj.weight.requires_grad_()
    model(torch.randn(3, 8)).sum().backward()
    assert model.k_proj.weight.grad is not None
    assert calls == []
