"""``nn.MultiheadAttention``: against torch's own module over weights that have the update, in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, disabled_lora, merge_lora, unload_lora, unmerge_lora
from lightning_lora.model.targeting import find_targets
from tests.conftest import base_bits, fill, same_bits

SIZE = 8


def attention(**options):
    torch.manual_seed(0)
    options = {"batch_first": True, **options}
    return nn.ModuleDict({"mha": nn.MultiheadAttention(SIZE, 2, **options)}).double()


def adapted(model, **fields):
    return fill(apply_lora(copy.deepcopy(model), LoRAConfig(rank=2, target_modules=["mha"], **fields)))


def inputs(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, length, SIZE, generator=generator, dtype=torch.float64) for length in lengths]


def weights(model):
    """The two weights with their updates, by hand."""
    mha, s = model.mha, model.mha.scaling
    packed = mha.in_proj_weight + s * mha.lora_B_in_proj_weight @ mha.lora_A_in_proj_weight
    return {"mha.in_proj_weight": packed, "mha.out_proj.weight": mha.out_proj.weight + s * mha.out_proj.lora_B @ mha.out_proj.lora_A}


def call(model, *x, **options):
    return model.mha(*x, **options)


def defined(plain, model, x, **options):
    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = plain.mha

        def forward(self, *x):
            return self.mha(*x, **options)

    return torch.func.functional_call(Call(), weights(model), tuple(x))


MASK = torch.tensor([[False, False, True]] * 3)
CAUSAL = torch.ones(3, 3, dtype=torch.bool).triu(1)
CALLS = {
    "self": ({}, "same", {}),
    "self, sequence first": ({"batch_first": False}, "same", {"need_weights": False}),
    "no bias": ({"bias": False}, "same", {"average_attn_weights": False}),
    "cross": ({}, "cross", {"key_padding_mask": MASK}),
    "three inputs": ({"add_bias_kv": True, "add_zero_attn": True}, "three", {}),
    "causal": ({}, "same", {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "not batched": ({}, "one", {}),
}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_outputs_weights_and_gradients(case, grad):
    made, which, options = CALLS[case]
    plain = attention(**made).eval()
    model = adapted(plain).eval()
    x, z, w = inputs(3, 3, 3)
    given = {"same": (x, x, x), "cross": (x, z, z), "three": (x, z, w), "one": (x[0],) * 3}[which]
    with torch.set_grad_enabled(grad):  # without gradients torch's module has a fast path, which reads the weights itself
        mine, expected = call(model, *given, **options), defined(plain, model, given, **options)
    for a, b in zip(mine, expected, strict=True):
        assert (a is None and b is None) or torch.testing.assert_close(a, b) is None
    assert (mine[0] - call(plain, *given, **options)[0]).abs().max() > 0.1
    if grad:
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert len(parameters) == 4
        for a, b in zip(*(torch.autograd.grad(y[0].square().sum(), parameters) for y in (mine, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_dropout_of_each_projection():
    """The input's mask is drawn once; the base has none. So with all weights of the base zero only dropped inputs are seen."""
    model = adapted(attention(bias=False), dropout=0.5).train()
    layer = model.mha.by_weight()["in_proj_weight"]
    ones = torch.ones(1, 1, SIZE, dtype=torch.float64)
    torch.manual_seed(0)
    drawn = {tuple((layer(ones) - ones @ model.mha.in_proj_weight.t()).flatten().tolist()) for _ in range(50)}
    A, B, s = model.mha.lora_A_in_proj_weight, model.mha.lora_B_in_proj_weight, model.mha.scaling
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 2.0], dtype=torch.float64)] * SIZE)
    possible = s * masks @ A.t() @ B.t()
    for each in drawn:
        assert (possible - torch.tensor(each, dtype=torch.float64)).abs().amax(1).min() < 1e-12
    assert len(drawn) > 10


@pytest.mark.parametrize("variant", ["plain", "dora", "lora_fa"])
def test_variants_merge_and_come_back(variant):
    plain = attention().float().eval()
    (x,) = inputs(3)
    x = x.float()
    fresh = apply_lora(copy.deepcopy(plain), LoRAConfig(rank=2, target_modules=["mha"], variant=variant)).eval()
    torch.testing.assert_close(call(fresh, x, x, x)[0], call(plain, x, x, x)[0])
    model = fill(fresh)
    before, bits = call(model, x, x, x)[0], base_bits(plain)
    with disabled_lora(model):
        assert same_bits(call(model, x, x, x)[0], call(plain, x, x, x)[0])
    merge_lora(model)
    torch.testing.assert_close(call(model, x, x, x)[0], before, atol=1e-5, rtol=1e-5)
    unmerge_lora(model)
    assert same_bits(call(model, x, x, x)[0], before)
    unload_lora(model)
    assert type(model.mha) is nn.MultiheadAttention and base_bits(model) == bits


def test_copies_and_pickles():
    model = adapted(attention()).eval()
    (x,) = inputs(3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(call(other, x, x, x)[0], call(model, x, x, x)[0])


def test_compiled():
    model = adapted(attention()).eval()
    (x,) = inputs(3)
    compiled = torch.compile(model.mha, backend="eager")
    torch.testing.assert_close(compiled(x, x, x)[0], call(model, x, x, x)[0])


def test_keys_of_another_size_are_refused_and_passed_over():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, kdim=4), "fc": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"'mha' .*it has no in_proj_weight, but .* weights \(embed_dim=8, kdim=4, vdim=8\). Exclude it"):
        apply_lora(model, LoRAConfig(rank=2, target_modules=["mha"]))
    with pytest.warns(UserWarning, match="leaves out"):
        report = find_targets(model, LoRAConfig(rank=2, target_modules="all-linear"))
    assert [target.fqn for target in report.targets] == ["fc"]
    assert "passed over: mha (1): it has no in_proj_weight" in str(report)
    assert "passed over: mha.out_proj (1): MultiheadAttention.forward reads its weight" in str(report)


def test_the_output_projection_goes_with_its_module():
    model = attention()
    report = find_targets(model, LoRAConfig(rank=2, alpha=6, target_modules=["mha"], rank_pattern={"mha": 3}))
    assert [(target.fqn, target.rank) for target in report.targets] == [("mha", 3), ("mha.out_proj", 3)]
    report = find_targets(model, LoRAConfig(rank=2, target_modules=["mha"], exclude_modules=["out_proj"]))
    assert [target.fqn for target in report.targets] == ["mha"]
    with pytest.raises(ValueError, match=r"'mha.out_proj' .* reads its weight without calling it.* Target 'mha', which adapts it too"):
        find_targets(model, LoRAConfig(rank=2, target_modules=["out_proj"]))


def test_variants_that_need_more_than_one_pair_are_refused():
    own = "writes each layer as plain LoRA of its own"
    for variant, reason in (("adalora", own), ("lora_xs", own), ("vera", "shares its A and B among linear layers only")):
        with pytest.raises(ValueError, match=f"'mha' .*variant='{variant}' {reason}"):
            apply_lora(attention(), LoRAConfig(rank=2, target_modules=["mha"], variant=variant))


class Scaled(nn.MultiheadAttention):
    """The adapter's forward would leave out the scale."""

    def forward(self, x):
        return 2 * super().forward(x, x, x, need_weights=False)[0]


def test_a_forward_of_its_own_is_refused_and_passed_over():
    model = nn.ModuleDict({"mha": Scaled(8, 2), "fc": nn.Linear(8, 24)})
    with pytest.raises(
        ValueError, match=r"'mha' \(.*Scaled\): it has a forward of its own, in whose place the adapter's would run. Exclude"
    ):
        apply_lora(model, LoRAConfig(rank=2, target_modules=["mha"]))
    with pytest.warns(UserWarning, match="leaves out"):
        report = find_targets(model, LoRAConfig(rank=2, target_modules="all-linear"))
    assert [target.fqn for target in report.targets] == ["fc"]
