"""Linears that read one input: computed together, and alone as soon as something does not fit."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, merge_lora, quantize_base, unload_lora, unmerge_lora
from lightning_lora.layers import shared_input
from lightning_lora.model.fuse import unfuse
from tests.conftest import fill, sums_agree


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 6), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        return self.q_proj(x).sum(-1) + (self.k_proj(x) * self.v_proj(x)).sum(-1)


class Cross(Attention):
    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        return self.q_proj(x).sum(-1) + (self.k_proj(memory) * self.v_proj(memory)).sum(-1)


def attention(targets=("q_proj", "k_proj", "v_proj"), cls=Attention, quantize=None, **options):
    torch.manual_seed(0)
    base = cls().double() if quantize is None else quantize_base(cls(), quantize)  # packed ones compute in fp32
    return fill(apply_lora(base, config=LoRAConfig(rank=2, target_modules=targets, **options)))


def plain(model):
    """The same layers, computed one by one."""
    twin = copy.deepcopy(model)
    unfuse(twin)
    assert not any(getattr(layer, "shared_input", None) for layer in twin.children())
    return twin


def run(model, *inputs):
    model.zero_grad()
    y = model(*inputs)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in get_lora_parameters(model))]


@pytest.fixture(autouse=True)
def any_size_shares(monkeypatch):
    """The inputs here are small."""
    monkeypatch.setattr(shared_input, "FEW_ENTRIES", 0)


def test_small_inputs_share_only_where_that_is_faster(monkeypatch, calls):
    monkeypatch.setattr(shared_input, "FEW_ENTRIES", 9 * 8)
    model, masked = attention(), attention(dropout=0.5).train()
    run(model, torch.ones(8, 8).double())
    assert calls == []
    run(masked, torch.ones(8, 8).double())
    run(model, torch.ones(9, 8).double())
    assert calls == [3, 3]


@pytest.fixture
def calls(monkeypatch):
    """How many layers each product was for."""
    seen, compute = [], shared_input.compute
    monkeypatch.setattr(shared_input, "compute", lambda layers, *rest: seen.append(len(layers)) or compute(layers, *rest))
    return seen


def entries(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, **options)


def waiting(model):
    held = model.q_proj.shared_input.held
    return {} if held is None else held[2]


@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"])
def test_layers_whose_hooks_change_the_input_are_computed_once_each(hook, calls):
    model, x = attention(), entries(3, 8, requires_grad=True)
    for layer in model.children():
        getattr(layer, hook)(lambda module, inputs, *_: (inputs[0] * 2,) if hook == "register_forward_pre_hook" else None)
    expected = run(plain(model), x)
    calls.clear()
    assert_close(run(model, x), expected)
    assert calls == []  # of several: each by itself


@pytest.mark.parametrize("variant", ["plain", "dora"])  # DoRA does its own to each output
@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")])
def test_one_product_and_the_same_numbers(targets, variant, calls):
    model, x = attention(targets, variant=variant), entries(3, 8)
    expected = run(plain(model), x)
    calls.clear()
    assert_close(run(model, x), expected)
    assert calls == [len(targets)]
    assert model.q_proj.shared_input.held is None  # nothing is kept
    assert_close(run(model, x), expected)


def test_other_layers_of_the_parent_stay_as_they_are(calls):
    attention(("q_proj",))(entries(3, 8))
    assert calls == []  # one alone is no group


def test_cross_attention_shares_what_it_calls_on_one_variable(calls):
    model, x, memory = attention(cls=Cross), entries(3, 8), entries(3, 8)
    expected = run(plain(model), x, memory)
    calls.clear()
    assert_close(run(model, x, memory), expected)
    assert calls == [2]  # k with v


def test_a_hook_that_replaces_an_input():
    model, x = attention(), entries(3, 8)
    model.k_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    expected = run(plain(model), x)
    for _ in range(2):
        assert_close(run(model, x), expected)


class Odd(Attention):
    """Calls that the rules for reading the source let pass, and that do something to the input on the way."""

    def forward(self, x):
        q = self.q_proj(x)
        x.add_(1)
        k = self.k_proj(x)
        torch.set_grad_enabled(False)
        v = self.v_proj(x)
        torch.set_grad_enabled(True)
        return q.sum(-1) + (k * v).sum(-1)


def test_an_input_changed_in_between_is_another(calls):
    model, x = attention(cls=Odd), entries(3, 8)
    expected = plain(model)(x.clone())
    calls.clear()
    assert_close(model(x.clone()), expected)
    assert calls == [3, 3, 3]


def test_called_by_itself_a_layer_is_computed_by_itself(calls):
    model, x = attention(), entries(3, 8)
    for name in ("q_proj", "k_proj", "q_proj"):
        model.get_submodule(name)(x).sum().backward()
    assert calls == []  # what a layer computes alone is not counted


def test_nothing_waits_after_an_error():
    class Fails(Attention):
        def forward(self, x):
            q = self.q_proj(x)
            if x.sum() > 0:
                raise RuntimeError("in between")
            return q + self.k_proj(x).sum() + self.v_proj(x).sum()

    model = attention(cls=Fails)
    with pytest.raises(RuntimeError, match="in between"):
        model(torch.ones(3, 8, dtype=torch.float64))
    assert waiting(model) == {} and not model.q_proj.shared_input.open


def test_4_bit_layers_share_too(calls):
    model, x = attention(quantize="nf4"), torch.randn(3, 8)
    expected = run(plain(model), x)
    calls.clear()
    sums_agree(run(model, x), expected, terms=8 * 4 * 3 * 4)  # inputs, outputs, rows, and the outputs again on the way back
    assert calls == [3]
    attention(quantize="int8")(x)
    assert calls == [3]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_gradient_checkpointing(reentrant, quantize):
    """A checkpointed forward may run without gradients first; it has to take the same path, with the same dropout, both times."""
    model = attention(dropout=0.5, quantize=quantize).train()
    x = torch.randn(3, 8, dtype=model.q_proj.lora_A.dtype, requires_grad=True)

    def gradients(forward):
        torch.manual_seed(1)
        return torch.autograd.grad(forward().square().sum(), [*get_lora_parameters(model)])

    def checkpointed():
        model.zero_grad()
        torch.manual_seed(1)
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        return [p.grad for p in get_lora_parameters(model)]

    assert_close(list(gradients(lambda: model(x))), checkpointed())


def test_merged_layers_are_plain_and_come_back():
    model, x = attention(), entries(3, 8)
    expected = run(model, x)
    merge_lora(model)
    assert_close(model(x).detach(), expected[0])
    unmerge_lora(model)
    assert_close(run(model, x), expected)
    merge_lora(model)
    unload_lora(model, merged="keep")
    assert type(model.q_proj) is nn.Linear and not hasattr(model.q_proj, "shared_input")
    assert_close(model(x).detach(), expected[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_have_their_own_group(copied):
    model, x = attention(), entries(3, 8)
    model.q_proj(x)  # outputs wait
    twin = copied(model)
    assert twin.q_proj.shared_input is twin.k_proj.shared_input is not model.q_proj.shared_input
    assert all(a is b for a, b in zip(twin.q_proj.shared_input.layers, twin.children(), strict=True))
    assert_close(run(twin, x), run(plain(model), x))


def test_a_replica_is_computed_alone():
    model, x = attention(), entries(3, 8)
    replica = model.q_proj._replicate_for_data_parallel()
    replica._parameters = dict(model.q_proj._parameters)
    assert_close(replica(x), plain(model).q_proj(x))
    assert waiting(model) == {}


def test_dropout_that_differs_is_no_group(calls):
    model, x = attention(dropout=0.5).train(), entries(3, 8)
    model.k_proj.lora_dropout.p = 0.0
    model(x)
    assert calls == []


def test_doras_dropout_and_frozen_weights_that_train_stay_out(calls):
    attention(variant="dora", dropout=0.5).train()(entries(3, 8))
    model = attention()
    model.k_proj.weight.requires_grad_()
    model(entries(3, 8)).sum().backward()
    assert model.k_proj.weight.grad is not None
    assert calls == []


def test_unloading_one_leaves_the_others_alone():
    model, x = attention(), entries(3, 8)
    unload_lora(model.q_proj)
    assert_close(model.k_proj(x), plain(model).k_proj(x))
    assert model.k_proj.shared_input is None
