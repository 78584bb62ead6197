"""What every kind of layer does alike: the formula, dtypes, pickles, hooks, the class swap.

Merging is in test_mergeable.py, compilers are in test_base_compiled.py.
"""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig
from lightning_lora.layers.adapting import adapt
from lightning_lora.layers.base import lora_layers
from lightning_lora.layers.spec import LayerSpec
from tests.conftest import same_bits
from tests.layers.kinds import CASES, every_dtype, every_kind

# The formula.


@every_kind
@every_dtype
def test_identity_at_the_start(kind, dtype):
    case = CASES[kind]
    x = case.x(dtype)
    assert same_bits(case.layer(dtype, filled=False)(x), case.base(dtype)(x))


@every_kind
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_forward_and_gradients_are_the_definition(kind, scaling):
    case = CASES[kind]
    layer, x = case.layer(torch.float64, alpha=6, scaling=scaling), case.x(torch.float64)
    if layer.__class__.__name__ == "LoRAEmbedding" and layer.padding_idx is not None:
        layer.lora_A.data[:, layer.padding_idx] = 0  # where it starts, and where it stays
    x.requires_grad_(x.is_floating_point())
    wanted = [*layer.lora_parameters().values(), *([x] if x.requires_grad else [])]
    mine, defined = layer(x), case.definition(layer, x)
    torch.testing.assert_close(mine, defined, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(mine)
    got = torch.autograd.grad((mine * weight).sum(), wanted)
    expected = torch.autograd.grad((defined * weight).sum(), wanted)
    if getattr(layer, "padding_idx", None) is not None:
        expected[0][:, layer.padding_idx] = 0
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@every_kind
def test_only_the_adapter_gets_gradients(kind):
    layer = CASES[kind].layer()
    layer(CASES[kind].x()).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    assert all(p.grad.count_nonzero() for p in layer.lora_parameters().values())
    assert not any(p.requires_grad for p in layer.base_parameters().values())


@pytest.mark.parametrize(("scaling", "expected"), [("standard", 6 / 4), ("rslora", 6 / 2)])
def test_rank_alpha_and_scaling(scaling, expected):
    layer = CASES["linear"].layer(alpha=6, scaling=scaling)
    assert (layer.rank, layer.alpha, layer.scaling) == (4, 6.0, expected)


@pytest.mark.parametrize("kind", ["linear", "linear-subclass", "hf-conv1d", "conv2d", "conv2d-groups"])
def test_dropout_acts_on_the_adapters_input_alone_and_only_in_training(kind):
    case = CASES[kind]
    layer, plain, x = case.layer(dropout=0.5), case.layer(), case.x()
    layer.eval()
    assert same_bits(layer(x), plain(x))
    layer.train()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    mean = torch.stack([layer(x) for _ in range(600)]).mean(0)
    torch.testing.assert_close(mean, plain(x), rtol=0, atol=(plain(x) - case.base()(x)).abs().max().item() * 0.35)
    with torch.no_grad():
        layer.lora_B.zero_()
    assert same_bits(layer(x), case.base()(x))  # the base never sees the mask


def test_the_dropout_module_is_the_switch():
    layer = CASES["linear"].layer(dropout=0.5)
    assert isinstance(layer.lora_dropout, nn.Dropout)
    layer.lora_dropout.p = 0.0
    assert same_bits(layer(CASES["linear"].x()), CASES["linear"].layer()(CASES["linear"].x()))


def test_an_adapter_made_in_eval_mode_is_in_eval_mode():
    layer = adapt(nn.Linear(3, 3).eval(), LayerSpec(LoRAConfig(dropout=0.5), 2, 4.0))
    assert layer.dropout_now() == 0.0
    layer.training = True  # as Lightning restores it after validation, without a call of `train()`
    assert layer.dropout_now() == 0.5


# Dtypes and devices.


@every_kind
@every_dtype
def test_adapters_are_at_least_fp32(kind, dtype):
    layer = CASES[kind].layer(dtype)
    assert {p.dtype for p in layer.lora_parameters().values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert layer.weight.dtype == dtype
    assert layer(CASES[kind].x(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("convert", "base", "adapter"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16, torch.float32),
        (lambda m: m.bfloat16(), torch.bfloat16, torch.float32),
        (lambda m: m.half(), torch.float16, torch.float32),
        (lambda m: m.type(torch.float16), torch.float16, torch.float32),
        (lambda m: m.double(), torch.float64, torch.float64),
        (lambda m: m.double().half(), torch.float16, torch.float64),
        (lambda m: m.half().float(), torch.float32, torch.float32),
        (lambda m: nn.Sequential(m).to(torch.bfloat16)[0], torch.bfloat16, torch.float32),
    ],
    ids=["to", "bfloat16", "half", "type", "double", "double-half", "half-float", "parent"],
)
@every_kind
def test_converting_a_model_never_rounds_an_adapter(kind, convert, base, adapter):
    layer = CASES[kind].layer()
    values = {name: p.detach().double() for name, p in layer.lora_parameters().items()}
    parameters = dict(layer.named_parameters())
    layer = convert(layer)
    assert layer.weight.dtype == base
    for name, p in layer.lora_parameters().items():
        assert p is parameters[name]  # an optimizer holds it
        assert p.dtype == adapter
        assert torch.equal(p.double(), values[name])
    assert layer(CASES[kind].x(base)).dtype == base


def test_gradients_keep_the_adapters_dtype_too():
    layer, x = CASES["linear"].layer(), CASES["linear"].x()
    layer(x).sum().backward()
    before = layer.lora_B.grad.clone()
    layer.to(torch.bfloat16)
    assert same_bits(layer.lora_B.grad, before)
    layer(x.bfloat16()).sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32


@every_kind
def test_meta_then_materialised(kind):
    case = CASES[kind]
    if kind == "hf-conv1d" or not hasattr(case.build(), "reset_parameters"):
        layer = case.layer(filled=False).to("meta").to_empty(device="cpu")
    else:
        with torch.device("meta"):
            base = case.build()
        layer = adapt(base, LayerSpec(LoRAConfig(rank=4), 4, 16.0))
        assert layer.lora_A.is_meta
        layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(torch.nan)  # what empty memory may hold
    layer.reset_parameters()
    random, zero = layer.lora_factors()
    assert zero.count_nonzero() == 0
    assert random.isfinite().all()
    assert random.count_nonzero() == random.numel()
    if kind != "hf-conv1d":
        assert layer.weight.isfinite().all()


# Copies and pickles.


@every_kind
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(kind, merged, how):
    case = CASES[kind]
    layer, x = case.layer(dropout=0.1).eval(), case.x()
    base = layer.weight.detach().clone()
    if merged:
        layer.merge_weights()
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert type(twin) is type(layer)
    assert (twin.rank, twin.alpha, twin.lora_config, twin.merged) == (layer.rank, layer.alpha, layer.lora_config, merged)
    assert same_bits(twin(x), layer(x))
    twin.unmerge_weights()
    assert same_bits(twin.weight, base)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert layer.lora_A.count_nonzero()
    assert layer.weight.count_nonzero()
    assert [n for n, p in twin.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


# The layer as a module.


@pytest.mark.parametrize("kind", [k for k in CASES if k != "hf-conv1d"])
def test_repr_tells_the_adapter(kind):
    layer = CASES[kind].layer(alpha=6, dropout=0.25)
    assert "rank=4, alpha=6, dropout=0.25, merged=False" in repr(layer)
    assert CASES[kind].base().extra_repr() in repr(layer)
    layer.merge_weights()
    assert "merged=True" in repr(layer)


def test_extra_arguments_reach_the_base():
    layer, x = CASES["linear-subclass"].layer(), CASES["linear-subclass"].x()
    assert same_bits(layer(x, label="a"), layer(x, label="a")) and layer.label == "a"
    assert same_bits(layer(x, "b"), layer(x, "b")) and layer.label == "b" and layer.calls == 4


def test_nothing_keeps_a_dropped_layer_alive():
    import weakref

    layer = CASES["linear"].layer()
    layer.merge_weights()
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None


def test_lora_layers_lists_a_shared_layer_once():
    model = nn.Module()
    model.a = model.b = CASES["linear"].layer()
    model.c = nn.Linear(2, 2)
    assert [name for name, _ in lora_layers(model)] == ["a"]
