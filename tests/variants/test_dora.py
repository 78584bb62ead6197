"""DoRA beyond what `make family` checks of every pair: its norms, dropout, starts, what merging costs (training: test_dora_training.py)."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, load_adapter, merge_lora, save_adapter
from lightning_lora.layers.adapting import adapt, refusal
from lightning_lora.layers.spec import LayerSpec
from tests.conftest import TinyModel, same_bits, snapshot
from tests.layers.kinds import CASES

every_kind = pytest.mark.parametrize("kind", CASES)


def dora(case, dtype=torch.float32, **fields):
    """A layer as it might be after some training: both factors filled, magnitudes near the norms."""
    layer = case.layer(dtype, filled=False, variant="dora", **fields)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in layer.lora_parameters().items():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p * (1 + 0.1 * noise) if name == "lora_magnitude_vector" else 0.2 * noise)
    return layer


# The norm.


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_norm_without_the_dense_product(kind, dtype):
    case = CASES[kind]
    layer = dora(case, dtype)
    V = layer.weight.double() + layer.scaling * case.product(layer, layer.lora_A.double(), layer.lora_B.double())
    expected = V.square().sum([d for d in range(V.ndim) if d != case.out_axis]).sqrt()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(layer.norm().double(), expected, rtol=tolerance, atol=0)
    assert not layer.norm().requires_grad


def test_the_norm_needs_no_dense_product(monkeypatch):
    layer = adapt(nn.Linear(512, 512), LayerSpec(LoRAConfig(variant="dora"), 4, 8.0))
    largest, real = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: largest.append((out := real(a, b)).numel()) or out)
    layer.norm()
    assert max(largest) == 4 * 512


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "through data": lambda layer: layer.weight.data.mul_(2),
    "a row through data": lambda layer: [layer.weight.data[i].mul_(2) for i in range(len(layer.weight))],
    "through numpy": lambda layer: layer.weight.numpy().__imul__(2),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight * 2),
    "another": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2, requires_grad=False)),
    "loaded": lambda layer: layer.load_state_dict({**layer.state_dict(), "weight": layer.weight * 2}),
    "dtype": lambda layer: (layer.weight.mul_(2), layer.to(torch.bfloat16)),
    "merged and back": lambda layer: (layer.merge_weights(), layer.unmerge_weights(), layer.weight.mul_(2)),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_the_norm_is_that_of_the_weight_now(change):
    layer = dora(CASES["linear"])
    layer.norm()
    CHANGES[change](layer)
    fresh = dora(CASES["linear"])
    fresh.weight.mul_(2)
    torch.testing.assert_close(layer.norm(), fresh.norm(), rtol=3e-3 if change == "dtype" else 1e-6, atol=0)


def test_a_row_of_zeros_stays_finite():
    base = nn.Linear(4, 3)
    with torch.no_grad():
        base.weight[1] = 0
    x = torch.randn(5, 4)
    expected = base(x)
    layer = adapt(base, LayerSpec(LoRAConfig(variant="dora"), 2, 4.0))
    assert same_bits(layer(x), expected)
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.lora_parameters().values())
    layer.merge_weights()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge_weights()
    assert layer.weight[1].count_nonzero() == 0


# Forward and backward.


@pytest.mark.parametrize("kind", ["linear", "hf-conv1d", "conv1d", "linear-subclass"])
def test_dropout_acts_on_all_that_was_adapted_as_in_peft(kind):
    """The same mask on both sides, drawn from one seed; the base's own product never sees it."""
    case = CASES[kind]
    peft = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.5, target_modules=["0"], use_dora=True, fan_in_fan_out=kind == "hf-conv1d")
    other = get_peft_model(nn.Sequential(case.base()), peft).train()
    layer = dora(case, dropout=0.5).train()
    with torch.no_grad():
        for name, p in other.named_parameters():
            part = next((part for part in layer.lora_parameters() if part in name), None)
            if part is not None:
                p.copy_(layer.to_peft()[part if part == "lora_magnitude_vector" else part + ".weight"])
    x = case.x()
    torch.manual_seed(3)
    expected = other(x)
    torch.manual_seed(3)
    mine = layer(x)
    torch.testing.assert_close(mine, expected, rtol=0, atol=5e-6)
    assert (mine - layer.eval()(x)).abs().max() > 0.1


def test_dropouts_gradients_are_the_definitions():
    layer = dora(CASES["linear"], torch.float64, dropout=0.5).train()
    x = CASES["linear"].x(torch.float64).requires_grad_()
    wanted = [x, *layer.lora_parameters().values()]
    torch.manual_seed(3)
    got = torch.autograd.grad(layer(x).square().sum(), wanted)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    W, A, B, m, s = layer.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.scaling
    out_scale = m / (W + s * B @ A).norm(dim=1).detach()
    y = F.linear(x, W, layer.bias) + (out_scale - 1) * (dropped @ W.T) + out_scale * s * (dropped @ A.T @ B.T)
    torch.testing.assert_close(got, torch.autograd.grad(y.square().sum(), wanted), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16 base", "autocast"])
def test_half_precision_is_near_float32(mixed):
    case = CASES["linear"]
    layer, reference = dora(case, torch.float32 if mixed else torch.bfloat16), dora(case)
    x = case.x()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        y = layer(x if mixed else x.bfloat16())
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    reference(x).square().sum().backward()
    for name, p in layer.lora_parameters().items():
        assert p.grad.dtype == torch.float32
        expected = reference.lora_parameters()[name].grad
        assert (p.grad - expected).norm() < 0.03 * expected.norm(), name


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_compiled_without_a_break(kind):
    torch._dynamo.reset()
    case, layer = CASES[kind], dora(CASES[kind], dropout=0.0)
    compiled = torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=True)
    results = []
    for run in (layer, compiled):
        y = run(case.x())
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.lora_parameters().values()))))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# Starts, copies, dtypes.


def test_magnitudes_are_fp32_and_start_at_the_norms():
    layer = adapt(nn.Linear(8, 6).bfloat16(), LayerSpec(LoRAConfig(variant="dora"), 2, 4.0))
    assert layer.lora_magnitude_vector.dtype == torch.float32
    torch.testing.assert_close(layer.lora_magnitude_vector, layer.weight.float().norm(dim=1))
    layer.to(torch.float16)
    assert layer.lora_magnitude_vector.dtype == torch.float32
    assert type(layer).__name__ == "DoRALinear"


def test_on_the_meta_device_and_materialised():
    with torch.device("meta"):
        layer = adapt(nn.Linear(8, 6), LayerSpec(LoRAConfig(variant="dora"), 2, 4.0))
    layer.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(layer.lora_magnitude_vector, layer.weight.norm(dim=1))
    real = nn.Linear(8, 6)
    layer.load_state_dict(real.state_dict(), strict=False)  # base weights that come later
    x = torch.randn(3, 8)
    assert same_bits(layer(x), real(x))


def test_base_weights_that_come_later_leave_a_trained_adapter_alone():
    layer = dora(CASES["linear"])
    before = layer.lora_magnitude_vector.detach().clone()
    layer.load_state_dict(CASES["linear"].base().state_dict(), strict=False)
    assert same_bits(layer.lora_magnitude_vector, before)


@pytest.mark.parametrize("merged", [False, True])
def test_copies_and_pickles(merged):
    layer, x = dora(CASES["conv2d"]), CASES["conv2d"].x()
    base = layer.weight.detach().clone()
    layer(x)
    if merged:
        layer.merge_weights()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same_bits(twin(x), layer(x))
        twin.unmerge_weights()
        assert same_bits(twin.weight, base)


def test_taken_off_it_leaves_nothing():
    model = apply_lora(TinyModel(), config=LoRAConfig(variant="dora", target_modules=["q_proj"]))
    plain = set(vars(TinyModel().layers[0].attn.q_proj))
    model(torch.tensor([[1, 2]]))
    from lightning_lora import unload_lora

    unload_lora(model)
    assert set(vars(model.layers[0].attn.q_proj)) == plain and type(model.layers[0].attn.q_proj) is nn.Linear


# Merging.


def test_the_dense_update_is_what_merging_adds():
    layer = dora(CASES["linear"], torch.float64)
    base, delta = layer.weight.detach().clone(), layer.exact_delta()
    layer.merge_weights()
    torch.testing.assert_close(layer.weight - base, delta)
    with pytest.raises(RuntimeError, match="unmerge first"):
        layer.exact_delta()


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.06), (torch.float32, 0.04)], ids=str)
def test_the_way_back_is_cheap(dtype, share):
    """At an update of 1 % of the weight."""
    layer = adapt(nn.Linear(512, 512).to(dtype), LayerSpec(LoRAConfig(variant="dora"), 8, 16.0))
    with torch.no_grad():
        layer.lora_B.normal_(std=2e-4)
        layer.lora_magnitude_vector.mul_(1 + 0.01 * torch.randn(512))
    base = layer.weight.detach().clone()
    layer.merge_weights()
    assert layer.lora_state.merge.undo.nbytes < share * layer.weight.nbytes
    layer.unmerge_weights()
    assert same_bits(layer.weight, base)


def test_an_adapter_that_changed_after_the_merge_is_not_taken_out():
    layer = dora(CASES["linear"])
    layer.merge_weights()
    with torch.no_grad():
        layer.lora_B[0, 0] += 1
    with pytest.raises(ValueError, match="would not come back bit for bit"):
        layer.unmerge_weights()


def test_a_weight_that_others_use_is_replaced():
    model = apply_lora(TinyModel(tied=True), config=LoRAConfig(variant="dora", target_modules=["lm_head"]))
    shared = model.embed.weight
    bits_before = shared.detach().clone()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        model.lm_head.lora_B.normal_()
    before = model(ids)
    merge_lora(model, untie=True)
    torch.testing.assert_close(model(ids), before)
    assert same_bits(model.embed.weight, bits_before)


# Refusals.


def test_a_packed_weight_is_refused_by_name():
    model = TinyModel()
    model.layers[0].attn.q_proj.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layers\.0\.attn\.q_proj' .*stores its weight as torch\.int8"):
        apply_lora(model, config=LoRAConfig(variant="dora", target_modules=["q_proj"]))
    assert snapshot(model) == before


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant='dorra' is not known; there are"):
        apply_lora(TinyModel(), config=LoRAConfig(variant="dorra", target_modules=["q_proj"]))
    assert refusal(nn.Linear(3, 3), LayerSpec(LoRAConfig(variant="dora"), 2, 16.0, "layer")) is None


def test_a_folder_is_for_its_variant_only(tmp_path):
    config = LoRAConfig(rank=2, variant="dora", target_modules=["q_proj"])
    save_adapter(apply_lora(TinyModel(), config=config), tmp_path)
    plain = apply_lora(TinyModel(), config=LoRAConfig(rank=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="does not fit the LoRA this model has"):
        load_adapter(plain, tmp_path, check_base=False)
