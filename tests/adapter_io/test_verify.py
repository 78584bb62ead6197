"""``verify_lora``: what is right passes and changes nothing. Each kind of wrong model is found, with our refusals switched off."""

import math

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters, merge_lora, quantize_base, verify_lora
from lightning_lora.model.suitability import Suitability
from lightning_lora.model.trial_values import relative
from lightning_lora.model.verify_checks import FILES, GRADIENTS, IDENTITY, LAYERS, MODEL
from tests.lit import make_net
from tests.sweep.archs import build

ALL = LoRAConfig(rank=2, target_modules="all-linear", modules_to_save=[])


def of(checks):
    return {check.name: check for check in checks}


def failed(checks):
    return {check.name for check in checks if not check.ok}


def state(model):
    """All that a check could change."""
    return (
        {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict(keep_vars=True).items()},
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [(type(module), module.training, sorted(vars(module)), len(module._forward_hooks)) for module in model.modules()],
        torch.get_rng_state(),
    )


def assert_same(one, other):
    assert one[0].keys() == other[0].keys() and one[2] == other[2] and torch.equal(one[3], other[3])
    assert all(torch.equal(one[0][name][0], value) and one[0][name][1] == place for name, (value, place) in other[0].items())
    for (flag, grad), (flag_too, grad_too) in zip(one[1], other[1], strict=True):
        assert flag == flag_too and (grad is grad_too is None or torch.equal(grad, grad_too))


RIGHT = {
    "plain": {},
    "dora": {"variant": "dora"},
    "vera": {"variant": "vera"},
    "lora_xs": {"variant": "lora_xs"},
    "dropout": {"dropout": 0.5, "bias": "all"},
    "olora": {"init": "olora"},
    "eva": {"init": "eva"},
    "head": {"modules_to_save": ["fc2"], "target_modules": ["embed", "fc1"]},
}


@pytest.mark.parametrize("options", RIGHT.values(), ids=RIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_is_right_passes_and_the_model_stays(options, dtype):
    """With BatchNorm in training mode, a gradient that is there, and every choice of what trains."""
    model, x = make_net().to(dtype).train(), torch.randn(6, 8, dtype=dtype)
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    before = state(model)
    config = LoRAConfig(**{"rank": 2, "target_modules": ["embed", "fc1", "fc2"], **options})
    checks = of(verify_lora(model, config, batch=x))
    assert [check.status for check in checks.values()] == ["passed"] * 5, checks
    assert_same(before, state(model))
    limit = 3 * math.sqrt(max(torch.finfo(dtype).eps, 1e-13))
    assert checks[MODEL].tolerance == checks[LAYERS].tolerance == pytest.approx(limit)
    assert checks[GRADIENTS].measured == 0 and checks[IDENTITY].measured <= checks[IDENTITY].tolerance < 1


def test_a_model_with_adapters_that_have_trained():
    model, x = apply_lora(make_net(), LoRAConfig(rank=2, target_modules=["fc1", "fc2"])), torch.randn(6, 8)
    for parameter in get_lora_parameters(model):
        nn.init.normal_(parameter)
    before = state(model)
    checks = of(verify_lora(model, batch=x))
    assert [checks[name].status for name in (IDENTITY, MODEL, FILES)] == ["not needed", "passed", "passed"]
    assert_same(before, state(model))
    merge_lora(model)
    with pytest.raises(ValueError, match=r"'fc1' is merged.*unmerge_lora"):
        verify_lora(model, batch=x)


def test_what_is_refused_leaves_the_model():
    model, x, narrow = make_net(), torch.randn(6, 8), torch.randn(6, 7)
    before = state(model)
    with pytest.raises(ValueError, match="no LoRA layers to verify; pass a config"):
        verify_lora(model, batch=x)
    with pytest.raises(ValueError, match="nowhere"):
        verify_lora(model, LoRAConfig(target_modules=["nowhere"]), batch=x)
    with pytest.raises(ValueError, match="no tensor of floating-point numbers"):
        verify_lora(model, ALL, batch=lambda model: None)
    with pytest.raises(ValueError, match=r"batch='rows'"):
        verify_lora(model, ALL, batch="rows")
    with pytest.raises(ValueError, match=r"loss: it returned a tensor of shape \(6, 4\)"):
        verify_lora(model, ALL, batch=x, loss=lambda model: model(x))
    with pytest.raises(ValueError, match="loss: it returned float"):
        verify_lora(model, ALL, batch=x, loss=lambda model: 1.0)
    with pytest.raises(RuntimeError, match="shapes"):
        verify_lora(model, ALL, batch=narrow)
    assert_same(before, state(model))


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "bert"])
def test_models_of_transformers(name):
    model, inputs = build(name)
    before = state(model)
    assert failed(verify_lora(model, ALL, batch=inputs)) == set()
    assert_same(before, state(model))


def test_a_quantized_base():
    model, inputs = build("llama")
    quantize_base(model, "fp8")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checks = verify_lora(model, ALL, batch=inputs)
    assert failed(checks) == set(), checks
    after = model.state_dict()
    assert all(torch.equal(after[name].view(torch.uint8), value.view(torch.uint8)) for name, value in before.items() if value.dim())


class Squared(nn.Linear):
    """A forward that is not W·x."""

    def forward(self, x):
        return super().forward(x) * self.weight.abs().mean()


class Standardized(nn.Conv1d):
    """As BiT's and NFNet's convolutions: the weight is standardized at each call."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2), keepdim=True)) / self.weight.std((1, 2), keepdim=True)
        return nn.functional.conv1d(x, weight, self.bias)


class Ternary(nn.Linear):
    """As BitNet's, quantized in the forward."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        return nn.functional.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


def with_layer(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Tanh(), nn.Linear(8, 4))


class Reads(nn.Module):
    """As WavLM's and Swin's attention and Mamba's dt_proj: the weight is read, the layer never called."""

    def __init__(self):
        super().__init__()
        self.a, self.q = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        weight = getattr(self, "q").weight  # noqa: B009 (hidden from the reader of sources)
        return nn.functional.linear(self.a(x), weight, self.q.bias)


@pytest.fixture
def no_refusals(monkeypatch):
    monkeypatch.setattr(Suitability, "reason", lambda *args: None)
    for where in ("layers.linearity", "layers.adapting", "model.suitability"):
        monkeypatch.setattr(f"lightning_lora.{where}.why_not_linear", lambda *args: None, raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [Squared(8, 8), Ternary(8, 8), Standardized(5, 5, 1)], ids=lambda layer: type(layer).__name__)
def test_a_layer_that_is_not_linear_is_found_and_named(no_refusals, layer, dtype):
    model = with_layer(layer).to(dtype)
    shape = (2, 5, 8) if isinstance(layer, nn.Conv1d) else (5, 8)
    x = torch.randn(shape, dtype=dtype)
    before = state(model)
    checks = of(verify_lora(model, LoRAConfig(rank=2, target_modules=["1", "3"]), batch=x))
    assert checks[LAYERS].status == "failed" and checks[LAYERS].advice.startswith("1: ") and "exclude_modules" in checks[LAYERS].advice
    assert checks[LAYERS].measured > checks[LAYERS].tolerance
    assert_same(before, state(model))


def test_a_weight_that_is_read_without_a_call_is_found(no_refusals):
    checks = of(verify_lora(Reads(), LoRAConfig(rank=2, target_modules=["a", "q"]), batch=torch.randn(5, 8)))
    assert failed(checks.values()) == {GRADIENTS, MODEL}
    assert checks[GRADIENTS].measured == 1 and "in q:" in checks[GRADIENTS].advice


@pytest.mark.parametrize("name", ["wavlm", "mamba", "falcon_mamba"])
def test_models_of_transformers_that_read_weights_are_found(no_refusals, name):
    """What /all-linear/ passes over by itself, named."""
    model, inputs = build(name)
    target = ["out_proj"] if name == "wavlm" else ["dt_proj"]
    checks = of(verify_lora(model, LoRAConfig(rank=2, target_modules=target, modules_to_save=[]), batch=inputs))
    assert {GRADIENTS, MODEL} <= failed(checks.values()), checks


class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x).detach())


def test_a_layer_that_no_gradient_reaches_is_named():
    checks = of(verify_lora(NoGradient(), LoRAConfig(rank=2, target_modules=["a", "b"]), batch=torch.randn(5, 8)))
    assert failed(checks.values()) == {GRADIENTS} and "in a:" in checks[GRADIENTS].advice


def test_a_start_that_is_not_zero_fails():
    model, x = make_net(), torch.randn(6, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lightning_lora.layers.base.init_of", lambda name: lambda layer: [nn.init.ones_(layer.lora_A), nn.init.ones_(layer.lora_B)]
        )
        checks = of(verify_lora(model, LoRAConfig(rank=2, target_modules=["fc1"]), batch=x))
    assert failed(checks.values()) == {IDENTITY}


class Noisy(nn.Module):
    """Random outputs that no seed of torch's repeats."""

    def __init__(self):
        super().__init__()
        self.fc, self.own = nn.Linear(8, 4), torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.fc(x) + torch.randn(4, generator=self.own)


def test_random_outputs_are_not_compared_and_do_not_pass():
    checks = of(verify_lora(Noisy(), LoRAConfig(rank=2, target_modules=["fc"]), batch=torch.randn(5, 8)))
    assert checks[IDENTITY].status == checks[MODEL].status == "not run" and "two equal calls" in checks[MODEL].advice
    assert not checks[MODEL].ok and checks[LAYERS].ok and checks[FILES].ok


class Seeded(Noisy):
    def forward(self, x):
        return self.fc(x) + torch.randn(4) + nn.functional.dropout(self.fc(x), 0.5, training=True)


def test_random_outputs_that_a_seed_repeats_are_compared():
    assert failed(verify_lora(Seeded(), LoRAConfig(rank=2, target_modules=["fc"]), batch=torch.randn(5, 8))) == set()


def test_a_parameter_that_is_not_in_the_file_fails(monkeypatch):
    monkeypatch.setattr("lightning_lora.adapter_io.save_load.extra_tensors", lambda *args: {})
    config = LoRAConfig(rank=2, target_modules=["embed"], modules_to_save=["fc2"])
    checks = of(verify_lora(make_net(), config, batch=torch.randn(6, 8)))
    assert failed(checks.values()) == {FILES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_difference_is_measured_beside_the_effect(dtype):
    base, effect = torch.ones(100, dtype=dtype), torch.full((100,), 0.5, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert relative(base + effect, base + effect, base, eps) == 0
    assert relative(base + 2 * effect, base + effect, base, eps) == pytest.approx(0.5 / (0.5 + math.sqrt(eps) * 1.5), rel=1e-2)
    assert relative(base * math.nan, base, base, eps) == math.inf
    masked = torch.tensor([1.0, -math.inf], dtype=dtype)
    assert relative(masked, masked, torch.zeros(2, dtype=dtype), eps) == 0


def test_a_4_bit_base_that_never_ran():
    """On CPUs with AVX512-BF16, bitsandbytes rewrites a 4-bit weight in its first evaluation pass, and no adapter can train on it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(5, 64)
    quantize_base(model, "nf4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(check.ok for check in verify_lora(model, LoRAConfig(rank=4, target_modules=["0"]), batch=x))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
