"""Which gated MLPs are fused, and when a fused one computes layer by layer."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_lora import LoRAConfig, apply_lora, quantize_base, unload_lora
from lightning_lora.layers.adapting import adapt, unadapt
from lightning_lora.layers.spec import LayerSpec
from lightning_lora.model import fuse as fuse_module
from lightning_lora.model.fuse import GatedMLP
from lightning_lora.ops import backends, plain
from tests.conftest import fill


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*size, bias=False) for size in ((16, 24), (16, 24), (24, 16)))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Other(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))  # the other way round


class Half(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 0.5


def mlp(cls=MLP, targets=("gate_proj", "up_proj", "down_proj"), quantize=None, **options):
    torch.manual_seed(0)
    base = nn.Sequential(cls()) if quantize is None else quantize_base(nn.Sequential(cls()), quantize)
    return fill(apply_lora(base, config=LoRAConfig(rank=3, target_modules=targets, **options)))[0]


def test_a_gated_mlp_is_known_by_its_instructions():
    assert isinstance(mlp(), GatedMLP)
    assert not any(isinstance(mlp(cls), GatedMLP) for cls in (Other, Half))
    assert not isinstance(mlp(targets=("gate_proj", "up_proj")), GatedMLP)
    relu = MLP()
    relu.act_fn = nn.ReLU()
    apply_lora(nn.Sequential(relu), config=LoRAConfig(target_modules="all-linear"))
    assert not isinstance(relu, GatedMLP)


def test_undone_below_a_class_that_was_put_on_top(monkeypatch):
    """As FSDP2 does; once unloaded the module is plain, and fused again when adapters come again."""
    model = nn.Sequential(mlp())
    model[0].__class__ = type("FSDPMLP", (type(model[0]),), {"wrapped": True})
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    unload_lora(model)
    assert type(model[0]).__name__ == "FSDPMLP" and model[0].wrapped and isinstance(model[0], MLP)
    assert not isinstance(model[0], GatedMLP) and "lora_groups" not in model[0].__dict__
    assert_close(model(torch.ones(2, 16)), MLP.forward(model[0], torch.ones(2, 16)))
    apply_lora(model, config=LoRAConfig(rank=3, target_modules="all-linear"))
    assert isinstance(model[0], GatedMLP) and isinstance(model[0], MLP) and model[0].wrapped


def test_one_projection_without_its_adapter_is_computed_as_written(monkeypatch):
    model = mlp()
    expected = model(torch.ones(2, 16))
    unload_lora(model.up_proj)
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    assert model(torch.ones(2, 16)).shape == expected.shape


def hooked(model):
    model.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def merged(model):
    model.up_proj.merge_weights()


def training_weight(model):
    model.up_proj.weight.requires_grad_()


def other_dropout(model):
    model.train()
    model.up_proj.lora_dropout.p = 0.5


def nothing(model):
    pass


def dora(model, **options):
    unload_lora(model)
    fill(apply_lora(model, config=LoRAConfig(rank=3, variant="dora", target_modules="all-linear", **options)))
    assert isinstance(model, GatedMLP)


def doras_dropout(model):
    """It acts on the base's product too."""
    dora(model, dropout=0.5)
    model.train()


def mixed(model):
    """One projection has a scale, the others have none."""
    down = unadapt(model.down_proj)
    fill(adapt(down, LayerSpec(LoRAConfig(rank=3, variant="dora"), 3, 6.0)))


def own_output(model):
    """As a variant of another package might do."""
    layer = model.up_proj
    layer.__class__ = type("Loud", (type(layer),), {"lora_output": lambda self, z: 2 * z})


SERVED = {"not": nothing, "dora": dora}
STEPS_ASIDE = {
    **SERVED,
    "dora's dropout": doras_dropout,
    "mixed": mixed,
    "own output": own_output,
    "hook": hooked,
    "merged": merged,
    "trained weight": training_weight,
    "dropout": other_dropout,
}


@pytest.mark.parametrize(("case", "quantize"), [*((case, None) for case in STEPS_ASIDE), ("not", "nf4"), ("hook", "nf4"), ("not", "int8")])
def test_steps_aside_by_rule(case, quantize, monkeypatch):
    """With kernels that serve, the fused pass is taken only where it means the same."""
    pytest.importorskip("triton")
    model, x = mlp(quantize=quantize), torch.randn(5, 16)
    STEPS_ASIDE[case](model)
    torch.manual_seed(1)
    expected = model(x)
    if case == "own output":
        assert not torch.allclose(expected, mlp()(x))
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    taken = []
    run_fused = fuse_module.lora_gated_mlp
    monkeypatch.setattr(fuse_module, "lora_gated_mlp", lambda *args: taken.append(1) or run_fused(*args))
    monkeypatch.setattr("lightning_lora.ops.fused_linear._backend", lambda fast: plain)
    torch.manual_seed(1)
    assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert taken == ([1] if case in SERVED and quantize != "int8" else [])


def test_deterministic_algorithms_are_respected(monkeypatch):
    monkeypatch.setattr(backends, "worth_kernels", lambda x: True)
    monkeypatch.setattr("lightning_lora.ops.fused_linear._backend", lambda fast: plain)
    monkeypatch.setattr("lightning_lora.model.fuse.lora_gated_mlp", lambda *args: pytest.fail("its sums are not deterministic"))
    torch.use_deterministic_algorithms(True)
    try:
        mlp()(torch.randn(5, 16))
    finally:
        torch.use_deterministic_algorithms(False)
