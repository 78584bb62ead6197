"""Other ranks in the middle of a training: ΔW against dense matrices in float64, the rest of the run as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    apply_lora_plus,
    get_lora_parameters,
    lora_layers,
    lora_param_groups,
    merge_lora,
    resize_ranks,
)
from lightning_lora.model.compile import compile_layers, uncompile_layers
from lightning_lora.model.layer_statistics import low_rank_layers
from tests.conftest import same_bits
from tests.layers.test_slices import made as made_slices
from tests.optim.resized import IDS, Kinds, adapted, deltas, loss_of, truncated

CASES: list[dict[str, Any]] = [
    {},
    {"scaling": "rslora"},
    {"init": "gaussian"},
    {"init": "orthogonal", "target_modules": ["linear", "conv"]},
    {"variant": "dora", "target_modules": ["linear", "out"]},
    {"variant": "lora_fa"},
    {"variant": "lora_bias", "target_modules": ["linear"]},
    {"kind": "experts"},
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_a_lower_rank_is_the_best_approximation(fields: dict[str, Any]) -> None:
    model = adapted(**fields)
    before, scalings = deltas(model), {name: layer.scaling for name, layer in lora_layers(model)}
    changed = resize_ranks(model, {".*": 2}, ())
    assert set(changed.values()) == {(4, 2)} and {layer.rank for _, layer in lora_layers(model)} == {2}
    assert {name: layer.scaling for name, layer in lora_layers(model)} == scalings
    for name, found in deltas(model).items():
        kept = 1 if name == "grouped" else 2  # each of its two groups has half of the rank
        torch.testing.assert_close(found, truncated(before[name], kept), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_a_higher_rank_leaves_the_update_and_adds_directions_that_train(fields: dict[str, Any]) -> None:
    model = adapted(**fields)
    before = deltas(model)
    resize_ranks(model, {".*": 6}, ())
    for name, layer in low_rank_layers(model).items():
        torch.testing.assert_close(deltas(model)[name], before[name], rtol=1e-12, atol=1e-13)
        _, zero = layer.lora_factors()
        k = 2 if name == "grouped" else layer.lora_A.shape[0] // layer.lora_B.shape[1]
        A = layer.lora_A.flatten(1).unflatten(0, (k, -1))
        old = 4 // (2 if name == "grouped" else 1)
        if zero is layer.lora_B:
            assert not layer.lora_B[:, old:].any() and A[:, old:].any(-1).all()
        else:
            assert not A[:, old:].any() and layer.lora_B[:, old:].any(0).all()


def test_experts_that_share_a_factor_keep_sharing_it() -> None:
    """The best approximation of all experts' updates side by side, for one shared factor."""
    model = adapted("experts", kind_options={"experts": {"shared_outer": True}})
    before = deltas(model)
    resize_ranks(model, {"experts": 3}, ())
    found = deltas(model)
    for name, layer in low_rank_layers(model).items():
        shared_B = layer.lora_B.shape[0] == before[name].shape[1]
        joined = [torch.cat(list(each[name]), 1 if shared_B else 0) for each in (before, found)]
        torch.testing.assert_close(joined[1], truncated(joined[0], 3), rtol=1e-9, atol=1e-11)


def test_optimizer_groups_schedulers_and_lora_plus_work_on() -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.param_groups[0]["params"] = list(get_lora_parameters(model))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 10)
    apply_lora_plus(optimizer, model, 8.0, scheduler)
    other = torch.optim.SGD(model.embed.lora_parameters().values(), lr=0.0)  # a second one that holds a layer too
    held = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    for step in range(6):
        if step == 3:
            resize_ranks(model, {"linear": 7, "grouped": 2, "embed": 1}, [optimizer, other])
        for each in (optimizer, other):
            each.zero_grad()
        loss_of(model, step).backward()
        for each in (optimizer, other, scheduler):
            each.step()
    assert held == [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert all(slots["exp_avg"].shape == p.shape and slots["step"] == 6 for p, slots in optimizer.state.items())
    assert optimizer.param_groups[1]["lr"] == pytest.approx(8 * optimizer.param_groups[0]["lr"]) == pytest.approx(8e-2 * 0.7)


def test_graphs_that_are_still_held_do_no_harm() -> None:
    model = adapted()
    held = loss_of(model, 0)
    held.backward(retain_graph=True)
    resize_ranks(model, {"linear": 2, "out": 6}, ())
    loss_of(model, 1).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in get_lora_parameters(model)) and held.grad_fn is not None


def test_the_config_is_that_of_the_new_ranks() -> None:
    model = adapted()
    ids = {id(p) for p in get_lora_parameters(model)}
    resize_ranks(model, {"linear": 2, "^(conv|out)$": 5}, ())
    assert {id(p) for p in get_lora_parameters(model)} == ids
    config = model.linear.lora_config
    ranks = {name: layer.rank for name, layer in lora_layers(model)}
    assert ranks == {"embed": 4, "grouped": 4, "conv": 5, "linear": 2, "out": 5}
    fresh = apply_lora(Kinds().double(), config)
    assert {name: (layer.rank, layer.scaling) for name, layer in lora_layers(fresh)} == {
        name: (layer.rank, layer.scaling) for name, layer in lora_layers(model)
    }
    assert apply_lora(model, config) is model, "the same config again changes nothing"
    x = model(IDS)
    torch.testing.assert_close(merge_lora(model)(IDS), x)


def refusals() -> dict[str, tuple[Any, Any, str]]:
    def nan(model: Any) -> None:
        model.linear.lora_A.data[0, 0] = torch.nan

    return {
        "no such layer": (lambda: adapted(), {"lineal": 2}, r"'lineal' matches no module. Nearest names: linear"),
        "rank 0": (lambda: adapted(), {"linear": 0}, r"rank_pattern\['linear'\]=0: the rank is a whole number"),
        "groups": (lambda: adapted(), {"grouped": 3}, r"'grouped': rank=3 is not a multiple of groups=2"),
        "nothing adapted": (Kinds, {"linear": 2}, "Kinds has no adapters with a rank"),
        "merged": (lambda: merge_lora(adapted()), {"linear": 2}, r"'linear' cannot get another rank: it is merged"),
        "nan": (lambda: (m := adapted(), nan(m))[0], {"linear": 2}, r"linear\.lora_A holds NaN"),
        "vera": (lambda: adapted(variant="vera", alpha=16, target_modules=["linear"]), {"linear": 2}, "variant='vera' does not compute"),
        "lora_xs": (lambda: adapted(variant="lora_xs", target_modules=["linear"]), {"linear": 2}, "variant='lora_xs' does not compute"),
        "adalora": (lambda: adapted(variant="adalora", target_modules=["linear"]), {"linear": 2}, "variant='adalora' does not compute"),
        "pissa": (lambda: adapted(init="pissa", target_modules=["linear"]), {"linear": 2}, "init='pissa' keeps its start"),
        "mica": (lambda: adapted(init="mica", target_modules=["linear"]), {"linear": 2}, "init='mica' freezes a factor"),
        "rmsprop": (lambda: adapted(), {"linear": 2}, "RMSprop keeps 'momentum_buffer' of 'linear.lora_A'"),
        "adamax": (lambda: adapted(), {"linear": 2}, "Adamax keeps 'exp_inf' of 'linear.lora_A'"),
    }


OPTIMIZERS: dict[str, Any] = {"rmsprop": (torch.optim.RMSprop, {"momentum": 0.9}), "adamax": (torch.optim.Adamax, {})}


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_is_refused_and_changes_nothing(name: str) -> None:
    make, ranks, said = refusals()[name]
    model, optimizers = make(), []
    if name in OPTIMIZERS:
        cls, kwargs = OPTIMIZERS[name]
        optimizers = [cls(get_lora_parameters(model), lr=0.0, **kwargs)]
        loss_of(model, 0).backward()
        optimizers[0].step()
    before, specs = copy.deepcopy(model.state_dict()), [layer.spec for _, layer in lora_layers(model)]
    states = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    with pytest.raises(ValueError, match=said):
        resize_ranks(model, ranks, optimizers)
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())
    assert specs == [layer.spec for _, layer in lora_layers(model)]
    torch.testing.assert_close([optimizer.state_dict() for optimizer in optimizers], states, rtol=0, atol=0, equal_nan=True)


def test_an_optimizer_around_another_is_refused() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(lora_param_groups(model, lr=0.1), lr=0.1)
    optimizer.optimizer = torch.optim.SGD(get_lora_parameters(model), lr=0.1)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="SGD is around another optimizer"):
        resize_ranks(model, {"linear": 2}, optimizer)


def test_slices_of_a_fused_projection_keep_a_pair_each() -> None:
    _, layer = made_slices()
    model, (q, v) = nn.ModuleDict({"qkv": layer}), ([b @ a for a, b in layer.exact_pairs()])
    resize_ranks(model, {"qkv": 1}, ())
    for found, before in zip([b @ a for a, b in layer.exact_pairs()], (q, v), strict=True):
        torch.testing.assert_close(found, truncated(before, 1), rtol=1e-9, atol=1e-11)
    delta = layer.lora_delta().detach()
    resize_ranks(model, {"qkv": 4}, ())
    torch.testing.assert_close(layer.lora_delta().detach(), delta, rtol=1e-12, atol=1e-13)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(x).tanh()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_compiled_again() -> None:
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = apply_lora(nn.Sequential(*(Block() for _ in range(3))), LoRAConfig(rank=4, target_modules=["fc"]))
        optimizer = torch.optim.AdamW(get_lora_parameters(model), lr=1e-2)
        if compiled:
            compile_layers(model, backend="aot_eager")
        found = []
        for step in range(6):
            if step == 3:
                resize_ranks(model, {"0.fc": 2, "1.fc": 6}, optimizer)
            optimizer.zero_grad()
            loss = model(torch.ones(2, 6)).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    uncompile_layers(model)
    torch._dynamo.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][2] < losses[0][0]
