"""LoRALinear by itself: constructible, made from a linear that it never touches, its base in view; subclasses."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, LoRALinear, apply_lora, get_lora_parameters, merge_lora, unload_lora, unmerge_lora
from lightning_lora.layers.base import LoRALayer
from tests.conftest import as_bits, fill, same_bits
from tests.layers.kinds import CASES, OwnForward


def test_constructible_with_linears_arguments():
    layer = LoRALinear(12, 10, rank=3, alpha=6.0, dropout=0.1, bias=False, dtype=torch.bfloat16)
    assert layer.lora_A.shape == (3, 12)
    assert layer.lora_B.shape == (10, 3)
    assert (layer.scaling, layer.lora_dropout.p, layer.bias, layer.merged) == (2.0, 0.1, None, False)
    assert (layer.weight.dtype, layer.lora_A.dtype) == (torch.bfloat16, torch.float32)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert isinstance(layer, nn.Linear)
    assert layer.lora_A.count_nonzero()
    assert not layer.lora_B.count_nonzero()


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"rank": 0}, "rank=0"), ({"alpha": -1.0}, "alpha=-1.0"), ({"dropout": 1.0}, "dropout=1.0")]
)
def test_numbers_out_of_range(kwargs, message):
    linear = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=message):
        LoRALinear(4, 3, **kwargs)
    with pytest.raises(ValueError, match=message):
        LoRALinear.from_linear(linear, **kwargs)
    assert type(linear) is nn.Linear
    assert linear.weight.requires_grad


@pytest.mark.parametrize(("cls", "bias"), [(nn.Linear, True), (nn.Linear, False), (OwnForward, True)])
def test_from_linear_never_changes_its_argument(cls, bias):
    linear = cls(12, 10, bias=bias)
    linear.register_forward_hook(lambda *args: None)
    attributes = {name: value.copy() if isinstance(value, dict) else value for name, value in linear.__dict__.items()}
    parameters = {name: (id(p), as_bits(p)) for name, p in linear.named_parameters()}
    x = torch.randn(5, 12)
    y = linear(x)

    layer = LoRALinear.from_linear(linear, rank=4, alpha=8.0, dropout=0.1).eval()
    assert type(layer).__name__ == f"LoRA{cls.__name__}"
    assert layer.weight.data_ptr() == linear.weight.data_ptr()  # no copy
    assert not any(p.requires_grad for p in layer.base_parameters().values())
    fill(layer)
    unmerged = layer(x)
    layer(x).sum().backward()
    layer.register_forward_hook(lambda *args: None)
    merge_lora(layer)
    torch.testing.assert_close(layer(x), unmerged)
    assert not same_bits(layer(x), y)
    assert layer.weight.data_ptr() != linear.weight.data_ptr()  # the first merge copies

    assert type(linear) is cls
    assert same_bits(linear(x), y)
    for name, p in linear.named_parameters():
        assert id(p) == parameters[name][0]
        assert torch.equal(as_bits(p), parameters[name][1])
    assert all(p.requires_grad and p.grad is None for p in linear.parameters())
    if cls is nn.Linear:
        assert linear.__dict__.keys() == attributes.keys()
        assert all(linear.__dict__[name] == value for name, value in attributes.items() if not name.startswith("_"))
        assert len(linear._forward_hooks) == 1

    unmerge_lora(layer)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert same_bits(layer(x), unmerged)
    merge_lora(layer)
    unload_lora(layer, merged="keep")
    assert type(layer) is cls
    torch.testing.assert_close(layer(x), unmerged)
    assert same_bits(linear(x), y)


def test_from_linear_merged_for_good_leaves_its_argument_too():
    linear = nn.Linear(4, 3)
    before = linear.weight.detach().clone()
    layer = fill(LoRALinear.from_linear(linear))
    layer.merge_weights(reversible=False)
    assert same_bits(linear.weight, before)
    with pytest.raises(ValueError, match="no undo record was kept"):
        layer.unmerge_weights()


def test_from_linear_refuses_what_it_cannot_adapt():
    with pytest.raises(ValueError, match="computes its weight anew at each call"):
        LoRALinear.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"linear is a LoRALinear and has an adapter already; give linear\.linear"):
        LoRALinear.from_linear(LoRALinear(4, 3))


def test_from_linear_on_the_base_of_another():
    first = fill(LoRALinear.from_linear(nn.Linear(4, 3)))
    second = LoRALinear.from_linear(first.linear, rank=2)
    x = torch.randn(2, 4)
    assert same_bits(second(x), first.linear(x))


def test_a_copied_from_linear_layer_keeps_the_way_back():
    layer = fill(LoRALinear.from_linear(nn.Linear(4, 3)))
    base = layer.weight.detach().clone()
    layer.merge_weights()
    twin = copy.deepcopy(layer)
    twin.unmerge_weights()
    assert same_bits(twin.weight, base)
    assert layer.merged


@pytest.mark.parametrize("kind", ["linear", "linear-subclass"])
def test_linear_is_a_view_of_the_base(kind):
    case = CASES[kind]
    layer, x = case.layer(dropout=0.1), case.x()
    view = layer.linear
    assert type(view) is type(case.base())
    assert not isinstance(view, LoRALayer)
    assert list(view.state_dict()) == ["weight", "bias"]
    assert view.weight is layer.weight
    assert same_bits(view(x), case.base()(x))
    assert len(list(get_lora_parameters(layer))) == 2  # taking the view took nothing from the layer
    assert layer.lora_dropout.p == 0.1
    assert not hasattr(view, "lora_dropout")


@pytest.mark.parametrize(("kind", "expected"), [("linear", True), ("linear-subclass", False)])
def test_only_nn_linears_own_output_is_written_to(kind, expected):
    assert CASES[kind].layer().plain_forward is expected


def test_a_subclass_that_returns_a_tensor_it_keeps_is_not_spoilt():
    class Caching(nn.Linear):
        def forward(self, input):
            self.last = super().forward(input)
            return self.last

    model = nn.Sequential(Caching(4, 3))
    layer = fill(LoRALinear.from_linear(model[0]))
    x = torch.randn(2, 4)
    y = layer(x)
    assert not torch.equal(y, layer.last)
    assert same_bits(layer.last, model[0](x))


def test_saved_activations_are_the_bases_and_the_small_one_only():
    """What the backward pass keeps: x once (shared), the rank-r product, A and B; nothing of the size of the output."""
    layer, x = CASES["linear-no-bias"].layer(), torch.randn(64, 12, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    big = [t for t in saved if t.shape[:1] == (64,) and t.shape[1] != layer.rank]
    assert {t.data_ptr() for t in big} == {x.data_ptr()}


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12)])
def test_empty_batches(shape):
    layer = CASES["linear"].layer()
    y = layer(torch.randn(shape))
    assert y.shape == (*shape[:-1], 10)
    y.sum().backward()
    assert not layer.lora_A.grad.count_nonzero()


@pytest.mark.parametrize("variant", ["plain", "dora", "adalora"])
def test_a_vectorized_jacobian(variant):
    """As torch.autograd.functional.jacobian(vectorize=True) takes it."""
    layer, x = CASES["linear"].layer(torch.float64, variant=variant), torch.randn(2, 12, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(layer, x, vectorize=True), jacobian(layer, x))


class Sum(nn.Module):
    """Two linears that share their input, whose outputs are written into."""

    def __init__(self, cls):
        super().__init__()
        self.q_proj, self.v_proj = cls(8, 8), cls(8, 8)

    def forward(self, x):
        q, v = self.q_proj(x), self.v_proj(x)
        q *= 0.5
        return q + v.relu_()


class Falcon(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T + self.bias


@pytest.mark.parametrize("cls", [nn.Linear, Falcon])
def test_outputs_may_be_written_into_in_place(cls):
    torch.manual_seed(0)
    model = apply_lora(Sum(cls).double(), LoRAConfig(rank=2))
    for layer in (model.q_proj, model.v_proj):
        nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    parameters = list(get_lora_parameters(model))
    y = model(x)
    gradients = torch.autograd.grad(y.square().sum(), parameters)
    parts = [layer.linear(x) + layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T) for layer in (model.q_proj, model.v_proj)]
    expected = 0.5 * parts[0] + parts[1].relu()
    assert torch.allclose(y, expected)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    assert all(torch.allclose(a, b) for a, b in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize(
    "make",
    [lambda x: x.to_sparse(), lambda x: torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)],
    ids=["sparse", "jagged"],
)
@pytest.mark.parametrize("cls", [nn.Linear, Falcon])
def test_sparse_and_jagged_inputs_give_what_dense_ones_give(cls, make):
    torch.manual_seed(0)
    layer = CASES["linear"].layer(torch.float64) if cls is nn.Linear else LoRALinear.from_linear(Falcon(8, 6, dtype=torch.float64), rank=2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    odd = make(x)
    y = layer(odd)
    y = y.values() if y.is_nested else y
    assert torch.allclose(y, layer(x))
    gradients = [torch.autograd.grad(out.square().sum(), list(layer.lora_parameters().values())) for out in (y, layer(x))]
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
