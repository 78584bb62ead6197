"""Optimizer state under parameter names: written in one order, read in another, the next step is the same to the bit."""

import copy
import io

import pytest
import torch

from lightning_lora import LoRAConfig, apply_lora, get_lora_parameters
from lightning_lora.optim import lora_param_groups
from lightning_lora.optim.state import load_by_name, state_by_name
from tests.conftest import TinyModel, same_bits


@pytest.fixture
def build(make):
    def start():
        return apply_lora(make(TinyModel), config=LoRAConfig(target_modules=["q_proj", "mlp"], bias="lora_only"))

    return start


def step(model, optimizer, ids, times=1):
    for _ in range(times):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()


def through_a_file(saved):
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("order", [lambda ps: ps, lambda ps: ps[::-1], lambda ps: ps[3:] + ps[:3]], ids=["same", "reversed", "rotated"])
def test_resume_is_step_exact_in_any_order(build, ids, optimizer_class, order):
    torch.manual_seed(0)
    model = build()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_class(parameters, lr=0.01)
    step(model, optimizer, ids, 3)

    resumed = copy.deepcopy(model)
    again = optimizer_class(order([p for p in resumed.parameters() if p.requires_grad]), lr=0.5)
    load_by_name(again, resumed, through_a_file(state_by_name(optimizer, model)))
    assert again.param_groups[0]["lr"] == 0.01
    step(model, optimizer, ids, 2)
    step(resumed, again, ids, 2)
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_names_are_the_models_and_free_of_wrappers(build, ids):
    model = build()
    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=0.01))
    step(model, optimizer, ids)
    saved = state_by_name(optimizer, model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(saved["state"]) == trained
    assert {name for group in saved["param_groups"] for name in group["params"]} == trained
    assert [group["name"] for group in saved["param_groups"]] == ["lora_A", "lora_B", "no_decay"]
    compiled = torch.compile(model, backend="eager")
    assert state_by_name(optimizer, compiled)["state"].keys() == saved["state"].keys()
    load_by_name(optimizer, compiled, saved)


def test_several_groups_keep_their_settings(build, ids):
    model = build()
    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=0.01, lora_plus_ratio=4, weight_decay=0.1))
    step(model, optimizer, ids, 2)
    other = torch.optim.AdamW(lora_param_groups(model, lr=1.0, lora_plus_ratio=4))
    load_by_name(other, model, state_by_name(optimizer, model))
    assert [(g["lr"], g["weight_decay"]) for g in other.param_groups] == [(0.01, 0.1), (0.04, 0.1), (0.01, 0.0)]
    for parameter in get_lora_parameters(model):
        assert same_bits(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_a_fresh_optimizer_round_trips(build):
    model = build()
    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=0.01))
    load_by_name(optimizer, model, state_by_name(optimizer, model))
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved["param_groups"].pop(), "the checkpoint's optimizer has 2 parameter groups, this one 3; build it as it was"),
        (
            lambda saved: saved["param_groups"][0]["params"].remove("layers.0.attn.q_proj.lora_A"),
            r"optimizer group 0 differs .* in 1 parameter: layers\.0\.attn\.q_proj\.lora_A",
        ),
        (
            lambda saved: saved["param_groups"][1].update(lora_plus_ratio=4),
            "lora_plus_ratio is 4 in the checkpoint, 1 here; resume with the same, or load the adapter",
        ),
        (lambda saved: saved["param_groups"][1]["params"].append("gone.lora_B"), r"optimizer group 1 differs .*: gone\.lora_B"),
    ],
)
def test_another_optimizer_is_refused_and_nothing_loaded(build, ids, change, message):
    model = build()
    optimizer = torch.optim.AdamW(lora_param_groups(model, lr=0.01))
    step(model, optimizer, ids)
    saved = copy.deepcopy(state_by_name(optimizer, model))
    change(saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        load_by_name(optimizer, model, saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(same_bits(after["state"][i]["exp_avg"], before["state"][i]["exp_avg"]) for i in before["state"])


def test_the_state_of_an_optimizer_of_another_kind_is_refused_and_nothing_loaded(build, ids):
    """torch takes it, and the next step fails on a setting that the saved groups lack: KeyError: 'momentum'."""
    model = build()
    adam = torch.optim.AdamW(lora_param_groups(model, lr=0.01))
    step(model, adam, ids)
    other = torch.optim.SGD(lora_param_groups(model, lr=0.02), momentum=0.9)
    step(model, other, ids)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"another than SGD: its groups have no dampening, momentum\. Resume with the same"):
        load_by_name(other, model, state_by_name(adam, model))
    assert other.param_groups[0]["lr"] == 0.02 and str(other.state_dict()) == str(before)
    older = copy.deepcopy(state_by_name(adam, model))
    for group in older["param_groups"]:
        del group["decoupled_weight_decay"]  # torch 2.6 had none, and a later one adds it
    load_by_name(adam, model, older)


def test_a_parameter_that_is_not_the_models_is_refused(build):
    model = build()
    optimizer = torch.optim.AdamW([*get_lora_parameters(model), torch.nn.Parameter(torch.ones(3, 2))])
    with pytest.raises(ValueError, match=r"a parameter of shape \(3, 2\) that is not part of TinyModel; it could not be resumed"):
        state_by_name(optimizer, model)
