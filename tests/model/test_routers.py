"""Routers that are plain linears, which "all-linear" leaves alone."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_lora import LoRAConfig, find_targets
from lightning_lora.model.routers import routers
from tests.layers.experts import tiny_qwen3_moe
from tests.layers.mixtures import experts
from tests.sweep.archs import build


def mixture(**layers):
    return nn.ModuleDict({"block": nn.ModuleDict({"experts": experts(tiny_qwen3_moe()), **layers}), "gate": nn.Linear(4, 8)})


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"gate": nn.Linear(32, 8)}, {"block.gate"}),
        ({"router": nn.ModuleDict({"layer": nn.Linear(32, 8)})}, {"block.router.layer"}),
        ({"gate": nn.Linear(32, 1), "gate_proj": nn.Linear(32, 8), "up": nn.Linear(32, 8)}, set()),
    ],
)
def test_a_router_is_beside_the_experts_has_an_output_for_each_and_is_named_so(layers, expected):
    modules = dict(mixture(**layers).named_modules())
    linears = [fqn for fqn, module in modules.items() if isinstance(module, nn.Linear) or fqn == "block.experts"]
    assert routers(modules, linears).keys() == expected


class Unknown(nn.Module):
    """Experts of a class that no kind adapts."""

    num_experts = 8


@pytest.mark.parametrize(
    "held", [Unknown(), nn.ModuleList([nn.Linear(32, 32) for _ in range(8)]), nn.ModuleDict({f"e{i}": Unknown() for i in range(8)})]
)
def test_experts_that_are_not_one_tensor_have_routers_too(held):
    model = nn.ModuleDict({"block": nn.ModuleDict({"experts": held, "gate": nn.Linear(32, 8), "out": nn.Linear(64, 64)})})
    report = find_targets(model, LoRAConfig(target_modules="all-linear", allow_unmatched=True, modules_to_save=[]))
    assert report.passed_over == {"block.gate": "it routes tokens to experts"}


@pytest.mark.parametrize(
    ("name", "router", "named"),
    [("jetmoe", "model.layers.0.mlp.router.layer", 4), ("dbrx", "transformer.blocks.0.ffn.router.layer", 2)],
)
def test_all_linear_passes_over_them_and_a_name_does_not(name, router, named):
    model, _ = build(name)
    report = find_targets(model, LoRAConfig(target_modules="all-linear", rank=2))
    assert report.passed_over[router] == "it routes tokens to experts"
    assert not any("router" in target.fqn for target in report.targets)
    report = find_targets(model, LoRAConfig(target_modules=["router.layer"], rank=2))
    assert len(report.targets) == named and not report.passed_over
