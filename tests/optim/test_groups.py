"""Parameter groups: each trained parameter once, A and B apart, frozen ones dropped before a scheduler looks."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters
from lightning_lora.optim import lora_param_groups
from lightning_lora.optim.groups import only_trainable, take_over
from tests.conftest import TinyModel


@pytest.fixture
def model(make):
    return apply_lora(make(TinyModel), config=LoRAConfig(bias="all", modules_to_save=["lm_head"], target_modules=["q_proj", "embed"]))


def names_of(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def test_every_trained_parameter_is_in_exactly_one_group(model):
    groups = {group["name"]: group for group in lora_param_groups(model, lr=0.1, weight_decay=0.01)}
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert names_of(model, groups["lora_A"]) == {"embed.lora_B", *(f"layers.{i}.attn.q_proj.lora_A" for i in (0, 1))}
    assert names_of(model, groups["lora_B"]) == {"embed.lora_A", *(f"layers.{i}.attn.q_proj.lora_B" for i in (0, 1))}
    assert names_of(model, groups["other"]) == {"lm_head.weight"}
    assert all(p.ndim == 1 for p in groups["no_decay"]["params"])
    assert len(groups["no_decay"]["params"]) == 2 * 4


def test_rates_and_decay(model):
    groups = {group["name"]: group for group in lora_param_groups(model, lr=0.1, weight_decay=0.01, lora_plus_ratio=16)}
    assert {name: group["lr"] for name, group in groups.items()} == {"lora_A": 0.1, "lora_B": 1.6, "other": 0.1, "no_decay": 0.1}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "lora_A": 0.01,
        "lora_B": 0.01,
        "other": 0.01,
        "no_decay": 0.0,
    }
    optimizer = torch.optim.AdamW(groups.values())
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.6, 0.1, 0.1]


def test_empty_groups_are_left_out(make):
    groups = lora_param_groups(apply_lora(make(TinyModel)), lr=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [("lora_A", 0.1, 0.0), ("lora_B", 0.1, 0.0)]


def test_a_rate_for_b_moves_b_more(make, ids):
    moved = {}
    for ratio in (1.0, 4.0):
        model = apply_lora(make(TinyModel), config=LoRAConfig(target_modules=["mlp"]))
        optimizer = torch.optim.SGD(lora_param_groups(model, lr=0.1, lora_plus_ratio=ratio))
        model(ids).square().mean().backward()
        optimizer.step()
        moved[ratio] = model.layers[0].mlp.lora_B.norm().item()  # it started at zero
    assert moved[4.0] == pytest.approx(4 * moved[1.0])


@pytest.mark.parametrize("ratio", [0, -1.0, float("nan"), float("inf"), "16", True])
def test_a_ratio_out_of_range(model, ratio):
    with pytest.raises(ValueError, match=r"lora_plus_ratio=.*: give a number > 0"):
        lora_param_groups(model, lr=0.1, lora_plus_ratio=ratio)


@pytest.mark.parametrize("wrong", [{"lr": float("nan")}, {"lr": -1.0}, {"lr": "1e-3"}, {"lr": 0.1, "weight_decay": -0.1}])
def test_a_rate_or_decay_out_of_range(model, wrong):
    """torch checks the defaults of an optimizer, and not what a group says."""
    with pytest.raises(ValueError, match=r"^(lr|weight_decay)=.*: give a finite number ≥ 0"):
        lora_param_groups(model, **{"lr": 0.1, **wrong})


def test_a_frozen_model_is_refused(make):
    with pytest.raises(ValueError, match="TinyModel has no parameter that trains; call apply_lora"):
        lora_param_groups(make(TinyModel).requires_grad_(False), lr=0.1)


@pytest.mark.parametrize(
    "params",
    [
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m.parameters(), "lr": 0.5}],
        lambda m: [{"params": m.named_parameters()}],
    ],
    ids=["generator", "list", "named", "group", "named-group"],
)
def test_only_trainable_drops_frozen_parameters(make, params):
    model = apply_lora(make(TinyModel))
    with only_trainable():
        optimizer = torch.optim.AdamW(params(model), lr=0.1)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in get_lora_parameters(model)}
    assert len(held) == 8


def test_only_trainable_keeps_groups_in_place_for_schedulers(make, ids):
    model = apply_lora(make(TinyModel))
    with only_trainable():
        optimizer = torch.optim.SGD(
            [{"params": model.embed.parameters()}, {"params": model.layers.parameters()}, {"params": torch.ones(1)}],
            lr=1.0,
        )
        scheduler = LambdaLR(optimizer, [lambda _: 0.1, lambda _: 0.2, lambda _: 0.3])
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 8, 0]
    assert scheduler.get_last_lr() == [0.1, 0.2, 0.3]
    OneCycleLR(optimizer, [0.1, 0.2, 0.3], total_steps=3)
    model(ids).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("fail", [False, True])
def test_only_trainable_ends_with_its_block(make, fail):
    model = apply_lora(make(TinyModel))
    original = torch.optim.Optimizer.add_param_group
    try:
        with only_trainable():
            assert torch.optim.Optimizer.add_param_group is not original
            if fail:
                raise KeyError
    except KeyError:
        pass
    assert torch.optim.Optimizer.add_param_group is original
    assert len(torch.optim.SGD(model.parameters(), lr=0.1).param_groups[0]["params"]) == len(list(model.parameters()))


def test_vectors_of_any_model_get_no_decay():
    groups = lora_param_groups(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), lr=0.1, weight_decay=0.1)
    assert [(g["name"], len(g["params"])) for g in groups] == [("other", 1), ("no_decay", 3)]


def two_groups(model, cls):
    named = [list(child.named_parameters(prefix=name)) for name, child in model.named_children()]
    return cls([{"params": named[0], "lr": 0.1}, {"params": named[1], "lr": 0.2}])


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_each_group_takes_the_adapters_of_its_own_layers(cls):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = two_groups(model, cls)
    before = two_groups(model, cls)
    apply_lora(model, config=LoRAConfig(rank=2, bias="lora_only", target_modules=["0", "1"]))
    before.state[model[0].weight] = {"step": 1}
    for each in (optimizer, before):
        take_over(each, model)
        take_over(each, model)
    for number, group in enumerate(optimizer.param_groups):
        assert names_of(model, group) == {f"{number}.{name}" for name in ("bias", "lora_A", "lora_B")} == set(group["param_names"])
        assert len(group["params"]) == 3 and group["lr"] == [0.1, 0.2][number]
    assert [p.shape for p in before.param_groups[0]["params"]] == [(3, 3), (3,)], "it has a state already"


def test_lbfgs_steps_on_the_adapters_that_it_took():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    apply_lora(model, config=LoRAConfig(rank=2, target_modules=["0", "1"]))
    take_over(optimizer, model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > closure().item()
